"""Profiles with made-up times, for tests."""

import msgspec

from nanoflow_jax.results import manifest, profile


def point(operation, tokens, *seconds, **more):
    return profile.Point(operation=operation, tokens=tokens, seconds=seconds, **more)


def pair(tokens, other_tokens, num_ctas, *seconds, product="up_gate", context=512):
    return profile.Pair(
        product=product,
        tokens=tokens,
        other="decode_attention",
        other_tokens=other_tokens,
        context=context,
        num_ctas=num_ctas,
        seconds=seconds,
    )


def made(*points, sizes=None, num_sms=None, pairs=(), **more):
    platform = "cpu" if num_sms is None else "gpu"
    found = profile.Profile(
        model="toy",
        sizes=sizes or {"hidden_size": 8},
        device=manifest.Device(platform=platform, name="Toy 1"),
        num_sms=num_sms,
        memory_bytes=10**9,
        dtype="float32",
        method="wall",
        date="2026-11-26",
        load=1.0,
        command=("search", "profile"),
        versions={"jax": "0.10.2"},
        commit=None,
        kernel_sources={},
        points=points,
        pairs=pairs,
    )
    return msgspec.structs.replace(found, **more)
