"""Token rows of one length, handed out by grain in a seeded order that can be resumed."""

import random
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32


def pack(documents: Sequence[Sequence[int]], *, context_len: int) -> Int32[np.ndarray, "B C1"]:
    """Joins documents into one stream and cuts it into rows.

    Row i is tokens [i * C, i * C + C + 1): neighbours share one token, which is the last
    target of one and the first input of the next. What fills no row is dropped.

    Args:
        documents: Token ids, one entry per document.
        context_len: Tokens a row predicts: C.

    Raises:
        ValueError: There are not enough tokens for one row.
    """
    stream = np.asarray([token for document in documents for token in document], np.int32)
    count = (len(stream) - 1) // context_len
    if count < 1:
        raise ValueError(
            f"{len(stream)} tokens of text do not fill one row of --shape_context_len="
            f"{context_len}: read more text or shorten the rows"
        )
    starts = np.arange(count)[:, None] * context_len
    return stream[starts + np.arange(context_len + 1)[None, :]]


def mixed(first: Sequence[Any], second: Sequence[Any], *, seed: int) -> list[Any]:
    """Both lists in one seeded order, so that a row holds documents of either kind."""
    joined = [*first, *second]
    random.Random(seed).shuffle(joined)
    return joined


class RowSource:
    """Random access to packed rows, as grain wants it."""

    def __init__(self, packed: Int32[np.ndarray, "B C1"]) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed)

    def __getitem__(self, index: Any) -> Int32[np.ndarray, "C1"]:
        return self._packed[index]

    def __repr__(self) -> str:
        return f"RowSource{self._packed.shape}"


def batches(source: RowSource, *, batch_rows: int, seed: int) -> grain.DatasetIterator:
    """Batches without end; every pass over the rows has its own seeded order.

    Raises:
        ValueError: The source has fewer rows than one batch.
    """
    if len(source) < batch_rows:
        raise ValueError(
            f"--train_batch_rows={batch_rows}, but the text fills only {len(source)} rows"
        )
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    dataset = dataset.batch(batch_rows, drop_remainder=True)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
