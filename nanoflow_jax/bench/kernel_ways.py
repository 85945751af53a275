"""What is timed: one problem in several ways, each on several shares of the device."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from pallas_kernels.gemm_role import GemmTile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where kernels run.

    Attributes:
        on_gpu: Else they are interpreted.
        num_sms: SMs of the device; of an interpreter, what it pretends to have.
        interpret: None on a GPU, or InterpretGPUParams.
        tile: How our products are cut, `gemm_role.default_tile` unless given; grouped products
            keep their own.
    """

    on_gpu: bool
    num_sms: int
    interpret: Any
    tile: GemmTile | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Way:
    """A program that does a problem.

    Attributes:
        name: pallas is ours, on any share.
        function: Takes operands, then what a variant adds; a tuple of results.
        options: Of XLA's compiler.
        view: Takes operands and results; the results in the form of the reference's. Not timed.
        is_wall: Whether kernels may run at the same time, so that their times do not add up.
        compiled: Whether jax compiles the function; else it is called as it is.
        slack: How many times the task's error it may have, for results that it rounds in between.
    """

    name: str
    function: Callable[..., tuple[Any, ...]]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    view: Callable[[Any, Sequence[Any]], tuple[Any, ...]] | None = None
    is_wall: bool = False
    compiled: bool = True
    slack: float = 1.0

    def program(self, *operands: Any) -> Callable[..., tuple[Any, ...]]:
        """The function, compiled for such operands."""
        if not self.compiled:
            return self.function
        lowered = jax.jit(self.function).lower(*operands)
        found: Callable[..., tuple[Any, ...]] = lowered.compile(
            compiler_options=dict(self.options) or None
        )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A way with so many SMs.

    Attributes:
        num_ctas: SMs it may use; None if nothing caps it.
        split: Of them, those of the product in a pair.
        more: Further operands, which say so to the program.
    """

    way: Way
    num_ctas: int | None = None
    split: int | None = None
    more: tuple[Any, ...] = ()

    @property
    def labels(self) -> dict[str, Any]:
        """What tells its samples from others."""
        return {"way": self.way.name, "num_ctas": self.num_ctas, "split": self.split}


class Sized(Protocol):
    """What is known of a problem before it is drawn."""

    @property
    def num_bytes(self) -> int:
        """Of what it reads and writes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One problem.

    Attributes:
        shape: How much it moves.
        draw: Operands of a seed.
        reference: Takes operands; the results that each way must give.
        relative_error: Largest distance from them, as a share of them, in the 2-norm.
        variants: What to time; those of one way have the same executable.
        missing: Ways that cannot be had here, and why.
    """

    shape: Sized
    draw: Callable[[int], Any]
    reference: Callable[[Any], tuple[Any, ...]]
    relative_error: float
    variants: Sequence[Variant]
    missing: Mapping[str, str]
