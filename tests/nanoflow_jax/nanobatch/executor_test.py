"""Any legal plan computes what the plain pass computes, with operations in whole numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import random_plans
from hypothesis import given

from nanoflow_jax.nanobatch import builders, executor
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.operations import (
    DECODED,
    PREFILLED,
    LayerShape,
    Resource,
    layer_graph,
)

_PRIME = 10007
_REQUEST_LEN = 5


class _Numbers:
    """Operations on one number a token; every third token decodes, the others are of chunks.

    A token of a chunk adds up what is cached of its request at and before it, and so sees whether
    the appends that it needs have run. The cache begins as zeros.
    """

    def __init__(self, plan):
        self._cells = plan.cells
        self.calls = []

    def __call__(self, call, *reads):
        self.calls.append(call)
        return getattr(self, call.operation)(call, *reads)

    @staticmethod
    def _mix(factor, *values):
        return sum((factor + i) * value for i, value in enumerate(values, 1)) % _PRIME

    def norm_kqv(self, call, x):
        return x, self._mix(3, x), self._mix(4, x)

    def rope(self, call, qkv):
        position = np.arange(*call.tokens)
        return self._mix(5, qkv[0], position), self._mix(6, qkv[1], position)

    def append(self, call, qkv, rotated, cache):
        cache = cache.copy()
        cache[slice(*call.tokens)] = self._mix(7, rotated[1], qkv[2])
        return cache

    def _decode_tokens(self, tokens):
        """Of each cell."""
        cells = [cell for cell in self._cells if cell.overlaps(tokens)]
        return [np.asarray([t for t in range(*cell) if t % 3 == 2], int) for cell in cells]

    def decode_attention(self, call, rotated, cache):
        return tuple(
            self._mix(8, rotated[0][own - call.tokens.start], cache[own]) if len(own) else None
            for own in self._decode_tokens(call.tokens)
        )

    def prefill_attention(self, call, rotated, cache):
        token = np.arange(len(cache))
        query = np.arange(*call.tokens)
        is_seen = (token <= query[:, None]) & (
            token // _REQUEST_LEN == query[:, None] // _REQUEST_LEN
        )
        return self._mix(9, rotated[0], np.where(is_seen, cache, 0).sum(1))

    def _joined(self, call, decoded, prefilled):
        joined = prefilled.copy()
        for rows, own in zip(decoded, self._decode_tokens(call.tokens), strict=True):
            if rows is not None:
                joined[own - call.tokens.start] = rows
        return joined

    def o(self, call, *reads):
        *x, decoded, prefilled = reads
        partial = self._mix(10, self._joined(call, decoded, prefilled))
        return self.o_reduce(call, *x, partial) if x else partial

    def o_reduce(self, call, x, partial):
        return self._mix(20, x, partial)

    def attention_gather(self, call, decoded, prefilled):
        return self._joined(call, decoded, prefilled)

    def o_columns(self, call, heads):
        return self._mix(10, heads)

    def norm(self, call, middle):
        return self._mix(11, middle)

    def route(self, call, normed):
        order = np.argsort(normed % 3)
        return {"rows": normed[order], "order": order, "count": 2}

    def up_gate(self, call, normed):
        if isinstance(normed, dict):
            assert normed["count"] == 2, "what is no array comes through a barrier as it is"
            return normed | {"rows": self._mix(12, normed["rows"])}
        return self._mix(12, normed)

    def down(self, call, *reads):
        *middle, hidden = reads
        if isinstance(hidden, dict):
            hidden = hidden["rows"][np.argsort(hidden["order"])]
        partial = self.down_columns(call, hidden)
        return self.down_reduce(call, *middle, partial) if middle else partial

    def down_columns(self, call, hidden):
        return self._mix(13, hidden)

    def down_reduce(self, call, middle, partial):
        return self._mix(14, middle, partial)

    def hidden_gather(self, call, hidden):
        return hidden

    o_gather, down_gather = o_reduce, down_reduce


class _Together:
    """Every attention and product is a kernel; groups run in the wrong order."""

    def __init__(self):
        self.groups = []

    def work(self, operation, tokens):
        is_attention = operation.writes in (DECODED, PREFILLED)
        return float(tokens.length) if operation.has_weights or is_attention else None

    def run(self, members, run_operation):
        self.groups.append([member.call for member in members])
        written = [run_operation(member.call, *member.reads) for member in reversed(members)]
        return written[::-1]


def _run(plan, *, num_layers=3, operations=None, **options):
    x = np.arange(plan.num_tokens) * 17 % _PRIME
    caches = [np.zeros(plan.num_tokens, int) for _ in range(num_layers)]
    operations = operations or _Numbers(plan)
    layers = [plan.graph] * num_layers
    return executor.run(plan, layers, x, caches, operations, **options)


def _check_as_plain(plan, **options):
    plain = builders.one(plan.shape, num_tokens=plan.num_tokens)
    wanted, wanted_caches = _run(plain, operations=_Numbers(plain))
    found, caches = _run(plan, **options)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(caches, wanted_caches)


@given(random_plans.plans())
def test_any_legal_plan_gives_what_the_plain_pass_gives(plan):
    _check_as_plain(plan)


@given(random_plans.plans())
def test_tokens_of_lanes_change_no_result(plan):
    _check_as_plain(plan, keep_lanes=True)


@given(random_plans.plans())
def test_kernels_that_run_as_one_change_no_result(plan):
    _check_as_plain(plan, together=_Together())


@given(random_plans.plans())
def test_operations_that_are_started_aside_change_no_result(plan):
    def start_aside(operate, reads):
        aside.append(operate.args[0])
        return operate(*reads), [jax.tree.leaves(reads)[0]]

    aside = []
    _check_as_plain(plan, start_aside=start_aside)
    lanes = [plan.order[plan.keys.index(call.key)].lane for call in aside]
    assert all(lane is Resource.MEMORY for lane in lanes)
    assert len(lanes) == 3 * sum(nano.lane is Resource.MEMORY for nano in plan.order)


def test_what_is_issued_next_in_another_lane_comes_after_the_start_and_before_the_end():
    plan = builders.halves(LayerShape(), num_tokens=8, device=builders.Device(granule=4))

    def start_aside(operate, reads):
        begun = jnp.exp(reads[1])
        return (jnp.log(reads[0][0]),), [begun]

    names, before = _trace(plan, 2, start_aside=start_aside)
    starts, ends = _places(names, "exp"), _places(names, "log")
    products = _places(names, "sin")
    assert starts[1] in before[products[0]], "up_gate of half A, layer 0, beside decode B"
    assert ends[1] not in before[products[0]]
    assert starts[2] in before[products[1]] and ends[2] not in before[products[1]]
    assert ends[1] in before[products[1]], "which o of half B reads"


def test_kernels_of_one_have_the_plans_shares_and_others_all_sms():
    plan = builders.halves(LayerShape(), num_tokens=8, device=builders.Device(granule=4))
    operations, together = _Numbers(plan), _Together()
    _run(plan, operations=operations, together=together)
    in_groups = [call for group in together.groups for call in group]
    assert len(in_groups) == 12
    assert all(sum(call.num_ctas for call in group) == 132 for group in together.groups)
    alone = [call for call in operations.calls if call not in in_groups]
    assert {call.num_ctas for call in alone} == {132}
    assert all(call.token is None for call in operations.calls)


def test_what_runs_alone_leaves_the_sms_of_collectives():
    shape = LayerShape(num_devices=4)
    plan = builders.tensor_parallel(shape, num_tokens=8, device=builders.Device(granule=1))
    operations, together = _Numbers(plan), _Together()
    _run(plan, operations=operations, together=together)
    in_groups = [call for group in together.groups for call in group]
    assert in_groups
    assert {call.num_ctas for call in operations.calls if call not in in_groups} == {132 - 16}


def test_an_append_that_is_left_out_is_seen_by_this_test():
    class NoAppend(_Numbers):
        def append(self, call, qkv, rotated, cache):
            return cache if call.tokens.start else super().append(call, qkv, rotated, cache)

    plan = builders.halves(LayerShape(), num_tokens=12, device=builders.Device(granule=3))
    found, _ = _run(plan, operations=NoAppend(plan))
    assert not np.array_equal(found, _run(plan)[0])


class _Marked:
    """Operations that can be told apart in a traced program: up_gate is a sine, an append a cosine,
    attention of chunks a tangent."""

    def __call__(self, call, *reads):
        return getattr(self, call.operation)(*reads)

    def norm_kqv(self, x):
        return x, x

    def rope(self, qkv):
        return qkv

    def append(self, qkv, rotated, cache):
        return cache + jnp.cos(qkv[0]).sum()

    def decode_attention(self, rotated, cache):
        return (None,)

    def prefill_attention(self, rotated, cache):
        return jnp.tan(rotated[0] + cache)

    def o(self, x, decoded, prefilled):
        return x + prefilled

    def norm(self, middle):
        return 2 * middle

    def up_gate(self, normed):
        return jnp.sin(normed)

    def down(self, middle, hidden):
        return middle + hidden


def _trace(plan, num_layers, **options):
    """The equations of a traced run, each as its primitive's name and the equations before it."""

    def run(x):
        layers, caches = [plan.graph] * num_layers, [jnp.float32(0)] * num_layers
        return executor.run(plan, layers, x, caches, _Marked(), **options)

    jaxpr = jax.make_jaxpr(run)(jnp.zeros(plan.num_tokens)).jaxpr
    made_by, before, names = {}, [], []
    for i, equation in enumerate(jaxpr.eqns):
        read = [v for v in equation.invars if not hasattr(v, "val")]  # no literals
        direct = {made_by[v] for v in read if v in made_by}
        before.append(direct.union(*(before[first] for first in direct)))
        names.append(equation.primitive.name)
        made_by |= dict.fromkeys(equation.outvars, i)
    return names, before


