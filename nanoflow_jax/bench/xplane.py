"""Reads traces that jax wrote for xprof, without any library of protobuf but its wire format.

Events name an operation of a compiled program; the plane of metadata has the programs, and in them
the scope that each operation came from. Xprof joins the two, and so does this.

Source: xplane.proto of tsl, hlo.proto and xla_data.proto of XLA, for numbers of fields.
"""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

_METADATA_PLANE = "/host:metadata"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One run of an operation.

    Attributes:
        module: Name of its program, such as `jit_forward`.
        run_id: Which run of that.
        op: Its name in the program.
        scope: Where in the code it came from; empty where the program does not say.
        start_ns: When it began, by the trace's clock.
        end_ns: When it ended.
    """

    module: str
    run_id: int
    op: str
    scope: str
    start_ns: float
    end_ns: float


def read(folder: pathlib.Path) -> list[Event]:
    """The operations that the only trace in a folder saw."""
    (path,) = folder.rglob("*.xplane.pb")
    scopes = _scopes(path.read_bytes())
    found = []
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                stats: dict[str, Any] = dict(event.stats)
                if "hlo_op" in stats:
                    module, op = stats["hlo_module"], stats["hlo_op"]
                    found.append(
                        Event(
                            module=module,
                            run_id=stats["run_id"],
                            op=op,
                            scope=scopes.get((f"{module}({stats['program_id']})", op), ""),
                            start_ns=event.start_ns,
                            end_ns=event.start_ns + event.duration_ns,
                        )
                    )
    return found


def _scopes(space: bytes) -> dict[tuple[str, str], str]:
    """Where each operation came from, by names of program, `MODULE(PROGRAM_ID)`, and operation."""
    found: dict[tuple[str, str], str] = {}
    for plane in _messages(space, 1):
        if _text(plane, 2) != _METADATA_PLANE:
            continue
        for entry in _messages(plane, 4):
            for metadata in _messages(entry, 2):
                for stat in _messages(metadata, 5):
                    for hlo in _messages(stat, 6):
                        for module in _messages(hlo, 1):
                            found |= _module_scopes(_text(metadata, 2), module)
    return found


def _module_scopes(program: str, module: bytes) -> dict[tuple[str, str], str]:
    return {
        (program, _text(instruction, 1)): _text(metadata, 2)
        for computation in _messages(module, 3)
        for instruction in _messages(computation, 2)
        for metadata in _messages(instruction, 7)
    }


def _text(message: bytes, number: int) -> str:
    return next(_messages(message, number), b"").decode()


def _messages(message: bytes, number: int) -> Iterator[bytes]:
    """The values of a field that are messages, texts or bytes."""
    return (value for found, value in _fields(message) if found == number)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each field that has a length; the others are passed over."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            yield key >> 3, message[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[kind]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
