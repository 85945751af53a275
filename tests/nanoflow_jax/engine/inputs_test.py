import dataclasses

import numpy as np
import pytest
from engine_runs import ask

from nanoflow_jax.engine import attention_inputs, inputs, programs, sequence
from nanoflow_jax.engine.sampling import SamplerVariant
from nanoflow_jax.kv_cache import layout
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.scheduler.buckets import Bucket
from nanoflow_jax.scheduler.scheduler import Row, StepPlan

_LAYOUT = layout.PageMajorLayout(
    shape=layout.CacheShape(
        num_pages=20, page_size=4, num_kv_heads=2, head_dim=64, dtype=np.dtype(np.float32)
    )
)
_ATTENTION = attention_inputs.AttentionInputs(
    decode=attention_inputs.PlainDecodeInputs(layout=_LAYOUT),
    prefill=attention_inputs.PlainPrefillInputs(layout=_LAYOUT, tile_len=4),
)
_SIZES = programs.Sizes(
    max_requests=4,
    max_pages=5,
    num_pages=20,
    dense_batch=16,
    vocab_size=70,
    penalty_requests=2,
    attention=_ATTENTION,
)
_BUCKET = Bucket(tokens=16, decode_rows=4, prefill_rows=3)
_PAGE = 4
_CONTEXT = 20


@pytest.fixture
def builder():
    return inputs.InputBuilder(_SIZES, page_size=_PAGE, max_context_len=_CONTEXT)


def _sequence(prompt, output=(), **params):
    made = sequence.make_sequence(
        ask("x", prompt, **params), vocab_size=70, max_context_len=_CONTEXT, eos_ids=(69,)
    )
    made.token_ids += output
    return made


def _row(name, start, length, slot, pages, *, samples=True, penalty_slot=None):
    return Row(
        request_id=name,
        start=start,
        length=length,
        slot=slot,
        penalty_slot=penalty_slot,
        pages=pages,
        samples=samples,
        is_first=start == 0,
    )


def _views(pack, vector):
    """The arrays of a vector that the host wrote."""
    arrays = pack.unpack(vector)
    return {name: np.asarray(array) for name, array in arrays.items()}


def test_a_step_worked_by_hand(builder):
    plan = StepPlan(
        decode=(_row("old", 5, 1, 3, (7, 2)), _row("new", 3, 1, 0, (4,))),
        chunks=(
            _row("part", 4, 6, 1, (9, 1, 0), samples=False),
            _row("rest", 0, 2, 2, (5,)),
        ),
        bucket=_BUCKET,
    )
    sequences = {
        "old": _sequence([1, 2, 3, 4], output=[11]),  # token 5 is still on the device
        "new": _sequence([1, 2, 3, 21]),  # the last of a prompt, which is on the host
        "part": _sequence(list(range(30, 42))),
        "rest": _sequence([50, 51]),
    }
    step = builder.build(plan, sequences)
    sample = builder.build_sample(plan, sequences)
    assert (step.bucket, step.resets, step.prompt_slices) == (_BUCKET, [], [])
    assert sample.variant is SamplerVariant.GREEDY
    found = _views(programs.forward_packing(_SIZES, _BUCKET), step.vector)
    pad = [0] * 6
    assert found["token_ids"].tolist() == [0, 21, 34, 35, 36, 37, 38, 39, 50, 51, *pad]
    assert found["token_slots"].tolist() == [3, *[4] * 15]
    assert found["positions"].tolist() == [5, 3, 4, 5, 6, 7, 8, 9, 0, 1, *pad]
    assert found["pages"].tolist() == [2, 4, 1, 1, 1, 1, 0, 0, 5, 5, *[20] * 6]
    assert found["offsets"].tolist() == [1, 3, 0, 1, 2, 3, 0, 1, 0, 1, *pad]
    assert found["decode_lens"].tolist() == [6, 4, 0, 0]
    assert found["decode_pages"][:2, :2].tolist() == [[7, 2], [4, 0]]
    assert found["prefill_pages"][:2, :3].tolist() == [[9, 1, 0], [5, 0, 0]]
    # Two decode rows sample, then the chunk that ends its prompt.
    assert found["logit_tokens"].tolist() == [0, 1, 9, 0]
    starts, counts, positions, rows = found["prefill_attention.0/tiles"][:, :4].tolist()
    assert starts == [2, 6, 8, 0]
    assert counts == [4, 2, 2, 0]
    assert positions == [4, 8, 0, 0]
    assert rows == [0, 0, 1, 0]
    slots = _views(
        programs.sample_packing(_SIZES, rows=4, variant=SamplerVariant.GREEDY), sample.vector
    )
    assert slots["slots"].tolist() == [3, 0, 2, 4]