def _places(names, name):
    return [i for i, other in enumerate(names) if other == name]


def test_the_plain_pass_has_no_barrier_and_cuts_and_joins_nothing():
    names, _ = _trace(builders.one(LayerShape(), num_tokens=8), 2)
    assert len(_places(names, "sin")) == len(_places(names, "tan")) == 2
    assert not {"optimization_barrier", "concatenate", "slice"} & set(names)


def test_products_of_one_weight_are_kept_apart_and_appends_behind_attention():
    plan = builders.halves(LayerShape(), num_tokens=8, device=builders.Device(granule=4))
    names, before = _trace(plan, 1)
    first, second = _places(names, "sin")
    assert first in before[second]
    (early, late), attention = _places(names, "cos"), _places(names, "tan")[0]
    assert early in before[attention]
    assert attention in before[late]


@given(random_plans.plans())
def test_calls_follow_the_order_of_issue_and_carry_caps_and_tokens_of_the_plan(plan):
    operations = _Numbers(plan)
    _run(plan, operations=operations, keep_lanes=True)
    graph = Dependencies(plan, [plan.graph] * 3)
    for call, node in zip(operations.calls, graph.nodes, strict=True):
        nano = plan.order[node.place]
        assert (call.layer, call.key) == (node.layer, plan.keys[node.place])
        assert (call.operation, call.tokens) == (nano.operation, nano.tokens)
        assert call.num_ctas == nano.num_ctas
        before = {plan.order[first.place].operation for first in graph.waits_for(node)}
        # Decode attention without rows makes nothing to read: what it waited for is passed on.
        if node not in graph.token_edges and "decode_attention" not in before:
            assert call.token is None


