"""Checks every kernel on the device at hand: numbers, repeatability, and graphs that overlap.

On a GPU the kernels run at the sizes that are served; on a CPU they are interpreted on tiny ones,
which checks this program. Kernels of a maker that the device or its jax has nothing for are named,
with the reason.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanoflow_jax import compat
from nanoflow_jax.bench import kernel_cases
from nanoflow_jax.engine import kernel_choice

# Bytes of NaN that lie where results will be, if the kernel leaves any of them unwritten.
_POISON_BYTES = 1 << 30
_MODE = "xla_gpu_command_buffer_scheduling_mode"
_SAME_BITS = "CONCURRENT gives the bits of SERIALIZE"
_MAKERS = (kernel_choice.Maker.MOSAIC, kernel_choice.Maker.TRITON)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one check.

    Attributes:
        name: Of the case.
        check: What was looked at.
        ok: Whether it holds; None if it cannot be looked at here.
        detail: Figures, or why not.
        seconds: Wall time, compiling included.
    """

    name: str
    check: str
    ok: bool | None
    detail: str
    seconds: float


def run(*, seed: int, repeats: int) -> Iterator[Outcome]:
    """Checks all kernels that run here, one outcome after another.

    Args:
        seed: Of the operands.
        repeats: How often each kernel runs on the same operands; results must not differ in a bit.

    Raises:
        ValueError: No kernel runs here.
    """
    device = jax.devices()[0]
    machine = kernel_choice.machine_of(device)
    reasons = {maker: kernel_choice.why_not(maker, machine) for maker in _MAKERS}
    if None not in reasons.values():
        raise ValueError("; ".join(f"{maker}s: {reason}" for maker, reason in reasons.items()))
    interpret, sizes = None, kernel_cases.SERVED
    if device.platform != "gpu":
        interpret = compat.interpret_gpu_params(
            detect_races=True, out_of_bounds_reads="uninitialized"
        )
        sizes = kernel_cases.TINY
    run_here = []
    for case in kernel_cases.cases(sizes, seed):
        if reason := reasons[case.maker]:
            yield _unchecked(case.name, "on any number of CTAs", reason)
        else:
            run_here.append(case)
            yield from _check_case(case, interpret=interpret, repeats=repeats)
    if interpret is None:
        yield _check_graphs(run_here)
    else:
        yield _unchecked("two kernels side by side in a CUDA graph", _SAME_BITS, "needs a GPU")


def _unchecked(name: str, check: str, reason: str) -> Outcome:
    return Outcome(name=name, check=check, ok=None, detail=reason, seconds=0.0)


def _check_case(case: kernel_cases.Case, *, interpret: Any, repeats: int) -> Iterator[Outcome]:
    with jax.default_matmul_precision("highest"):
        wanted = jax.block_until_ready(jax.jit(case.reference)(*case.operands))
    for num_ctas in case.num_ctas:
        begin = time.perf_counter()
        try:
            runs = _results(case, num_ctas=num_ctas, interpret=interpret, repeats=repeats)
        # The device's RuntimeError, and what lowering raises for a kernel that it cannot take.
        except (RuntimeError, ValueError, TypeError) as error:
            if interpret is not None:
                compat.reset_interpreter()
            said = str(error).strip() or type(error).__name__
            ok, detail = False, f"failed: {said.splitlines()[0]}"
        else:
            ok, detail = _judge(case, wanted, runs)
            if interpret is not None and compat.races_found():
                ok, detail = False, f"{detail}; the interpreter found a race"
        yield Outcome(
            name=case.name,
            check=f"{num_ctas} CTAs",
            ok=ok,
            detail=detail,
            seconds=time.perf_counter() - begin,
        )


def _results(
    case: kernel_cases.Case, *, num_ctas: int, interpret: Any, repeats: int
) -> list[list[np.ndarray]]:
    def call(*operands: Any) -> tuple[Any, ...]:
        return case.kernel(*operands, num_ctas=num_ctas, interpret=interpret)

    program = jax.jit(call).lower(*case.operands).compile()
    found = []
    for _ in range(repeats):
        if interpret is None:
            _poison()
        found.append([np.asarray(array) for array in program(*case.operands)])
    return found


def _poison() -> None:
    """Leaves NaN in memory that the next allocation is likely to get."""
    jnp.full(_POISON_BYTES // 4, jnp.nan, jnp.float32).block_until_ready().delete()


def _judge(
    case: kernel_cases.Case, wanted: Sequence[Any], runs: Sequence[Sequence[np.ndarray]]
) -> tuple[bool, str]:
    errors = []
    for found, reference in zip(runs[0], wanted, strict=True):
        one, other = np.asarray(found, np.float64), np.asarray(reference, np.float64)
        distance = np.linalg.norm(one - other) / max(float(np.linalg.norm(other)), 1e-30)
        errors.append(float(distance))
    changed = sum(
        not all(
            one.tobytes() == other.tobytes() for one, other in zip(runs[0], other_run, strict=True)
        )
        for other_run in runs[1:]
    )
    detail = f"error {', '.join(f'{error:.1e}' for error in errors)} of {case.relative_error:.0e}"
    if changed:
        detail += f"; {changed} of {len(runs) - 1} repeats gave other bits"
    # A NaN makes an error that no comparison calls small.
    return all(error <= case.relative_error for error in errors) and not changed, detail


def _check_graphs(cases: Sequence[kernel_cases.Case]) -> Outcome:
    """Runs two kernels that may overlap, and in turn, and compares bits.

    Decode attention, beside a product, or prefill attention where no kernel makes products.
    """
    begin = time.perf_counter()
    beside = next(case for case in cases if case.name.startswith(("gemm", "prefill attention,")))
    attention = next(case for case in cases if case.name.startswith("decode attention,"))
    cut = len(beside.operands)

    def both(*operands: Any) -> tuple[Any, ...]:
        one = beside.kernel(*operands[:cut], num_ctas=84, interpret=None)
        other = attention.kernel(*operands[cut:], num_ctas=48, interpret=None)
        return one + other

    operands = (*beside.operands, *attention.operands)
    lowered = jax.jit(both).lower(*operands)
    found: dict[str, list[bytes]] = {}
    for mode in ("SERIALIZE", "CONCURRENT"):
        options: Any = {_MODE: mode, "xla_gpu_graph_min_graph_size": 1}
        program: Callable[..., Any] = lowered.compile(compiler_options=options)
        for _ in range(3):  # the first runs are not captured
            results = program(*operands)
        found[mode] = [np.asarray(array).tobytes() for array in results]
    ok = found["SERIALIZE"] == found["CONCURRENT"]
    return Outcome(
        name=f"{beside.name}, beside {attention.name}",
        check=_SAME_BITS,
        ok=ok,
        detail="the same" if ok else "not the same",
        seconds=time.perf_counter() - begin,
    )
