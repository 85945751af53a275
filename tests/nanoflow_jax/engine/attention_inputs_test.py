"""What the host plans for attention kernels, at both ends of a step's vector."""

import numpy as np
import pytest

from nanoflow_jax.engine import attention_inputs, packing
from nanoflow_jax.kv_cache.tiles import Chunk
from nanoflow_jax.scheduler.buckets import Bucket
from pallas_kernels import prefill_tiles, work_list
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.prefill_attention import prefill_attention

_BUCKET = Bucket(tokens=48, decode_rows=8, prefill_rows=3)
_LENS = np.asarray([300, 1, 0, 77, 0, 0, 0, 0], np.int32)
_CHUNKS = [
    Chunk(start=3, length=20, position=2000, row=1),
    Chunk(start=23, length=9, position=0, row=0),
]


def _form(**changes):
    fields = {"num_kv_heads": 2, "group": 4, "windows": (None, 100), "num_ctas": 6}
    return attention_inputs.KernelForm(**{**fields, **changes})


def _decode(**changes):
    return attention_inputs.KernelDecodeInputs(form=_form(**changes), attend=decode_attention)


def _prefill(*, cuts_keys=True, **changes):
    return attention_inputs.KernelPrefillInputs(
        form=_form(**changes), attend=prefill_attention, cuts_keys=cuts_keys
    )


def _through_the_vector(inputs, *planned):
    """What the program reads of what the host wrote, or of a vector that nobody wrote to."""
    pack = packing.Packing(inputs.fields(_BUCKET))
    vector, views = pack.new()
    if planned:
        inputs.write(views, *planned)
    return inputs.read(pack.unpack(vector))


def _check_same(found, wanted):
    for name, one, other in zip(wanted._fields, found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(one), other, err_msg=name)


@pytest.mark.parametrize("planned", [(_LENS,), ()], ids=["a step", "no step"])
def test_each_window_has_a_plan_of_decode_work(planned):
    found = _through_the_vector(_decode(), *planned).works
    assert list(found) == [None, 100]
    for window, work in found.items():
        lens = planned[0] if planned else np.zeros(_BUCKET.decode_rows, np.int32)
        _check_same(work, work_list.plan_decode(lens, num_kv_heads=2, num_ctas=6, window=window))


@pytest.mark.parametrize("planned", [(_CHUNKS,), ()], ids=["a step", "no step"])
def test_each_window_has_a_plan_of_prefill_items(planned):
    found = _through_the_vector(_prefill(), *planned).tiles
    assert list(found) == [None, 100]
    split = prefill_tiles.KeySplit(num_kv_heads=2, num_ctas=6, max_parts=4)
    capacity = 4 + prefill_tiles.max_tiles(_BUCKET.tokens, _BUCKET.prefill_rows, group=4)
    for window, items in found.items():
        wanted = prefill_tiles.build_prefill_tiles(
            planned[0] if planned else (),
            group=4,
            capacity=capacity,
            num_tokens=_BUCKET.tokens,
            window=window,
            split=split,
        )
        _check_same(items, wanted)
    if planned:
        assert np.asarray(found[None].cuts)[:, 1].max() == 3  # 2020 keys for six CTAs
        assert np.asarray(found[100].cuts)[:, 1].max() == 1


def test_with_a_fixed_split_decode_is_cut_by_length_alone_and_keys_of_chunks_are_not():
    fixed = attention_inputs.FixedSplit(split_len=128, num_tokens=1000, context_len=400)
    work = _through_the_vector(_decode(fixed_split=fixed), _LENS).works[None]
    wanted = work_list.plan_decode(
        _LENS,
        num_kv_heads=2,
        num_ctas=6,
        split_len=128,
        max_parts=work_list.most_parts(
            num_requests=8, num_tokens=1000, context_len=400, num_kv_heads=2, split_len=128
        ),
    )
    _check_same(work, wanted)
    items = _through_the_vector(_prefill(fixed_split=fixed), _CHUNKS).tiles[None]
    assert np.asarray(items.cuts)[:, 1].max() == 1
    assert items.groups.shape == (0, 2)


def test_keys_are_cut_only_where_whole_tiles_leave_ctas_idle():
    # Tiles of 32 tokens: one whole one in the bucket, for each of two kv heads.
    for num_ctas, num_parts in ((2, 0), (3, 2)):
        fields = _prefill(num_ctas=num_ctas).fields(_BUCKET)
        assert fields["prefill_items_0_group_items"].shape == (num_parts // 2,)


@pytest.mark.parametrize("planned", [(_CHUNKS,), ()], ids=["a step", "no step"])
def test_a_kernel_that_merges_nothing_gets_whole_tiles_whatever_is_idle(planned):
    found = _through_the_vector(_prefill(cuts_keys=False, num_ctas=132), *planned).tiles
    wanted = prefill_tiles.build_prefill_tiles(
        planned[0] if planned else (),
        group=4,
        capacity=prefill_tiles.max_tiles(_BUCKET.tokens, _BUCKET.prefill_rows, group=4),
        num_tokens=_BUCKET.tokens,
    )
    _check_same(found[None], wanted)
    assert wanted.groups.size == 0
