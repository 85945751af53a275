"""How the programs of one bucket run a plan: what lies where, and what each attention needs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from nanoflow_jax.engine import attention_inputs, packing
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.kv_cache import tiles
from nanoflow_jax.models import paged_attention
from nanoflow_jax.nanobatch import dealing
from nanoflow_jax.nanobatch.plan import NanoOperation, Plan, TokenRange
from nanoflow_jax.scheduler import buckets


class BucketPlan:
    """A bucket, its plan, and both ends of what the plan's attentions need from the host.

    Invariant: bucket and plan are of the same number of tokens.
    """

    def __init__(
        self, bucket: buckets.Bucket, plan: Plan, attention: attention_inputs.AttentionInputs
    ) -> None:
        """Finds what every cell can hold.

        Raises:
            ValueError: The plan is for another number of tokens.
        """
        if plan.num_tokens != bucket.tokens:
            raise ValueError(
                f"plan {plan.name!r} is for {plan.num_tokens} tokens and bucket {bucket} has "
                f"{bucket.tokens}; add a bucket of the plan's size to --buckets"
            )
        self.bucket, self.plan = bucket, plan
        self.dealer = dealing.Dealer(
            plan.cells,
            plan.decode_weights,
            decode_rows=bucket.decode_rows,
            prefill_rows=bucket.prefill_rows,
        )
        self._decode = tuple(self._decode_parts(attention.decode))
        self._prefill = tuple(self._prefill_parts(attention.prefill))

    def fields(self) -> attention_inputs.Fields:
        """What lies in the vector of the bucket's forward for attention."""
        found: attention_inputs.Fields = {}
        for decode in self._decode:
            count = decode.rows.length
            some = buckets.Bucket(tokens=count, decode_rows=count, prefill_rows=0)
            found |= _prefixed(decode.key, decode.inputs.fields(some))
        for prefill in self._prefill:
            some = buckets.Bucket(
                tokens=prefill.tokens.length, decode_rows=0, prefill_rows=prefill.most_pieces
            )
            found |= _prefixed(prefill.key, prefill.inputs.fields(some))
        return found

    def write(self, views: attention_inputs.Views, pieces: Sequence[tiles.Chunk]) -> None:
        """Plans attention of a step.

        Args:
            views: The step's vector, in which lengths of decode rows are written.
            pieces: Of all chunks.
        """
        for decode in self._decode:
            decode.inputs.write(_Part(views, decode.key), views["decode_lens"][slice(*decode.rows)])
        for prefill in self._prefill:
            start, stop = prefill.tokens
            here = [p._replace(start=p.start - start) for p in pieces if start <= p.start < stop]
            prefill.inputs.write(_Part(views, prefill.key), here)

    def read(
        self, arrays: Mapping[str, Array], layout: layout_lib.KvLayout
    ) -> paged_attention.PagedAttention:
        """Attention of the plan, in a program."""
        return paged_attention.PagedAttention(
            layout=layout,
            batch=paged_attention.PagedBatch(
                cells=self.dealer.cells,
                pages=arrays["pages"],
                offsets=arrays["offsets"],
                decode_pages=arrays["decode_pages"],
                decode_lens=arrays["decode_lens"],
                prefill_pages=arrays.get("prefill_pages"),
            ),
            decode={part.key: part.inputs.read(_Part(arrays, part.key)) for part in self._decode},
            prefill={part.key: part.inputs.read(_Part(arrays, part.key)) for part in self._prefill},
        )

    def _cells_of(self, operation: str) -> Iterator[tuple[str, NanoOperation, list[dealing.Cell]]]:
        for place in self.plan.by_operation[operation]:
            nano = self.plan.order[place]
            cells = [cell for cell in self.dealer.cells if cell.tokens.overlaps(nano.tokens)]
            yield self.plan.keys[place], nano, cells

    def _decode_parts(self, inputs: attention_inputs.DecodeInputs) -> Iterator["_Decode"]:
        for key, nano, cells in self._cells_of("decode_attention"):
            rows = TokenRange(cells[0].first_decode_row, cells[-1].end_decode_row)
            if rows.length:
                yield _Decode(key, rows, inputs.capped(nano.num_ctas))

    def _prefill_parts(self, inputs: attention_inputs.PrefillInputs) -> Iterator["_Prefill"]:
        if not self.bucket.prefill_rows:
            return
        for key, nano, cells in self._cells_of("prefill_attention"):
            # A chunk is cut where a cell ends.
            most = min(self.bucket.prefill_rows + len(cells) - 1, nano.tokens.length)
            yield _Prefill(key, nano.tokens, most, inputs)


class _Decode(NamedTuple):
    """A nano-operation of decode attention."""

    key: str
    rows: TokenRange  # of the table of decode rows
    inputs: attention_inputs.DecodeInputs


class _Prefill(NamedTuple):
    """A nano-operation of prefill attention."""

    key: str
    tokens: TokenRange
    most_pieces: int
    inputs: attention_inputs.PrefillInputs


def _prefixed(key: str, fields: attention_inputs.Fields) -> dict[str, packing.Field]:
    return {f"{key}/{name}": field for name, field in fields.items()}


class _Part(Mapping[str, Any]):
    """The fields of one nano-operation among those of all."""

    def __init__(self, whole: Mapping[str, Any], key: str) -> None:
        self._whole, self._prefix = whole, f"{key}/"

    def __getitem__(self, name: str) -> Any:
        return self._whole[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        start = len(self._prefix)
        return (name[start:] for name in self._whole if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
