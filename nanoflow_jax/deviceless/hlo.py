"""Reads the text of optimised HLO."""

import math
import re

from nanoflow_jax import compat
from nanoflow_jax.deviceless.program import Instruction

_LINE = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLS = re.compile(r"calls=%([^\s,]+)")
# A Mosaic kernel is in the text as it is, and with a name if `compat.name_kernels` gave it one.
_KERNEL_NAME = re.compile(rf"\\00(\w+_[0-9a-f]{{{compat.KERNEL_DIGITS}}})\\00")
_KERNEL_HASH = re.compile(r'kernel_hash = "((?:[^"\\]|\\.)*)"')
_SCOPE = re.compile(r'metadata=\{[^}]*?op_name="([^"]*)"')


def read_entry(text: str) -> tuple[Instruction, ...]:
    """Instructions of the entry computation, in order."""
    lines = text[text.index("\nENTRY ") :].split("\n")[2:]
    end = next(index for index, line in enumerate(lines) if line.startswith("}"))
    return tuple(_read(line, text) for line in lines[:end])


def _read(line: str, text: str) -> Instruction:
    found = _LINE.match(line)
    assert found, line[:200]
    operands = found["rest"].split(")", 1)[0]
    call = line if found["opcode"] == "custom-call" else _call_inside(line, text)
    scope = _SCOPE.search(line) or _SCOPE.search(call)
    kernel = _KERNEL_HASH.search(call) and (_KERNEL_NAME.search(call) or _KERNEL_HASH.search(call))
    arrays = _ARRAY.findall(found["shape"])
    return Instruction(
        name=found["name"],
        opcode=found["opcode"],
        shape=", ".join(f"{kind}[{sizes}]" for kind, sizes in arrays),
        num_bytes=sum(array_bytes(kind, sizes) for kind, sizes in arrays),
        operands=tuple(re.findall(r"%([^\s,()]+)", operands)),
        scope=scope[1] if scope else "",
        kernel=kernel[1] if kernel else None,
    )


def _call_inside(line: str, text: str) -> str:
    """Line of the custom call in what an instruction calls; empty if there is none.

    XLA fuses a call with the slices that make its operands, and names the whole no more.
    """
    if not (called := _CALLS.search(line)):
        return ""
    begin = text.find(f"\n%{called[1]} (")
    inside = text[begin : text.find("\n}", begin)].split("\n")
    return next((one for one in inside if " custom-call(" in one), "")


def array_bytes(kind: str, sizes: str) -> int:
    """Bytes of an array of HLO.

    Args:
        kind: Element type such as bf16, s32, pred, f8e4m3fn.
        sizes: Separated by commas; empty for a scalar.
    """
    digits = re.match(r"[a-z]+(\d+)", kind)
    bits = int(digits[1]) if digits else 8 * (kind == "pred")  # a token has none
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
