"""Rows of logits for tests of the sampler, and exact distributions to hold draws against."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
import scipy.stats

from nanoflow_jax.engine import sampling
from nanoflow_jax.engine.sampling import SamplerVariant

SAMPLE = jax.jit(sampling.sample, static_argnames=("variant", "num_logprobs"))
ROWS, SIZE = 64, 300  # shared by most tests, so that few programs are compiled


def make_params(num_rows, **fields):
    """Row parameters, each given as one value for all rows or as one per row; off by default."""
    defaults = {
        "temperature": (1.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "seed": (np.arange(num_rows), np.uint32),
        "position": (0, np.int32),
    }
    return sampling.RowParams(
        **{
            name: jnp.asarray(np.broadcast_to(np.asarray(fields.get(name, value), dtype), num_rows))
            for name, (value, dtype) in defaults.items()
        }
    )


def make_full(num_rows, vocab_size, capacity, **fields):
    """Full parameters that do nothing unless given."""
    words = -(-vocab_size // 32)
    defaults = {
        "presence": (np.zeros(num_rows), np.float32),
        "frequency": (np.zeros(num_rows), np.float32),
        "repetition": (np.ones(num_rows), np.float32),
        "count_slot": (np.full(num_rows, capacity), np.int32),
        "bias_ids": (np.full((num_rows, 3), vocab_size), np.int32),
        "bias_values": (np.zeros((num_rows, 3)), np.float32),
        "allowed": (np.zeros((num_rows, words)), np.int32),
        "has_allowed": (np.zeros(num_rows), np.bool_),
    }
    return sampling.FullParams(
        **{
            name: jnp.asarray(fields.get(name, value), dtype)
            for name, (value, dtype) in defaults.items()
        }
    )


def idle_full():
    """Full parameters and a table of four slots, with which FULL does what FILTERED does."""
    return make_full(ROWS, SIZE, 4), sampling.empty_table(4, SIZE)


def keys_of(seeds, positions=0):
    """The randomness of rows with these seeds and positions."""
    seeds = jnp.asarray(np.asarray(seeds), jnp.uint32)
    return jax.jit(sampling._keys)(seeds, jnp.broadcast_to(jnp.asarray(positions), seeds.shape))


def pack_bits(allowed_ids, vocab_size):
    """llguidance's layout: bit i % 32 of word i // 32."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(allowed_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4")


def reference_probs(x, temperature=1.0, min_p=0.0, top_k=0, top_p=1.0):
    """Exact distribution of one row, in float64 and with a sort."""
    y = (np.asarray(x, np.float64) - np.max(x)) / temperature
    w = np.exp(y)
    w[w < min_p] = 0.0
    if 0 < top_k < len(w):
        w[w < np.sort(w)[-top_k]] = 0.0
    if top_p < 1:
        order = np.argsort(-w, kind="stable")
        before = np.cumsum(w[order]) - w[order]
        last = order[before < top_p * w.sum()][-1]
        w[w < w[last]] = 0.0
    return w / w.sum()


def check_frequencies(tokens, probs):
    """Chi-square of the tokens' counts; tokens expected fewer than 5 times are pooled."""
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0
    expected = probs * len(tokens)
    common = expected >= 5
    observed, wanted = counts[common], expected[common]
    if expected[~common].sum() >= 1:
        observed = np.append(observed, counts[~common].sum())
        wanted = np.append(wanted, expected[~common].sum())
    wanted = wanted * observed.sum() / wanted.sum()
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-4


def draw_many(x, num_batches, *, first_position=0, **fields):
    """Tokens of one logit row of 200, 4096 seeds at each of so many positions."""
    x = jnp.asarray(np.broadcast_to(np.asarray(x, np.float32), (4096, 200)))
    tokens = []
    for position in range(first_position, first_position + num_batches):
        params = make_params(4096, position=position, **fields)
        samples = SAMPLE(x, params, variant=SamplerVariant.FILTERED)
        assert bool(samples.ok.all())
        tokens.append(np.asarray(samples.tokens))
    return np.concatenate(tokens)


def random_logits(seed, shape, *, spread=3.0, bits=None):
    """Normal logits; with `bits`, rounded to so many fractional bits, so that many tie."""
    x = np.random.default_rng(seed).normal(size=shape) * spread
    return (x if bits is None else np.round(x * 2**bits) / 2**bits).astype(np.float32)
