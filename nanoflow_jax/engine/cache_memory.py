"""How many pages the KV cache has: what memory is left, and what all requests could use."""

import dataclasses
import os

import jax

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import kernel_choice
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.parallel import placement as placement_lib

# Of the host's memory, for a cache whose size nobody chose: others live there too.
_HOST_SHARE = 0.25


def make_layout(
    placement: placement_lib.Placement,
    section: config_lib.CacheSection,
    served: kernel_choice.Served,
    *,
    most_pages: int,
    page_major: bool,
    num_replicas: int,
    num_layers: int | None = None,
) -> layout_lib.PageMajorLayout | layout_lib.TokenMinorLayout:
    """The cache of one layer: as many pages as memory allows and all requests could use.

    Each device has some kv heads of every page. All layers of the model have one, unless told how
    many do.
    """
    local = placement.mesh.local_devices
    device = local[0]
    kind = layout_lib.PageMajorLayout if page_major else layout_lib.TokenMinorLayout
    shape, page_bytes = _page(served, num_layers)
    num_pages = section.num_pages
    # The host's memory is one, however many devices it plays.
    sharers = len(local) * num_replicas if device.platform == "cpu" else 1
    free = _free_bytes(device) // sharers
    if not num_pages:
        share = _HOST_SHARE if device.platform == "cpu" else 1.0
        room = int(free * share * section.memory_fraction)
        num_pages = min(most_pages, room // page_bytes)
    if num_pages * page_bytes > free:
        raise ValueError(
            f"--cache_num_pages={num_pages} needs {num_pages * page_bytes} bytes and {free} are "
            f"free; ask for at most {free // page_bytes}, or leave it out for as many as fit"
        )
    if num_pages < 1:
        raise ValueError(
            "no memory for a single page of the KV cache; use a smaller model, "
            "--dtype=bfloat16, or raise --cache_memory_fraction"
        )
    return kind(shape=dataclasses.replace(shape, num_pages=num_pages))


def tokens_beside_weights(
    device: jax.Device,
    section: config_lib.CacheSection,
    served: kernel_choice.Served,
    *,
    weight_bytes: int,
    num_layers: int | None = None,
) -> int:
    """Tokens that the cache of a GPU will have room for once its share of the weights is there.

    Args:
        device: The GPU.
        section: The knobs.
        served: What a device has of the model.
        weight_bytes: Of that share.
        num_layers: That have a cache; all of the model unless told how many.
    """
    if section.num_pages:
        return section.num_pages * served.page_size
    room = (_free_bytes(device) - weight_bytes) * section.memory_fraction
    return max(0, int(room // _page(served, num_layers)[1])) * served.page_size


def _page(
    served: kernel_choice.Served, num_layers: int | None
) -> tuple[layout_lib.CacheShape, int]:
    """The shape of a cache of one page in one layer, and the bytes of that page in all layers."""
    shape = layout_lib.CacheShape(
        num_pages=1,
        page_size=served.page_size,
        num_kv_heads=served.config.num_kv_heads,
        head_dim=served.config.head_dim,
        dtype=served.dtype,
    )
    return shape, shape.page_bytes * (num_layers or served.config.num_layers)


def _free_bytes(device: jax.Device) -> int:
    """What is free on a GPU; the host's memory on CPU."""
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