def test_without_lanes_no_token_is_passed():
    plan = builders.halves(LayerShape(), num_tokens=8, device=builders.Device(granule=4))
    for keep_lanes in (False, True):
        operations = _Numbers(plan)
        _run(plan, operations=operations, keep_lanes=keep_lanes)
        with_token = {call.key for call in operations.calls if call.token is not None}
        assert bool(with_token) == keep_lanes
    lanes = {key: plan.order[plan.keys.index(key)].lane for key in with_token}
    assert set(lanes.values()) == {Resource.COMPUTE, Resource.MEMORY}


def test_a_lane_goes_on_behind_attention_that_had_nothing_to_do():
    class NoDecode(_Numbers):
        def _decode_tokens(self, tokens):
            return [own[:0] for own in super()._decode_tokens(tokens)]

    plan = builders.halves(LayerShape(), num_tokens=8, device=builders.Device(granule=4))
    operations = NoDecode(plan)
    _run(plan, operations=operations, keep_lanes=True)
    decode = [c for c in operations.calls if c.operation == "decode_attention"]
    assert all(call.token is None for call in decode), "nothing was made that one could wait for"
    products = [c.key for c in operations.calls if c.token is not None]
    assert "o.0" in products


def test_what_reads_nothing_from_idle_attention_waits_for_what_that_waited_for():
    written = {}

    class NoDecode(_Numbers):
        def __call__(self, call, *reads):
            written[call.key] = super().__call__(call, *reads)
            return written[call.key]

        def _decode_tokens(self, tokens):
            return [own[:0] for own in super()._decode_tokens(tokens)]

    halves = builders.halves(LayerShape(), num_tokens=8, device=builders.Device(granule=4))
    by_key = dict(zip(halves.keys, halves.order, strict=True))
    order = [
        dataclasses.replace(by_key[f"{name}.{half}"], lane=None, num_ctas=None, shift=0)
        for half in (0, 1)
        for name in halves.graph.by_name
    ]
    late = order.index(next(n for n in order[9:] if n.operation == "decode_attention"))
    order[late] = dataclasses.replace(order[late], after=("up_gate.0",))
    operations = NoDecode(halves)
    plan = dataclasses.replace(halves, order=tuple(order))
    _run(plan, num_layers=1, operations=operations, keep_lanes=True)
    (call,) = (c for c in operations.calls if c.key == "o.1")
    assert call.token is written["up_gate.0"]