def test_rows_of_a_step_on_two_halves_worked_by_hand():
    halves = builders.halves(LayerShape(), num_tokens=16, device=builders.Device(granule=8))
    sizes = dataclasses.replace(_SIZES, plans={_BUCKET: halves})
    builder = inputs.InputBuilder(sizes, page_size=_PAGE, max_context_len=_CONTEXT)
    plan = StepPlan(
        decode=(
            _row("a", 5, 1, 3, (7, 2)),
            _row("b", 3, 1, 0, (4,)),
            _row("c", 8, 1, 1, (6, 8, 11)),
        ),
        chunks=(_row("part", 4, 9, 2, (9, 1, 0, 3)),),
        bucket=_BUCKET,
    )
    sequences = {
        "a": _sequence([1, 2, 3, 4, 5, 20]),
        "b": _sequence([1, 2, 3, 21]),
        "c": _sequence([1, 2, 3, 4, 5, 6, 7, 8, 22]),
        "part": _sequence(list(range(30, 43)), prompt_logprobs=0),
    }
    step = builder.build(plan, sequences)
    found = _views(programs.forward_packing(sizes, _BUCKET), step.vector)
    # Rows a and c and 4 of 9 chunk tokens go to the first half, the rest to the second.
    first = [20, 22, 34, 35, 36, 37, 0, 0]
    second = [21, 38, 39, 40, 41, 42, 0, 0]
    assert found["token_ids"].tolist() == first + second
    assert found["positions"].tolist() == [5, 8, 4, 5, 6, 7, 0, 0, 3, 8, 9, 10, 11, 12, 0, 0]
    assert found["pages"][[0, 1, 2, 8, 9, 13]].tolist() == [2, 11, 1, 4, 0, 3]
    assert found["decode_lens"].tolist() == [6, 9, 4, 0]
    assert found["decode_pages"][:3, :3].tolist() == [[7, 2, 0], [6, 8, 11], [4, 0, 0]]
    # Logits stay in the order of rows: a, b, c, then the chunk, which ends in the second half.
    assert found["logit_tokens"].tolist() == [0, 8, 1, 13]
    tiles = [found[f"prefill_attention.{half}/tiles"] for half in (0, 1)]
    # Each half counts tokens from its own first; both read row 0 of the chunks' pages.
    assert tiles[0][:, :2].tolist() == [[2, 0], [4, 0], [4, 0], [0, 0]]
    assert tiles[1][:, :3].tolist() == [[1, 5, 0], [4, 1, 0], [8, 12, 0], [0, 0, 0]]
    (part,) = step.prompt_slices
    assert part.vector[: part.count].tolist() == [2, 3, 4, 5, 9, 10, 11, 12]


def _sampled(builder, *sequences_):
    """The sampler's arrays for one decode row per sequence, at its last known token."""
    names = [str(i) for i in range(len(sequences_))]
    plan = StepPlan(
        decode=tuple(
            _row(
                name,
                len(made.token_ids) - 1,
                1,
                i,
                (0,),
                penalty_slot=i if made.params.uses_penalties else None,
            )
            for i, (name, made) in enumerate(zip(names, sequences_, strict=True))
        ),
        chunks=(),
        bucket=Bucket(tokens=4, decode_rows=4, prefill_rows=0),
    )
    step = builder.build_sample(plan, dict(zip(names, sequences_, strict=True)))
    pack = programs.sample_packing(_SIZES, rows=4, variant=step.variant)
    return step, _views(pack, step.vector)


