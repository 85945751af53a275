"""Sampling against numpy references, exact distributions, and rows that must not matter."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from sampling_rows import (
    ROWS,
    SAMPLE,
    SIZE,
    check_frequencies,
    draw_many,
    idle_full,
    keys_of,
    make_full,
    make_params,
    pack_bits,
    random_logits,
    reference_probs,
)

from nanoflow_jax.engine import sampling
from nanoflow_jax.engine.sampling import SamplerVariant

PROMPT_LOGPROBS = jax.jit(sampling.prompt_logprobs, static_argnames="num_logprobs")
PROCESS = jax.jit(sampling.process_logits)
SIZES = [5, 300, 1031, 4096]  # 1031 is prime: padded blocks


# Greedy


@pytest.mark.parametrize("size", SIZES)
def test_greedy_takes_the_first_of_the_largest_logits(size):
    x = random_logits(size, (6, size), bits=0)
    samples = SAMPLE(jnp.asarray(x), make_params(6), variant=SamplerVariant.GREEDY)
    np.testing.assert_array_equal(samples.tokens, x.argmax(axis=1))
    assert bool(samples.ok.all())
    assert samples.logprobs is None


def test_bfloat16_logits_are_sampled_in_float32():
    x = jnp.asarray(random_logits(1, (4, 300)), jnp.bfloat16)
    samples = SAMPLE(x, make_params(4), variant=SamplerVariant.GREEDY, num_logprobs=3)
    np.testing.assert_array_equal(samples.tokens, np.asarray(x, np.float32).argmax(axis=1))
    assert samples.logprobs.token.dtype == jnp.float32


@pytest.mark.parametrize("variant", [SamplerVariant.FILTERED, SamplerVariant.FULL])
def test_rows_of_temperature_zero_are_greedy_among_drawn_rows(variant):
    x = random_logits(2, (ROWS, SIZE), spread=1.0)
    params = make_params(ROWS, temperature=np.arange(ROWS) % 2, top_p=0.99, top_k=100)
    samples = SAMPLE(jnp.asarray(x), params, *idle_full(), variant=variant)
    np.testing.assert_array_equal(np.asarray(samples.tokens)[::2], x.argmax(axis=1)[::2])


def test_full_takes_the_largest_processed_logit_at_temperature_zero():
    x = jnp.asarray(random_logits(3, (ROWS, SIZE)))
    full, table = idle_full()
    full = dataclasses.replace(
        full,
        bias_ids=full.bias_ids.at[:, 0].set(jnp.arange(ROWS)),
        bias_values=full.bias_values.at[:, 0].set(50.0),
    )
    params = make_params(ROWS, temperature=0.0)
    samples = SAMPLE(x, params, full, table, variant=SamplerVariant.FULL)
    assert samples.tokens.tolist() == list(range(ROWS))


def test_frequencies_follow_processed_logits():
    size, num_draws = 50, 2048
    x = random_logits(12, size, spread=1.0)
    prompt, output = [1, 2, 3], [3, 4, 4, 5, 5, 5]
    table = sampling.reset_slot(
        sampling.empty_table(2, size), jnp.int32(1), jnp.asarray(prompt), jnp.asarray(output)
    )
    ones = np.ones(num_draws)
    full = make_full(
        num_draws,
        size,
        2,
        presence=0.5 * ones,
        frequency=0.3 * ones,
        repetition=1.4 * ones,
        count_slot=1 * ones,
        bias_ids=np.tile([7, 8, 50], (num_draws, 1)),
        bias_values=np.tile([2.0, -np.inf, 9.0], (num_draws, 1)),
    )
    params = make_params(num_draws, temperature=0.9, top_k=30)
    rows = jnp.asarray(np.broadcast_to(x, (num_draws, size)))
    tokens = np.asarray(SAMPLE(rows, params, full, table, variant=SamplerVariant.FULL).tokens)
    y = reference_processed(
        x, {7: 2.0, 8: -np.inf}, prompt, output, presence=0.5, frequency=0.3, repetition=1.4
    )
    check_frequencies(tokens, reference_probs(y, temperature=0.9, top_k=30))


def test_tiny_temperature_takes_the_largest_logit():
    x = random_logits(13, (ROWS, SIZE), spread=100.0)
    for temperature in (1e-5, 1e-30, 1e-38):
        params = make_params(ROWS, temperature=temperature)
        samples = SAMPLE(jnp.asarray(x), params, variant=SamplerVariant.FILTERED)
        np.testing.assert_array_equal(samples.tokens, x.argmax(axis=1))
        assert bool(samples.ok.all())


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_tiny_top_p_takes_the_largest_logit(top_p):
    x = random_logits(14, (ROWS, SIZE), spread=0.1)
    params = make_params(ROWS, top_p=top_p)
    samples = SAMPLE(jnp.asarray(x), params, variant=SamplerVariant.FILTERED)
    np.testing.assert_array_equal(samples.tokens, x.argmax(axis=1))


def test_top_k_of_the_vocabulary_or_more_is_off():
    x = jnp.asarray(random_logits(15, (ROWS, SIZE)))
    off = SAMPLE(x, make_params(ROWS), variant=SamplerVariant.FILTERED).tokens
    for top_k in (300, 301, 2**31 - 1):
        params = make_params(ROWS, top_k=top_k)
        np.testing.assert_array_equal(
            SAMPLE(x, params, variant=SamplerVariant.FILTERED).tokens, off
        )


# Seeds and batches


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    rng = np.random.default_rng(16)
    num_rows, size = 32, 2000
    x = random_logits(16, (num_rows, size), spread=1.5)
    x[5, 3] = np.nan
    params = make_params(
        num_rows,
        temperature=rng.choice([0.0, 0.7, 1.0, 3.0], num_rows),
        top_k=rng.choice([0, 0, 20, 500], num_rows),
        top_p=rng.choice([1.0, 0.9, 0.5], num_rows),
        min_p=rng.choice([0.0, 0.1], num_rows),
        seed=rng.integers(0, 2**32, num_rows),
        position=rng.integers(0, 1000, num_rows),
    )
    run = lambda x, p: SAMPLE(jnp.asarray(x), p, variant=SamplerVariant.FILTERED)  # noqa: E731
    alone = np.asarray(run(x, params).tokens)
    order = rng.permutation(num_rows)
    shuffled = run(x[order], jax.tree.map(lambda a: a[order], params))
    np.testing.assert_array_equal(shuffled.tokens, alone[order])
    for row in range(0, num_rows, 5):  # among rows that are greedy, and all NaN
        idle = dataclasses.replace(params, temperature=jnp.zeros_like(params.temperature))
        mine = jax.tree.map(lambda a, b, row=row: a.at[row].set(b[row]), idle, params)
        others = np.full_like(x, np.nan)
        others[row] = x[row]
        assert int(run(others, mine).tokens[row]) == alone[row]


def test_positions_and_seeds_are_independent():
    seeds, positions = np.meshgrid(np.arange(100), np.arange(100), indexing="ij")
    keys = keys_of(seeds.ravel(), positions.ravel())
    uniform = np.asarray(jax.vmap(jax.random.uniform)(keys)).reshape(100, 100)
    assert scipy.stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-4
    cells = np.floor(uniform * 4).astype(int)
    for one, other in ((cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])):
        joint = np.bincount((one * 4 + other).ravel(), minlength=16)
        assert scipy.stats.chisquare(joint).pvalue > 1e-4


def test_the_same_seed_and_position_draw_the_same_token():
    x, seeds = np.zeros(200), np.arange(4096)
    first = draw_many(x, 1, seed=seeds, first_position=7)
    np.testing.assert_array_equal(draw_many(x, 1, seed=seeds, first_position=7), first)
    assert (draw_many(x, 1, seed=seeds, first_position=8) != first).mean() > 0.9
    assert (draw_many(x, 1, seed=seeds + 2**31, first_position=7) != first).mean() > 0.9


# Rows that cannot be served


@pytest.mark.parametrize("variant", list(SamplerVariant))
def test_a_broken_row_fails_alone(variant):
    x = random_logits(17, (ROWS, SIZE), spread=1.0)
    params = make_params(ROWS, temperature=np.arange(ROWS) != 3, top_p=0.97, top_k=200)
    clean = np.asarray(SAMPLE(jnp.asarray(x), params, *idle_full(), variant=variant).tokens)
    x[1, 44] = np.nan
    x[2] = -np.inf
    x[3] = np.nan
    x[4, 2] = np.inf
    samples = SAMPLE(jnp.asarray(x), params, *idle_full(), variant=variant)
    ok = np.isin(np.arange(ROWS), [1, 2, 3, 4], invert=True)
    np.testing.assert_array_equal(samples.ok, ok)
    np.testing.assert_array_equal(samples.tokens, np.where(ok, clean, 0))


def test_one_nan_in_a_padded_row_is_found():
    x = random_logits(23, (4, 1031))
    x[2, 1030] = np.nan
    samples = SAMPLE(jnp.asarray(x), make_params(4), variant=SamplerVariant.GREEDY)
    assert samples.ok.tolist() == [True, True, False, True]


def test_minus_infinity_among_the_logits_is_a_ban():
    x = random_logits(18, (ROWS, SIZE))
    x[:, ::2] = -np.inf
    params = make_params(ROWS, temperature=50.0)
    samples = SAMPLE(jnp.asarray(x), params, variant=SamplerVariant.FILTERED)
    assert bool(samples.ok.all())
    assert (np.asarray(samples.tokens) % 2 == 1).all()


def test_a_row_whose_every_token_is_banned_fails_alone():
    x = jnp.asarray(random_logits(19, (ROWS, SIZE)))
    full, table = idle_full()
    allowed = np.zeros(full.allowed.shape, np.int32)
    allowed[1] = pack_bits([299], SIZE)
    has_allowed = jnp.arange(ROWS) < 2
    full = dataclasses.replace(full, allowed=jnp.asarray(allowed), has_allowed=has_allowed)
    samples = SAMPLE(x, make_params(ROWS), full, table, variant=SamplerVariant.FULL)
    assert samples.ok.tolist() == [False] + [True] * (ROWS - 1)
    assert samples.tokens.tolist()[:2] == [0, 299]


def test_full_without_its_parameters_is_refused():
    x, params = jnp.zeros((1, 4)), make_params(1)
    with pytest.raises(ValueError, match=r"FULL needs full and table, got full=None"):
        sampling.sample(x, params, variant=SamplerVariant.FULL)
    with pytest.raises(ValueError, match=r"table=None; pass both or use SamplerVariant.FILTERED"):
        sampling.sample(x, params, make_full(1, 4, 1), variant=SamplerVariant.FULL)


# Processing


def reference_processed(x, bias, prompt, output, *, presence, frequency, repetition):
    y = np.array(x, np.float32)
    for token, value in bias.items():
        y[token] += np.float32(value)
    for token in set(prompt) | set(output):
        y[token] = y[token] / repetition if y[token] > 0 else y[token] * repetition
    for token in set(output):
        y[token] -= frequency * output.count(token) + presence
    return y


@hypothesis.given(seed=st.integers(0, 2**31))
def test_processing_follows_the_reference(seed):
    rng = np.random.default_rng(seed)
    num_rows, size, capacity = 5, 70, 3
    x = random_logits(seed, (num_rows, size))
    table = sampling.empty_table(capacity, size)
    slots = [2, 3, 0, 3, 1]  # 3 is the capacity: no penalties
    texts = {}
    for slot in range(capacity):
        prompt, output = rng.integers(0, size, 10), rng.integers(0, size, 20)
        prompt[7:], output[int(rng.integers(0, 20)) :] = size, size
        table = jax.jit(sampling.reset_slot)(
            table, jnp.int32(slot), jnp.asarray(prompt), jnp.asarray(output)
        )
        texts[slot] = [[t for t in ids.tolist() if t < size] for ids in (prompt, output)]
    values = {
        name: rng.uniform(low, high, num_rows).astype(np.float32)
        for name, low, high in (
            ("presence", -2, 2),
            ("frequency", -2, 2),
            ("repetition", 0.5, 2),
        )
    }
    bias_ids = np.stack([rng.permutation(size)[:3] for _ in range(num_rows)])
    bias_ids[1] = size
    bias_values = rng.choice([-100.0, 3.5, -np.inf], (num_rows, 3))
    has_allowed = rng.random(num_rows) < 0.5
    allowed = [rng.permutation(size)[:9] for _ in range(num_rows)]
    full = make_full(
        num_rows,
        size,
        capacity,
        count_slot=slots,
        bias_ids=bias_ids,
        bias_values=bias_values,
        allowed=np.stack([pack_bits(ids, size) for ids in allowed]),
        has_allowed=has_allowed,
        **values,
    )
    found = np.asarray(PROCESS(jnp.asarray(x), full, table))
    for row, slot in enumerate(slots):
        start = x[row].copy()
        if has_allowed[row]:
            start[~np.isin(np.arange(size), allowed[row])] = -np.inf
        bias = {
            t: v for t, v in zip(bias_ids[row].tolist(), bias_values[row], strict=True) if t < size
        }
        prompt, output = texts.get(slot, ([], []))
        mine = {name: float(per_row[row]) for name, per_row in values.items()}
        expected = reference_processed(start, bias, prompt, output, **mine)
        np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)


def test_penalties_by_hand():
    x = jnp.asarray([[4.0, -4.0, 4.0, -4.0, 4.0]])
    table = sampling.reset_slot(
        sampling.empty_table(1, 5), jnp.int32(0), jnp.asarray([0, 1]), jnp.asarray([2, 3, 3])
    )
    full = make_full(1, 5, 1, count_slot=[0], repetition=[2.0], frequency=[0.25], presence=[1.0])
    found = PROCESS(x, full, table)
    assert found.tolist() == [[2.0, -8.0, 0.75, -9.5, 4.0]]


def test_unused_processing_changes_nothing():
    x = jnp.asarray(random_logits(20, (4, 100)))
    found = PROCESS(x, make_full(4, 100, 2), sampling.empty_table(2, 100))
    np.testing.assert_array_equal(found, x)


def test_counts_grow_only_for_rows_that_use_them():
    table = sampling.empty_table(2, 6)
    table = sampling.reset_slot(table, jnp.int32(0), jnp.asarray([1, 6]), jnp.asarray([5, 5, 6]))
    for tokens in ([3, 4, 2], [3, 4, 1]):
        table = jax.jit(sampling.count)(table, jnp.asarray([1, 2, 0]), jnp.asarray(tokens))
    assert table.output_counts.tolist() == [[0, 1, 1, 0, 0, 2], [0, 0, 0, 2, 0, 0]]
    assert table.prompt_seen.tolist() == [[False, True] + [False] * 4, [False] * 6]
    table = sampling.reset_slot(table, jnp.int32(0), jnp.asarray([2, 6]), jnp.asarray([6, 6]))
    assert table.output_counts[0].tolist() == [0] * 6
    assert table.prompt_seen[0].tolist() == [False, False, True, False, False, False]
    assert table.output_counts[1].tolist() == [0, 0, 0, 2, 0, 0]


# Logprobs


def check_logprobs(found, x, tokens, num_logprobs):
    x = np.asarray(x, np.float64)
    logprobs = x - scipy.special.logsumexp(x, axis=1, keepdims=True)
    own = np.take_along_axis(logprobs, np.asarray(tokens)[:, None], axis=1)
    np.testing.assert_allclose(found.token, own[:, 0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.rank, 1 + (logprobs > own).sum(axis=1))
    order = np.argsort(-x, axis=1, kind="stable")[:, :num_logprobs]
    np.testing.assert_array_equal(found.top_ids, order)
    expected = np.take_along_axis(logprobs, order, axis=1)
    np.testing.assert_allclose(found.top_values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", [None, 1])
def test_prompt_logprobs_are_a_log_softmax(size, bits):
    x = random_logits(size, (7, size), bits=bits)
    targets = np.random.default_rng(size).integers(0, size, 7)
    found = PROMPT_LOGPROBS(jnp.asarray(x), jnp.asarray(targets), num_logprobs=20)
    check_logprobs(found, x, targets, min(20, size))


def test_logprobs_are_those_of_the_raw_logits():
    x = random_logits(21, (ROWS, SIZE))
    full, table = idle_full()
    full = dataclasses.replace(
        full,
        bias_ids=full.bias_ids.at[:, 0].set(jnp.arange(ROWS)),
        bias_values=full.bias_values.at[:, 0].set(50.0),
    )
    params = make_params(ROWS, temperature=0.3, top_k=4)
    samples = SAMPLE(
        jnp.asarray(x), params, full, table, variant=SamplerVariant.FULL, num_logprobs=20
    )
    assert samples.tokens.tolist() == list(range(ROWS))
    check_logprobs(samples.logprobs, x, samples.tokens, 20)


def test_logprobs_survive_large_logits_and_bans():
    x = random_logits(22, (3, 300), spread=1.0) + 1e4
    x[:, :100] = -np.inf
    found = PROMPT_LOGPROBS(jnp.asarray(x), jnp.asarray([0, 100, 200]), num_logprobs=5)
    assert found.token[0] == -np.inf
    assert found.rank[0] == 201
    check_logprobs(jax.tree.map(lambda a: a[1:], found), x[1:], [100, 200], 5)


@pytest.mark.gpu
def test_a_gpu_draws_each_row_by_itself_and_fails_broken_ones_alone():
    test_a_row_draws_the_same_whatever_else_is_in_the_batch()
    for variant in SamplerVariant:
        test_a_broken_row_fails_alone(variant)
