"""Filters and races against searches by sorting, and exact distributions."""

import dataclasses
import re

import deviceless
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_rows import (
    ROWS,
    SAMPLE,
    SIZE,
    check_frequencies,
    draw_many,
    keys_of,
    make_params,
    random_logits,
    reference_probs,
)

from nanoflow_jax.engine import filters
from nanoflow_jax.engine.sampling import SamplerVariant

SEARCH = jax.jit(filters.search)
_floors = jax.jit(filters._floors, static_argnames="find")


def test_a_race_never_takes_what_cannot_be_drawn():
    y = np.full((4096, 20), -np.inf, np.float32)
    y[:, 7], y[::2, 3] = -103.0, 0.0
    ids = np.broadcast_to(np.arange(20, dtype=np.int32), y.shape)
    won = np.asarray(jax.jit(filters._race)(jnp.asarray(y), keys_of(range(4096)), jnp.asarray(ids)))
    assert (won[1::2] == 7).all()
    assert (won[::2] == 3).all()


def test_races_are_won_in_proportion_whichever_random_numbers_they_take():
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    y = jnp.asarray(np.broadcast_to(np.log(weights), (4096, 4)), jnp.float32)
    for first in (0, 1_000_000):
        ids = jnp.broadcast_to(first + jnp.arange(4, dtype=jnp.int32)[None], (4096, 4))
        check_frequencies(jax.jit(filters._race)(y, keys_of(range(4096)), ids), weights)


@pytest.mark.parametrize("limit", [{}, {"top_p": 0.9}, {"top_k": 500}, {"min_p": 0.01}])
def test_rounding_of_the_logits_does_not_change_what_is_drawn(limit):
    # A hundred times what rounding does: drawing from the running sum would change a dozen rows.
    x = random_logits(30, (2048, 4096), spread=1.5)
    shaken = x * (1 + np.random.default_rng(31).uniform(-3e-5, 3e-5, x.shape)).astype(np.float32)
    assert (shaken != x).mean() > 0.5
    params = make_params(2048, **limit)
    drawn = [
        np.asarray(SAMPLE(jnp.asarray(one), params, variant=SamplerVariant.FILTERED).tokens)
        for one in (x, shaken)
    ]
    assert (drawn[0] != drawn[1]).sum() <= 1


def test_images_order_as_floats_do_and_come_back():
    y = jnp.asarray([-np.inf, -104.0, -1.0, -1e-30, -0.0, 0.0, 1e-30, 7.0, np.inf], jnp.float32)
    image = np.asarray(filters._image_of(y))
    assert (np.diff(image) > 0).all()
    np.testing.assert_array_equal(filters._float_of(jnp.asarray(image)), y)


def make_filters(x, *, min_p, top_k, top_p, scale):
    num_rows = x.shape[0]
    full = lambda value: jnp.full((num_rows,), value, jnp.float32)  # noqa: E731
    return filters.Filters(
        peak=jnp.asarray(x.max(axis=1)),
        scale=full(scale),
        floor=full(max(np.log(min_p) if min_p else -np.inf, filters.FADED)),
        top_k=jnp.full((num_rows,), top_k, jnp.int32),
        top_p=full(top_p),
    )


@hypothesis.given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([None, 0, 2, 6]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 40.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05]),
    top_k=st.integers(0, 299),
    top_p=st.floats(0.0625, 1.0, width=32),
    scale=st.sampled_from([0.3, 1.0, 2.0]),
)
def test_search_keeps_exactly_what_top_k_and_top_p_ask(
    seed, bits, spread, min_p, top_k, top_p, scale
):
    x = random_logits(seed, (6, 300), spread=spread, bits=bits)
    wanted = np.array([True, True, False, True, True, True])
    given = make_filters(x, min_p=min_p, top_k=top_k, top_p=top_p, scale=scale)
    floors = np.asarray(SEARCH(jnp.asarray(x), given, jnp.asarray(wanted)).floor)
    assert floors[2] == given.floor[2]
    for row in np.flatnonzero(wanted):
        y = (x[row] - x[row].max()) / np.float32(scale)
        w = np.where(y >= np.float32(given.floor[row]), np.exp(y.astype(np.float64)), 0.0)
        if top_k:
            w[y < np.sort(y)[-top_k]] = 0.0
        kept = y >= floors[row]
        assert (w[kept] > 0).all()
        goal, mass = min(top_p, 1.0) * w.sum(), w[kept].sum()
        if top_p == 1:
            assert kept.sum() == (w > 0).sum()
        assert mass >= goal * (1 - 1e-5)
        lowest = kept & (y == y[kept].min())
        assert top_p == 1 or mass - w[lowest].sum() < goal * (1 + 1e-5)


def _kept(x, given, find):
    floors = np.asarray(_floors(x, given, find))
    y = np.asarray(given.scaled(x))
    return y >= floors[:, None]


@hypothesis.given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([None, 0, 2, 6]),
    spread=st.sampled_from([0.01, 1.0, 4.0, 40.0]),
    min_p=st.sampled_from([0.0, 1e-4, 0.05]),
    top_k=st.sampled_from([0, 1, 2, 63, 150, 298, 299]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-9]),
    scale=st.sampled_from([1e-6, 0.3, 1.0, 2.0, 1e9]),
    num_banned=st.sampled_from([0, 1, 150, 299]),
)
def test_gpus_keep_what_cpus_keep(seed, bits, spread, min_p, top_k, top_p, scale, num_banned):
    x = random_logits(seed, (6, 300), spread=spread, bits=bits)
    x[:, np.random.default_rng(seed).permutation(300)[:num_banned]] = -np.inf
    given = make_filters(x, min_p=min_p, top_k=top_k, top_p=top_p, scale=scale)
    x = jnp.asarray(x)
    wanted = _kept(x, given, filters._bisect)
    np.testing.assert_array_equal(_kept(x, given, filters._divide), wanted)
    assert wanted.any(axis=1).all()


