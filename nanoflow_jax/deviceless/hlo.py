"""Reads the text of optimised HLO."""

import math
import re

from nanoflow_jax.deviceless.program import Instruction

_LINE = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_SCOPE = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')


def read_entry(text: str) -> tuple[Instruction, ...]:
    """Instructions of the entry computation, in order."""
    lines = text[text.index("\nENTRY ") :].split("\n")[2:]
    end = next(index for index, line in enumerate(lines) if line.startswith("}"))
    return tuple(_read(line) for line in lines[:end])


def _read(line: str) -> Instruction:
    found = _LINE.match(line)
    assert found, line[:200]
    operands = found["rest"].split(")", 1)[0]
    scope = _SCOPE.search(line)
    arrays = _ARRAY.findall(found["shape"])
    return Instruction(
        name=found["name"],
        opcode=found["opcode"],
        shape=", ".join(f"{kind}[{sizes}]" for kind, sizes in arrays),
        num_bytes=sum(array_bytes(kind, sizes) for kind, sizes in arrays),
        operands=tuple(re.findall(r"%([^\s,()]+)", operands)),
        scope=scope[1] if scope else "",
    )


def array_bytes(kind: str, sizes: str) -> int:
    """Bytes of an array of HLO.

    Args:
        kind: Element type such as bf16, s32, pred, f8e4m3fn.
        sizes: Separated by commas; empty for a scalar.
    """
    digits = re.match(r"[a-z]+(\d+)", kind)
    bits = int(digits[1]) if digits else 8 * (kind == "pred")  # a token has none
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
