"""What is said of a compiled step: whether it may run as its plan wants, in lines for people."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from nanoflow_jax.cost.timeline import Prediction
from nanoflow_jax.deviceless.program import Kernel, Program
from nanoflow_jax.overlap.analysis import Analysis
from nanoflow_jax.overlap.step import Step

_MOST_NAMED = 3
_SUMS = ("o_reduce", "down_reduce")
# Of the sum of all durations, the most that the longest chain may take.
_LONGEST = 0.70
# XLA's short kernels hide less than their plan would have them.
_CHAIN_SLACK = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a step should be.

    Attributes:
        claim: What.
        holds: Whether it is.
        detail: What was found.
    """

    claim: str
    holds: bool
    detail: str


def check(found: Analysis, step: Step, prediction: Prediction | str) -> list[Finding]:
    """What a step should be, and whether it is.

    Args:
        found: Its program.
        step: What was compiled.
        prediction: Of all layers of its model, or why there is none.
    """
    return list(_findings(found, step, prediction))


def _findings(found: Analysis, step: Step, prediction: Prediction | str) -> Iterator[Finding]:
    if step.bucket.decode_rows:
        others = "products" if step.num_devices == 1 else "products or sums"
        claim = f"decode attention may run beside {others} of other tokens"
        yield _beside(found, claim, "decode_attention")
    if step.num_devices > 1:
        yield _beside(found, "sums over devices may run beside computing for other tokens", *_SUMS)
    pairs = [f"{found.name(a)} and {found.name(b)}" for a, b in found.products_at_once()]
    yield Finding(
        claim="products wait for each other",
        holds=not pairs,
        detail=_some(pairs) or "no two may run at once",
    )
    if not isinstance(prediction, str):
        yield _chain(found, prediction)
    yield _sms(found)
    wrong = [f"{name} has {count} calls" for name, count in found.called_wrongly().items()]
    yield Finding(
        claim="each product and each sum of the plan is one call",
        holds=not wrong,
        detail=_some(wrong) or "none is merged or split",
    )
    aliased = found.program.memory.alias_bytes
    copies = [one for one in found.program.copies if one.num_bytes >= step.layer_cache_bytes]
    yield Finding(
        claim="the cache is changed in place",
        holds=aliased >= step.cache_bytes and not copies,
        detail=f"{aliased} of {step.cache_bytes} bytes aliased, {len(copies)} copies",
    )
    yield Finding(
        claim="no kernel of ours spills registers",
        holds=found.spilled_bytes() == 0,
        detail=f"{found.spilled_bytes()} bytes",
    )


def _beside(found: Analysis, claim: str, *operations: str) -> Finding:
    beside = list(found.beside(*operations))
    alone = [found.name(one.node) for one in beside if not one.others]
    lines = [
        f"{found.name(one.node)} beside {_some([found.name(p) for p in one.others])}"
        for one in beside
    ]
    return Finding(
        claim=claim,
        holds=bool(beside) and not alone,
        detail=f"nothing is beside {_some(alone)}" if alone else _some(lines) or "there is none",
    )


def _chain(found: Analysis, prediction: Prediction) -> Finding:
    chain = found.chain(prediction.durations_s)
    return Finding(
        claim=f"the longest chain takes at most {_LONGEST:.0%} of the sum of predicted times",
        holds=prediction.critical_fraction <= _LONGEST
        and chain.fraction <= chain.wanted_fraction + _CHAIN_SLACK,
        detail=f"{prediction.critical_fraction:.1%} over all layers; of those compiled "
        f"{chain.fraction:.1%}, of which the plan wants {chain.wanted_fraction:.1%}",
    )


def _sms(found: Analysis) -> Finding:
    ctas, nodes = found.most_ctas()
    large = found.too_large()
    detail = f"{ctas} CTAs: {' and '.join(map(found.name, nodes))}"
    if large:
        detail += f"; too large for an SM: {_some(large)}"
    return Finding(
        claim=f"what runs at once fits the {found.device.num_sms} SMs",
        holds=ctas <= found.device.num_sms and not large,
        detail=detail if nodes else "no kernel was found",
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def text(
    findings: Sequence[Finding], program: Program, step: Step, prediction: Prediction | str
) -> str:
    """The report."""
    order, count = program.order, len(program.graphs)
    lines = [
        f"plan {step.plan.name}, executor {step.executor}, bucket {step.bucket}: "
        f"{order.num_nodes} launches in {count} CUDA graph{'' if count == 1 else 's'}; of "
        f"{len(order.nodes)} that are told of, {order.critical_path} wait for each other"
    ]
    for one in findings:
        lines.append(f"{'ok  ' if one.holds else 'NOT '} {one.claim}: {one.detail}")
    lines += ["", "kernels of ours  CTAs  registers  spilled bytes  shared bytes"]
    lines += _rows(program.mosaic_kernels)
    lines += ["", _predicted(prediction)]
    return "\n".join(lines)


def _rows(kernels: Sequence[Kernel]) -> Iterator[str]:
    """A line for each kind; ptxas knows kernels by number only."""
    kinds = collections.Counter(
        (one.grid[0], one.registers, one.spill_bytes, one.shared_bytes) for one in kernels
    )
    for (ctas, registers, spilled, shared), count in sorted(kinds.items()):
        yield f"{count:15}  {ctas:4}  {registers:9}  {spilled:13}  {shared:12}"


def _predicted(prediction: Prediction | str) -> str:
    if isinstance(prediction, str):
        return f"no times are predicted: {prediction}"
    return (
        "compiled to overlap, not measured; by the datasheet a layer takes "
        f"{prediction.period_s * 1e6:.0f} us, its operations one after another with the same "
        f"shares {prediction.sum_s * 1e6:.0f} us, and with all SMs, nothing split, "
        f"{prediction.plain_s * 1e6:.0f} us"
    )
