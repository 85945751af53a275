"""What makes the last bits of a request depend on its batch, and what `--batch_invariant` does.

Numbers are added in an order, and another order rounds otherwise. Of all that decides it, the
following depends on what else is in a batch:

- the bucket: XLA multiplies another number of rows by other kernels. There is one bucket, and the
  nano-operations of an operation all have as many rows (`one_bucket`, `check_plans`);
- where contexts are cut, to keep SMs equally busy: decode attention cuts after every
  `DECODE_SPLIT_LEN` tokens, and keys of chunks are not cut (`fixed_split`);
- which way a token takes: what is left of a chunk may become a decode row, and what a preempted
  request had generated comes back in chunks. Tokens of prompts always run in chunks and others as
  decode rows (`scheduler.Limits.fixed_ways`);
- in which order devices add, where that depends on a row's place: they add in their own order
  (`collectives.Group.adds_in_order`);
- what XLA rounds: it may leave out that a number is rounded to bfloat16 and widened again, in one
  part of a plan and not in the other. Where a plan cuts, it must not (`compiler_options`);
- which sampler a step runs: where one row needs more, all get it. Whatever is not greedy is drawn
  by one program (`SAMPLERS`).

What is left is that a program computes all rows of an array alike, wherever they lie. It holds for
our kernels, which sum each output in one order, and was seen of XLA's on a CPU; `bench invariance`
looks whether it holds where it runs.

Source: "Defeating nondeterminism in LLM inference" (Thinking Machines Lab, 2025).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanoflow_jax.engine import attention_inputs
from nanoflow_jax.engine.sampling import SamplerVariant
from nanoflow_jax.nanobatch import dealing
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.scheduler.buckets import Bucket

# Two pages or four tiles: 256 requests of 1024 tokens are 124 tiles for each worker of an H200, so
# that loads differ by 3 %.
DECODE_SPLIT_LEN = 256
SAMPLERS = (SamplerVariant.GREEDY, SamplerVariant.FULL)


def one_bucket(found: Sequence[Bucket], *, asked: str) -> tuple[Bucket, ...]:
    """The bucket that every step takes.

    Args:
        found: Buckets as they would be without the setting.
        asked: The knob that they come from; empty where nobody has chosen them.

    Raises:
        ValueError: Several were asked for.
    """
    if asked and len(found) > 1:
        raise ValueError(
            f"--batch_invariant runs every step in one bucket, and --buckets={asked} has "
            f"{len(found)}: products of other numbers of rows have other bits; leave {max(found)}"
        )
    return (max(found),)


def check_plans(plans: Mapping[Bucket, Plan]) -> None:
    """Refuses plans in which a token's bits depend on the part of the batch that it falls into.

    Raises:
        ValueError: Nano-operations of one operation have other numbers of tokens or decode rows.
    """
    for bucket, plan in plans.items():
        for name, places in plan.by_operation.items():
            sizes = {plan.order[place].tokens.length for place in places}
            if len(sizes) > 1:
                _refuse(plan, f"cuts {name} into parts of {_listed(sizes)} tokens", "alike")
        rows = {cell.decode_rows for cell in _cells(bucket, plan)}
        if len(rows) > 1:
            _refuse(
                plan,
                f"deals {bucket.decode_rows} decode rows into parts of {_listed(rows)}",
                "equally, and make --max_requests a multiple of its parts",
            )


def _refuse(plan: Plan, what: str, how: str) -> None:
    raise ValueError(
        f"--batch_invariant: plan {plan.name!r} {what}, and a token's bits would depend on its "
        f"part; split {how}"
    )


def _listed(sizes: set[int]) -> str:
    return " and ".join(map(str, sorted(sizes)))


def _cells(bucket: Bucket, plan: Plan) -> Sequence[dealing.Cell]:
    return dealing.Dealer(
        plan.cells,
        plan.decode_weights,
        decode_rows=bucket.decode_rows,
        prefill_rows=bucket.prefill_rows,
    ).cells


def compiler_options(plans: Iterable[Plan]) -> Mapping[str, Any]:
    """What XLA is told beside, for each forward program."""
    is_cut = any(len(plan.cells) > 1 for plan in plans)
    return {"xla_allow_excess_precision": False} if is_cut else {}


def fixed_split(*, num_tokens: int, context_len: int) -> attention_inputs.FixedSplit:
    """Where contexts are cut.

    Args:
        num_tokens: Most that are cached at once.
        context_len: Most of one request.
    """
    return attention_inputs.FixedSplit(
        split_len=DECODE_SPLIT_LEN, num_tokens=num_tokens, context_len=context_len
    )