def test_a_floor_between_any_two_neighbours_is_found_by_dividing():
    y = -np.sort(np.random.default_rng(4).uniform(0, 104, (1, 300)).astype(np.float32))
    y[0, :5] = [0.0, -2e-38, -1e-30, -1e-8, -104.0]
    y = np.sort(y)[:, ::-1].copy()
    rows = np.arange(1, 301, dtype=np.int32)
    given = dataclasses.replace(
        make_filters(np.repeat(y, 300, axis=0), min_p=0.0, top_k=1, top_p=1.0, scale=1.0),
        top_k=jnp.asarray(rows),
    )
    floors = _floors(jnp.asarray(np.repeat(y, 300, axis=0)), given, filters._divide)
    np.testing.assert_array_equal(floors, y[0])


@pytest.mark.timeout(120)
def test_a_gpu_searches_a_few_rows_at_a_time_and_is_not_asked_whether_to_go_on():
    num_rows, size = 256, 128_256
    rows = jax.ShapeDtypeStruct((num_rows,), jnp.float32)
    counts = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    program = deviceless.program(
        filters.search,
        jax.ShapeDtypeStruct((num_rows, size), jnp.float32),
        filters.Filters(peak=rows, scale=rows, floor=rows, top_k=counts, top_p=rows),
        jax.ShapeDtypeStruct((num_rows,), jnp.bool_),
        # Graphs inside of branches inside of loops cannot be told apart in what XLA logs.
        options={"xla_gpu_enable_command_buffer": ""},
    )
    text = program.hlo
    assert text.count('"known_trip_count":{"n":"10"}') == 2
    # Eight sums of a group's rows, cut into blocks, come of one kernel that reads the rows once.
    sums = ", ".join(["f32[32,1002]{1,0}"] * 8)
    assert re.sub(r"/\*.*?\*/", "", text).count(f"({sums}) fusion(") == 2
    assert program.memory.temp_bytes < 2 * 32 * size * 4


@pytest.mark.parametrize("find", [filters._bisect, filters._divide])
@pytest.mark.parametrize("group", [1, 2, 4, 5])
def test_rows_searched_together_do_not_change_their_floors(group, find):
    x = random_logits(3, (5, 300), spread=1.0)
    given = make_filters(x, min_p=0.0, top_k=150, top_p=0.8, scale=1.0)
    wanted = jnp.asarray([True, False, True, True, True])
    one = filters._search_in_groups(jnp.asarray(x), given, wanted, group=1, find=find)
    many = filters._search_in_groups(jnp.asarray(x), given, wanted, group=group, find=find)
    np.testing.assert_array_equal(many, one)


@hypothesis.given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([None, 1, 5]),
    spread=st.sampled_from([0.5, 3.0, 10.0]),
)
def test_drawn_tokens_pass_their_filters(seed, bits, spread):
    rng = np.random.default_rng(seed)
    num_rows = ROWS
    x = random_logits(seed, (ROWS, SIZE), spread=spread, bits=bits)
    fields = {
        "temperature": rng.choice([0.5, 1.0, 1.7], num_rows),
        "min_p": rng.choice([0.0, 0.01, 0.3], num_rows),
        "top_k": rng.choice([0, 1, 5, 63, 64, 65, 200, 299, 300, 1000], num_rows),
        "top_p": rng.choice([1.0, 0.999, 0.9, 0.3, 1e-9], num_rows),
    }
    params = make_params(num_rows, seed=rng.integers(0, 2**32, num_rows), **fields)
    samples = SAMPLE(jnp.asarray(x), params, variant=SamplerVariant.FILTERED)
    assert bool(samples.ok.all())
    for row, token in enumerate(np.asarray(samples.tokens)):
        mine = {name: values[row] for name, values in fields.items()}
        # Borders met by rounding alone: a slightly looser filter must keep the token.
        mine["top_p"] = min(mine["top_p"] * (1 + 1e-5), 1.0)
        mine["min_p"] *= 1 - 1e-5
        assert reference_probs(x[row], **mine)[token] > 0


def test_ties_at_the_floor_all_stay():
    x = np.full(200, -5.0)
    x[10:15] = 2.0
    check_frequencies(draw_many(x, 1, top_k=3), reference_probs(x, top_k=5))
    check_frequencies(draw_many(x, 1, top_p=0.1), reference_probs(x, top_k=5))
    flat = np.zeros(200)
    for limit in ({"top_k": 10}, {"top_k": 80}, {"top_p": 0.1}, {"min_p": 0.5}):
        check_frequencies(draw_many(flat, 1, **limit), np.full(200, 1 / 200))


CASES = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 5.0},
    "huge temperature": {"temperature": 1e9},
    "top_k in the head": {"top_k": 7},
    "top_k beyond the head": {"top_k": 100, "temperature": 3.0},
    "top_p in the head": {"top_p": 0.6},
    "top_p beyond the head": {"top_p": 0.93, "temperature": 6.0},
    "min_p": {"min_p": 0.03},
    "min_p beyond the head": {"min_p": 0.3, "temperature": 9.0},
    "all": {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
    "all beyond the head": {"temperature": 8.0, "top_k": 150, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_follow_the_exact_distribution(case):
    x = random_logits(11, 200, spread=2.0)
    check_frequencies(draw_many(x, 5, **CASES[case]), reference_probs(x, **CASES[case]))


@pytest.mark.gpu
def test_a_gpu_draws_what_the_filters_keep_and_in_proportion():
    for case in CASES:
        test_frequencies_follow_the_exact_distribution(case)
