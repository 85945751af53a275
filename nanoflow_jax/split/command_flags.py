"""Flags that both ends of split sessions have, and what is read from them."""

import sys
from collections.abc import Callable, Sequence

from absl import flags as absl_flags

from nanoflow_jax import config as config_lib
from nanoflow_jax import flags as knob_flags
from nanoflow_jax import meter
from nanoflow_jax.split import cut, transport


def define(values: absl_flags.FlagValues, sections: type) -> None:
    """Defines the flags of an engine, of one end, and of TLS.

    Args:
        values: Where they go.
        sections: A dataclass whose fields are the end's sections of knobs.
    """
    knob_flags.define_sections(config_lib.EngineConfig, values)
    knob_flags.define_sections(sections, values)
    common = knob_flags.of_program(values)
    absl_flags.DEFINE_string("tls_certificate", "", "This end's certificates, PEM.", **common)
    absl_flags.DEFINE_string("tls_key", "", "This end's private key, PEM.", **common)
    absl_flags.DEFINE_string(
        "tls_authority",
        "",
        "Certificates, PEM, that the other end's must be signed by; at the server that means that "
        "clients need one.",
        **common,
    )
    absl_flags.DEFINE_boolean(
        "allow_plaintext", False, "Without TLS beyond this machine, too.", **common
    )


def endpoint(
    values: absl_flags.FlagValues, host: str, port: int, *, token: str = "", uses_tls: bool
) -> transport.Endpoint:
    """Where the gateway is.

    Raises:
        ValueError: It is on another machine, and neither TLS nor plaintext was asked for.
    """
    tls = None
    if uses_tls:
        tls = transport.TlsFiles(
            certificate=values.tls_certificate, key=values.tls_key, authority=values.tls_authority
        )
    return transport.Endpoint(
        host=host, port=port, token=token, tls=tls, allow_plaintext=values.allow_plaintext
    )


def borders(texts: Sequence[str]) -> tuple[int, ...]:
    """Layers of --grid.

    Raises:
        ValueError: They are no ascending numbers.
    """
    found = tuple(int(text) for text in texts if text.strip().isdecimal())
    if len(found) != len(texts) or list(found) != sorted(set(found)):
        raise ValueError(f"--grid={','.join(texts)} is no ascending list of layers such as 2,4,6")
    return found


def ranges(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Ranges of --layers.

    Raises:
        ValueError: They are none.
    """
    found = []
    for text in texts:
        layers = cut.try_range(text.strip())
        if layers is None or layers[0] >= layers[1]:
            raise ValueError(
                f"--layers={','.join(texts)}: {text!r} is no range START:STOP of layers, such as "
                "0:2"
            )
        found.append(layers)
    return tuple(found)


def hash_meter() -> Callable[[int, int], None]:
    """Shows how much of a model's weights is hashed, of bytes done and bytes in all."""
    shown: list[meter.Meter] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            tell("hashing the weights, so that both ends can tell that they have the same")
            shown.append(meter.Meter(total, unit="B", stream=sys.stderr))
        shown[0].update(done)
        if done == total:
            shown[0].close()

    return progress


def tell(text: str) -> None:
    """Shows lines about what goes on, beside the answer."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
