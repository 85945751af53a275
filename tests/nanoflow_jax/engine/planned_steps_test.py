"""Steps of real requests through the forward of any plan give the plain pass's logits."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import random_plans
from engine_runs import ask
from flax import nnx
from golden import cases
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from plain_model import PlainModel, load_whole
from same_tokens import MIN_MARGIN

from checkpoints.folder import ModelFolder
from nanoflow_jax import compat
from nanoflow_jax.engine import (
    attention_inputs,
    bucket_plan,
    inputs,
    plan_choice,
    programs,
    sequence,
)
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.kv_cache import pages
from nanoflow_jax.models import loading
from nanoflow_jax.models.operations import PLAIN
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.scheduler import scheduler
from nanoflow_jax.scheduler.buckets import Bucket

_CONTEXT, _PAGE, _NUM_PAGES = 24, 4, 40
_BUCKET = Bucket(tokens=24, decode_rows=10, prefill_rows=4)
# Products of other numbers of rows sum in another order. A token's states differ by up to 3e-6 of
# the largest of them (gemma2, whose states reach 94), its logits by 2e-5.
_OF_LARGEST, _OF_LOGITS = 1e-5, 1e-4
_MORE_CASES = ("llama3", "qwen2_window")
_CASES = ("gemma2", "qwen3_moe", *(pytest.param(c, marks=pytest.mark.slow) for c in _MORE_CASES))


@functools.cache
def _model(case):
    return PlainModel(cases.load(case).path, length=_CONTEXT).model


def _place(case, plan, num_devices):
    """The devices, on which weights lie as the plan wants them."""
    config = _model(case).config
    columns = plan_choice.by_columns([] if plan is None else [plan])
    placement = loading.place_model(config, jax.devices()[:num_devices])
    return placement.with_columns(columns, hidden_size=config.hidden_size)


def _placed_model(case, placement):
    if placement.num_devices == 1:
        return _model(case)
    folder, config = ModelFolder.open(cases.load(case).path), _model(case).config
    return load_whole(folder, config, dtype=np.dtype(np.float32), placement=placement)


@dataclasses.dataclass
class _Steps:
    """Runs one bucket's forward under a plan.

    Attributes:
        case: Golden case whose model runs.
        plan: How; None is the plain pass.
        keep_lanes: Passes tokens too.
        num_devices: Devices that share the model.
        start_aside: For operations of the memory lane.
    """

    case: str
    plan: object = None
    keep_lanes: bool = False
    num_devices: int = 1
    start_aside: object = None

    def __post_init__(self):
        self._placement = _place(self.case, self.plan, self.num_devices)
        model = _placed_model(self.case, self._placement)
        config = loading.share_of_one_device(model.config, self._placement)
        shape = layout_lib.CacheShape(
            num_pages=_NUM_PAGES,
            page_size=_PAGE,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=np.dtype(np.float32),
        )
        self._layout = layout_lib.TokenMinorLayout(shape=shape)
        self._sizes = programs.Sizes(
            max_requests=_BUCKET.decode_rows,
            max_pages=_CONTEXT // _PAGE,
            num_pages=_NUM_PAGES,
            dense_batch=_BUCKET.tokens,
            vocab_size=config.vocab_size,
            penalty_requests=1,
            attention=attention_inputs.AttentionInputs(
                decode=attention_inputs.PlainDecodeInputs(layout=self._layout),
                prefill=attention_inputs.PlainPrefillInputs(layout=self._layout, tile_len=4),
            ),
            plans={} if self.plan is None else {_BUCKET: self.plan},
            num_devices=self.num_devices,
        )
        graph, state = nnx.split(model)
        self._weights, treedef = jax.tree.flatten(state)
        forward = programs.build_forward(
            graph,
            treedef,
            layout=self._layout,
            sizes=self._sizes,
            bucket=_BUCKET,
            operations=dataclasses.replace(PLAIN, start_aside=self.start_aside),
            shares=programs.Shares(
                placement=self._placement,
                caches=[jax.tree.map(self._placement.spec, self._layout.axes)] * len(model.layers),
                weights=[
                    getattr(weight.sharding, "spec", PartitionSpec()) for weight in self._weights
                ],
            ),
            keep_lanes=self.keep_lanes,
        )
        self._forward = jax.jit(forward)
        self._builder = inputs.InputBuilder(self._sizes, page_size=_PAGE, max_context_len=_CONTEXT)

    def run(self, steps, sequences):
        """Logits of the rows of each step that sample, and hidden states of its tokens in order."""
        share = jax.eval_shape(self._layout.allocate)
        caches = [
            jax.tree.map(self._placement.zeros, share, self._layout.axes)
            for _ in _model(self.case).layers
        ]
        last_tokens = np.zeros(_BUCKET.decode_rows, np.int32)
        planned = self._sizes.bucket_plan(_BUCKET)
        found = []
        for step in steps:
            vector = self._builder.build(step, sequences).vector
            result = self._forward(caches, last_tokens, self._weights, vector)
            caches = result.caches
            count = sum(row.samples for row in step.rows)
            placed = planned.dealer.place(len(step.decode), [r.length for r in step.chunks])
            tokens = [placed.decode_tokens]
            tokens += [placed.chunk_tokens(i) for i in range(len(step.chunks))]
            hidden = np.asarray(result.hidden)[np.concatenate(tokens)]
            found.append((np.asarray(result.logits)[:count], hidden))
        return found


def _plan_steps(prompt_lens, limits):
    """Steps of some requests from beginning to end."""
    rows = scheduler.Limits(
        max_requests=_BUCKET.decode_rows,
        dense_batch=_BUCKET.tokens,
        page_size=_PAGE,
        penalty_requests=1,
    )
    planner = scheduler.Scheduler(rows, [_BUCKET], pages.PageAllocator(_NUM_PAGES))
    for i, (prompt_len, limit) in enumerate(zip(prompt_lens, limits, strict=True)):
        planner.add(
            str(i),
            prompt_len=prompt_len,
            limit=limit,
            priority=0,
            uses_penalties=False,
            ends_at_limit=True,
        )
    steps = []
    while (step := planner.plan()) is not None:
        steps.append(step)
        planner.commit(step)
    return steps


def _sequences(case, limits):
    """All tokens of each request, those that it would have drawn too."""
    vocab_size = _model(case).config.vocab_size
    draw = np.random.default_rng(0)
    return {
        str(i): sequence.make_sequence(
            ask(str(i), draw.integers(0, vocab_size, limit).tolist()),
            vocab_size=vocab_size,
            max_context_len=_CONTEXT + 1,
            eos_ids=(),
        )
        for i, limit in enumerate(limits)
    }


_REQUESTS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=3, max_size=12).map(
    lambda pairs: ([p for p, _ in pairs], [p + more for p, more in pairs])
)


def _check_as_plain(case, plan, requests, **options):
    prompt_lens, limits = requests
    steps = _plan_steps(prompt_lens, limits)
    assert {row.request_id for step in steps for row in step.rows} == set(
        map(str, range(len(limits)))
    )
    sequences = _sequences(case, limits)
    found = _Steps(case, plan, **options).run(steps, sequences)
    for (logits, hidden), (wanted, wanted_hidden) in zip(
        found, _plain(case).run(steps, sequences), strict=True
    ):
        largest = np.abs(wanted_hidden).max(axis=1, keepdims=True)
        np.testing.assert_allclose(
            hidden / largest, wanted_hidden / largest, rtol=0, atol=_OF_LARGEST
        )
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=_OF_LOGITS)
        if len(wanted):
            top = np.sort(wanted, axis=1)
            is_sure = top[:, -1] - top[:, -2] > MIN_MARGIN
            assert (logits.argmax(1) == wanted.argmax(1))[is_sure].all()


@functools.cache
def _plain(case):
    return _Steps(case)


def _random_plans(case):
    shape = LayerShape(is_sparse=case == "qwen3_moe")
    return random_plans.plans(shapes=(shape,), num_tokens=_BUCKET.tokens)


@pytest.mark.parametrize("case", _CASES)
def test_random_plans_give_the_logits_of_the_plain_pass(case):
    @settings(max_examples=2, phases=[Phase.generate])
    @given(plan=_random_plans(case), requests=_REQUESTS)
    def check(plan, requests):
        _check_as_plain(case, plan, requests)

    check()


@pytest.mark.parametrize(
    ("case", "num_devices", "ways"),
    [
        ("llama_bias", 2, {"o": "gather", "down": "reduce"}),
        pytest.param("llama_bias", 2, {"o": "reduce", "down": "gather"}, marks=pytest.mark.slow),
        ("llama_bias", 4, {"o": "gather", "down": "gather"}),
        ("mixtral", 2, {"o": "gather"}),
    ],
)
def test_random_plans_of_sums_and_gathers_give_the_logits_of_one_device(case, num_devices, ways):
    shape = LayerShape(is_sparse=case == "mixtral", num_devices=num_devices)

    @settings(max_examples=2, phases=[Phase.generate])
    @given(
        plan=random_plans.plans(shapes=(shape,), num_tokens=_BUCKET.tokens, ways=ways),
        requests=_REQUESTS,
    )
    def check(plan, requests):
        assert plan.ways == {product: {way} for product, way in ways.items()}
        _check_as_plain(case, plan, requests, num_devices=num_devices)

    check()


_EXECUTORS = {
    "sequential": {},
    "graph": {"keep_lanes": True},
    "streams": {"start_aside": functools.partial(compat.start_on_stream, stream=0)},
}


@pytest.mark.parametrize("executor", _EXECUTORS)
def test_two_halves_give_the_logits_of_the_plain_pass(executor):
    device = builders.Device(granule=4)
    plan = builders.halves(LayerShape(), num_tokens=_BUCKET.tokens, first=8, device=device)
    requests = ([20, 3, 9, 1, 14, 7], [22, 8, 12, 6, 15, 12])
    _check_as_plain("llama3", plan, requests, **_EXECUTORS[executor])


def test_a_chunk_that_goes_on_in_the_other_half_is_cut_where_the_first_ends():
    plan = builders.halves(
        LayerShape(), num_tokens=_BUCKET.tokens, first=8, device=builders.Device(granule=4)
    )
    (step,) = _plan_steps([18], [19])
    attention = _Steps("llama3", plan)._sizes.attention
    placed = bucket_plan.BucketPlan(_BUCKET, plan, attention).dealer.place(0, [step.num_tokens])
    assert [(p.start, p.length, p.offset) for p in placed.pieces] == [(0, 6, 0), (8, 12, 6)]


def test_a_plan_of_another_size_than_its_bucket_is_refused():
    plan = builders.one(LayerShape(), num_tokens=16)
    attention = _plain("llama3")._sizes.attention
    with pytest.raises(ValueError, match="plan 'one' is for 16 tokens and bucket 24:10:4 has 24"):
        bucket_plan.BucketPlan(_BUCKET, plan, attention)