@pytest.mark.parametrize(
    ("params", "variant"),
    [
        ({}, SamplerVariant.GREEDY),
        ({"top_k": 4}, SamplerVariant.GREEDY),
        ({"temperature": 0.5}, SamplerVariant.FILTERED),
        ({"logprobs": 0}, SamplerVariant.FULL),
        ({"logit_bias": {3: 1.0}}, SamplerVariant.FULL),
        ({"allowed_token_ids": (3,)}, SamplerVariant.FULL),
        ({"presence_penalty": 0.5}, SamplerVariant.FULL),
        ({"min_tokens": 1}, SamplerVariant.FULL),
        ({"min_tokens": 1, "ignore_eos": True}, SamplerVariant.GREEDY),
    ],
)
def test_a_step_takes_the_least_sampler_that_serves_its_rows(builder, params, variant):
    step, _ = _sampled(builder, _sequence([1, 2]), _sequence([1, 2], **params))
    assert step.variant is variant


def test_decode_rows_that_sample_nothing_have_no_logits(builder):
    plan = StepPlan(
        decode=(
            _row("again", 5, 1, 3, (7, 2), samples=False),
            _row("new", 3, 1, 0, (4,)),
        ),
        chunks=(_row("rest", 0, 2, 2, (5,)),),
        bucket=_BUCKET,
    )
    sequences = {
        "again": _sequence([1, 2, 3, 4], output=[11, 12, 13]),
        "new": _sequence([1, 2, 3, 21]),
        "rest": _sequence([50, 51]),
    }
    found = _views(programs.forward_packing(_SIZES, _BUCKET), builder.build(plan, sequences).vector)
    assert found["token_ids"].tolist()[:4] == [12, 21, 50, 51]
    assert found["logit_tokens"].tolist() == [1, 3, 0, 0]
    slots = _views(
        programs.sample_packing(_SIZES, rows=4, variant=SamplerVariant.GREEDY),
        builder.build_sample(plan, sequences).vector,
    )
    assert slots["slots"].tolist() == [0, 2, 4, 4]


def test_a_step_takes_the_least_sampler_that_there_is():
    sizes = dataclasses.replace(_SIZES, samplers=(SamplerVariant.GREEDY, SamplerVariant.FULL))
    builder = inputs.InputBuilder(sizes, page_size=_PAGE, max_context_len=_CONTEXT)
    plan = StepPlan(decode=(_row("a", 3, 1, 0, (4,)),), chunks=(), bucket=_BUCKET)
    for params, variant in (
        ({}, SamplerVariant.GREEDY),
        ({"temperature": 1.0}, SamplerVariant.FULL),
        ({"logprobs": 1}, SamplerVariant.FULL),
    ):
        sequences = {"a": _sequence([1, 2, 3, 4], **params)}
        assert builder.build_sample(plan, sequences).variant is variant


def test_bans_end_with_min_tokens(builder):
    params = {"min_tokens": 2, "stop_token_ids": [7]}
    assert _sampled(builder, _sequence([1, 2], output=[5, 5], **params))[0].variant is (
        SamplerVariant.GREEDY
    )
    _, found = _sampled(builder, _sequence([1, 2], output=[5], **params))
    assert found["bias_ids"][0, :3].tolist() == [7, 69, 70]
    assert found["bias_values"][0, :3].tolist() == [-np.inf, -np.inf, 0.0]


def test_each_rows_settings_reach_its_row(builder):
    drawn = _sequence([1, 2, 3], temperature=0.7, top_k=9, top_p=0.5, min_p=0.1, seed=3)
    _, found = _sampled(
        builder,
        drawn,
        _sequence(
            [4, 5],
            logit_bias={6: 2.0},
            allowed_token_ids=(0, 31, 32, 69),
            presence_penalty=0.5,
            frequency_penalty=-0.25,
            repetition_penalty=1.5,
            logprobs=2,
        ),
    )
    np.testing.assert_array_equal(found["temperature"], np.float32([0.7, 0, 0, 0]))
    assert found["top_k"].tolist() == [9, 0, 0, 0]
    assert found["top_p"].tolist() == [0.5, 1, 1, 1]
    np.testing.assert_array_equal(found["min_p"], np.float32([0.1, 0, 0, 0]))
    assert found["seed"][0] == drawn.seed
    assert found["position"].tolist() == [3, 2, 0, 0]
    assert found["presence"].tolist() == [0, 0.5, 0, 0]
    assert found["frequency"].tolist() == [0, -0.25, 0, 0]
    assert found["repetition"].tolist() == [1, 1.5, 1, 1]
    assert found["count_slot"].tolist() == [2, 1, 2, 2]
    assert found["bias_ids"][:, 0].tolist() == [70, 6, 70, 70]
    assert found["bias_values"][1, 0] == 2.0
    assert found["has_allowed"].tolist() == [0, 1, 0, 0]
    assert found["allowed"][1].tolist() == [1 - 2**31, 1, 32]
    assert found["wants_logprobs"] == 1