def test_products_keep_their_lane_around_idle_attention_to_prompts():
    written = {}

    class NoPrompts(_Numbers):
        def __call__(self, call, *reads):
            found = super().__call__(call, *reads)
            written[call.layer, call.key] = found
            return found

        def _decode_tokens(self, tokens):
            return [np.arange(*cell) for cell in self._cells if cell.overlaps(tokens)]

        def prefill_attention(self, call, rotated, cache):
            return None

        def _joined(self, call, decoded, prefilled):
            return np.concatenate(decoded)

    plan = builders.halves(LayerShape(), num_tokens=8, device=builders.Device(granule=4))
    operations = NoPrompts(plan)
    _run(plan, num_layers=2, operations=operations, keep_lanes=True)
    tokens = {(call.layer, call.key): call.token for call in operations.calls}
    # Prompts' attention of the half before stands between the two in their lane.
    assert tokens[0, "norm_kqv.0"] is None
    assert tokens[0, "norm_kqv.1"] is written[0, "norm_kqv.0"][0]
    assert written[1, "norm_kqv.1"][0][0] in np.asarray(tokens[1, "o.0"])  # among others


def test_layers_of_two_kinds_run_in_one_plan():
    shape = LayerShape(is_sparse=True)
    plan = builders.halves(shape, num_tokens=12, device=builders.Device(granule=3))
    layers = [layer_graph(LayerShape()), layer_graph(shape)]
    x, caches = np.arange(12), [np.zeros(12, int)] * 2
    operations = _Numbers(plan)
    found, _ = executor.run(plan, layers, x, caches, operations)
    plain = builders.one(shape, num_tokens=12)
    wanted, _ = executor.run(plain, layers, x, caches, _Numbers(plain))
    np.testing.assert_array_equal(found, wanted)
    assert {call.layer for call in operations.calls if call.operation == "route"} == {1}
