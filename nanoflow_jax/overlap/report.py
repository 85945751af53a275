"""What is said of a compiled step: whether it may run as its plan wants, in lines for people."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from nanoflow_jax.deviceless.program import Kernel, Program
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.overlap.analysis import Analysis
from nanoflow_jax.overlap.step import Step
from nanoflow_jax.overlap.timeline import Prediction

_MOST_NAMED = 3


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


def check(found: Analysis, step: Step) -> list[Finding]:
    """What a step should be, and whether it is."""
    return list(_findings(found, step))


def _findings(found: Analysis, step: Step) -> Iterator[Finding]:
    if any(nano.lane is Resource.MEMORY for nano in found.plan.order):
        yield _attention(found)
    pairs = [f"{found.name(a)} and {found.name(b)}" for a, b in found.products_at_once()]
    yield Finding(
        claim="products wait for each other",
        holds=not pairs,
        detail=_some(pairs) or "no two may run at once",
    )
    ctas, nodes = found.most_ctas()
    yield Finding(
        claim=f"what runs at once asks for at most {found.plan.num_sms} SMs",
        holds=ctas <= found.plan.num_sms,
        detail=f"{ctas}: {' and '.join(map(found.name, nodes))}" if nodes else "nothing does",
    )
    wrong = [f"{name} has {count} calls" for name, count in found.split_wrongly().items()]
    yield Finding(
        claim="each product of the plan is one call",
        holds=not wrong,
        detail=_some(wrong) or "none is merged or split",
    )
    memory = found.program.memory
    yield Finding(
        claim="the cache is changed in place",
        holds=memory.alias_bytes >= step.cache_bytes and not found.program.copies,
        detail=f"{memory.alias_bytes} of {step.cache_bytes} bytes aliased, "
        f"{len(found.program.copies)} copies",
    )
    yield Finding(
        claim="no kernel of ours spills registers",
        holds=found.spilled_bytes() == 0,
        detail=f"{found.spilled_bytes()} bytes",
    )


def _attention(found: Analysis) -> Finding:
    """Whether each attention that the compiler tells all about has products beside it."""
    beside = list(found.products_beside_attention())
    last = max((one.attention.layer for one in beside), default=0)
    # Of the last layers the compiler may not have told the products, or there are none after.
    alone = [one for one in beside if not one.products and one.attention.layer < last]
    lines = [
        f"{found.name(one.attention)} beside {_some([found.name(p) for p in one.products])}"
        for one in beside
        if one.products
    ]
    return Finding(
        claim="decode attention may run beside products of the other part",
        holds=bool(lines) and not alone,
        detail=_some([found.name(one.attention) for one in alone]) or _some(lines) or "nowhere",
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def text(
    findings: Sequence[Finding], program: Program, step: Step, prediction: Prediction | str
) -> str:
    """The report."""
    graph = program.order
    kind = "a graph" if program.graphs else "streams"
    lines = [
        f"plan {step.plan.name}, executor {step.executor}, bucket {step.bucket}: {kind} of "
        f"{graph.num_nodes} nodes; of the first {len(graph.nodes)}, {graph.critical_path} wait "
        "for each other"
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
        f"compiled to overlap, not measured; by the datasheet a layer takes "
        f"{prediction.period_s * 1e6:.0f} us, its operations one after another with the same "
        f"shares {prediction.sum_s * 1e6:.0f} us; the longest chain is "
        f"{prediction.critical_fraction:.0%} of the sum over all layers"
    )