def test_a_row_whose_request_has_ended_asks_for_nothing(builder):
    rows = [_row("gone", 1, 1, 3, (0,)), _row("left", 1, 1, 2, (1,))]
    bucket = Bucket(tokens=4, decode_rows=4, prefill_rows=0)
    plan = StepPlan(decode=tuple(rows), chunks=(), bucket=bucket)
    left = _sequence([1, 2], temperature=0.5)
    sample = builder.build_sample(plan, {"left": left})
    pack = programs.sample_packing(_SIZES, rows=4, variant=SamplerVariant.FILTERED)
    found = _views(pack, sample.vector)
    assert sample.variant is SamplerVariant.FILTERED
    assert found["slots"].tolist() == [4, 2, 4, 4]
    assert found["temperature"].tolist() == [0, 0.5, 0, 0]
    assert builder.build_sample(plan, {}) is None


def test_the_penalty_row_of_a_new_owner_holds_its_prompt_and_its_output(builder):
    made = _sequence([5, 6, 5], output=[8, 9], frequency_penalty=1.0)
    plan = StepPlan(decode=(), chunks=(_row("a", 0, 5, 0, (1, 2), penalty_slot=1),), bucket=_BUCKET)
    (vector,) = builder.build(plan, {"a": made}).resets
    assert vector[0] == 1
    prompt, output = vector[1:].reshape(2, _CONTEXT)
    assert prompt.tolist() == [5, 6, 5] + [70] * 17
    assert output.tolist() == [8, 9] + [70] * 18


def test_prompt_positions_are_reported_once_and_never_the_last(builder):
    made = _sequence(list(range(40, 52)), prompt_logprobs=1)
    plan = StepPlan(
        decode=(_row("other", 2, 1, 1, (8,)),),
        chunks=(_row("a", 0, 7, 0, (1, 2), samples=False),),
        bucket=_BUCKET,
    )
    sequences = {"a": made, "other": _sequence([1, 2, 3])}
    (part,) = builder.build(plan, sequences).prompt_slices
    places, targets = part.vector.reshape(2, -1)
    assert (part.request_id, part.count) == ("a", 7)
    assert places[:7].tolist() == [1, 2, 3, 4, 5, 6, 7]  # behind the decode row
    assert targets[:7].tolist() == [41, 42, 43, 44, 45, 46, 47]
    # Preempted, it starts over: only what is new is reported, and not the last position.
    again = StepPlan(decode=(), chunks=(_row("a", 0, 12, 0, (1, 2, 3)),), bucket=_BUCKET)
    (part,) = builder.build(again, sequences).prompt_slices
    places, targets = part.vector.reshape(2, -1)
    assert places[: part.count].tolist() == [7, 8, 9, 10]
    assert targets[: part.count].tolist() == [48, 49, 50, 51]
    assert builder.build(again, sequences).prompt_slices == []


def test_long_chunks_are_reported_in_bounded_slices():
    most = programs.PROMPT_LOGPROB_ROWS
    length = 2 * most + 5
    builder = inputs.InputBuilder(_SIZES, page_size=_PAGE, max_context_len=4 * most)
    made = sequence.make_sequence(
        ask("x", [1] * length, prompt_logprobs=0),
        vocab_size=70,
        max_context_len=4 * most,
        eos_ids=(),
    )
    bucket = Bucket(tokens=length, decode_rows=4, prefill_rows=1)
    pages = tuple(range(-(-length // _PAGE)))
    sizes = {"max_pages": len(pages)}
    builder = inputs.InputBuilder(
        programs.Sizes(**{**_SIZES.__dict__, **sizes}), page_size=_PAGE, max_context_len=4 * most
    )
    plan = StepPlan(decode=(), chunks=(_row("a", 0, length, 0, pages),), bucket=bucket)
    slices = builder.build(plan, {"a": made}).prompt_slices
    assert [part.count for part in slices] == [most, most, 4]
