"""Made-up requests against moments and quantiles of the traces themselves."""

import csv
import io

import numpy as np
import pytest

from nanoflow_jax.workload import traces

# Of the traces: mean and deviation of inputs and outputs, then those of requests within the limits.
_MOMENTS = {
    "splitwise": ((1154.70, 1108.79, 211.13, 162.87), (849.94, 575.60, 225.36, 163.59)),
    "lmsys": ((92.20, 163.82, 207.40, 199.66), (91.94, 162.18, 205.49, 193.35)),
    "sharegpt": ((298.80, 1444.28, 323.73, 292.93), (223.50, 481.55, 318.01, 236.95)),
}
# Each twentieth: section 8.2 of what is known of them.
_QUANTILES = {
    "splitwise": (
        "181 207 372 387 396 403 414 703 984 1020 1045 1071 1097 1130 1189 1315 1876 2734 4083",
        "41 54 67 77 85 91 96 103 113 129 151 177 217 384 395 400 411 424 451",
    ),
    "lmsys": (
        "3 6 8 10 12 14 16 19 23 28 33 40 50 66 82 109 179 302 432",
        "8 12 19 28 39 54 71 90 113 140 176 216 257 298 339 384 442 512 520",
    ),
    "sharegpt": (
        "7 9 11 13 16 18 21 25 29 36 45 58 78 106 158 258 448 829 1624",
        "20 39 71 102 130 161 193 224 253 280 308 338 369 404 445 501 573 683 846",
    ),
}


def _moments(made):
    return (
        made.input_lens.mean(),
        made.input_lens.std(),
        made.output_lens.mean(),
        made.output_lens.std(),
    )


@pytest.mark.parametrize("seed", [0, 420])
@pytest.mark.parametrize("name", _MOMENTS)
def test_moments_are_those_of_the_trace_whole_and_within_limits(name, seed):
    whole, limited = _MOMENTS[name]
    made = traces.generate(name, 50_000, seed=seed, limits=traces.NO_LIMITS)
    assert _moments(made) == pytest.approx(whole, rel=0.03)
    made = traces.generate(name, 50_000, seed=seed)
    assert _moments(made) == pytest.approx(limited, rel=0.03)


@pytest.mark.parametrize("name", _QUANTILES)
def test_quantiles_are_those_of_the_trace(name):
    made = traces.generate(name, 50_000, seed=1, limits=traces.NO_LIMITS)
    for lens, printed in zip((made.input_lens, made.output_lens), _QUANTILES[name], strict=True):
        found = np.quantile(lens, np.arange(1, 20) / 20)
        expected = np.array(printed.split(), float)
        # Tokens are whole: half of one is a large part of the shortest.
        np.testing.assert_allclose(found, expected, rtol=0.03, atol=1.0)


@pytest.mark.parametrize(("name", "of_logarithms"), [("lmsys", 0.20), ("sharegpt", 0.10)])
def test_long_prompts_have_longer_outputs_as_far_as_in_the_trace(name, of_logarithms):
    made = traces.generate(name, 50_000, seed=2, limits=traces.NO_LIMITS)
    logs = np.log([made.input_lens, np.maximum(made.output_lens, 1)])
    assert np.corrcoef(logs)[0, 1] == pytest.approx(of_logarithms, abs=0.04)


def test_outputs_of_splitwise_go_with_the_range_of_their_prompt():
    made = traces.generate("splitwise", 400_000, seed=3, limits=traces.NO_LIMITS)
    edges = (0, 32, 128, 512, 1024, 1500, 3072, np.inf)
    means = (143, 93, 111, 321, 364, 93, 72)
    shares = (0.011, 0.017, 0.367, 0.113, 0.321, 0.078, 0.093)
    for low, high, mean, share in zip(edges[:-1], edges[1:], means, shares, strict=True):
        inside = (made.input_lens > low) & (made.input_lens <= high)
        assert inside.mean() == pytest.approx(share, abs=0.001)
        assert made.output_lens[inside].mean() == pytest.approx(mean, rel=0.03)


def test_arrivals_are_at_once_or_with_exponential_gaps():
    assert not traces.generate("lmsys", 10, seed=0).arrivals_s.any()
    made = traces.generate("lmsys", 50_000, seed=0, rate=12.5)
    gaps = np.diff(made.arrivals_s)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 12.5, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 12.5, rel=0.03)


def test_the_same_seed_gives_the_same_requests_and_another_gives_others():
    first, again, other = (traces.generate("sharegpt", 100, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.input_lens, again.input_lens)
    np.testing.assert_array_equal(first.output_lens, again.output_lens)
    assert (first.input_lens != other.input_lens).any()


def test_limits_hold_and_few_requests_are_made_as_well():
    for count in (1, 2, 7, 1000):
        made = traces.generate("splitwise", count, seed=count)
        assert len(made.input_lens) == len(made.output_lens) == len(made.arrivals_s) == count
        assert made.input_lens.min() >= 1
        assert made.input_lens.max() <= 3072
        assert made.output_lens.max() <= 1024
        assert (made.input_lens + made.output_lens).max() <= 4096


def test_constant_lengths_have_a_name_of_their_own():
    made = traces.generate("1024/512", 3, seed=0)
    assert made.input_lens.tolist() == [1024] * 3
    assert made.output_lens.tolist() == [512] * 3


def test_a_file_has_the_columns_of_nanoflows_request_files():
    made = traces.generate("512/2", 2, seed=0, rate=1.0)
    file = io.StringIO()
    traces.write_csv(made, file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert [(row["index"], row["input"], row["output"]) for row in rows] == [
        ("0", "512", "2"),
        ("1", "512", "2"),
    ]
    assert float(rows[1]["arrival"]) == pytest.approx(made.arrivals_s[1], abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "chat"}, "trace 'chat' is neither one of splitwise, lmsys, sharegpt nor"),
        ({"name": "512/0"}, "trace '512/0' is neither one of"),
        ({"num_requests": 0}, "0 requests cannot be made; ask for at least 1"),
        ({"rate": 0.0}, "a rate of 0 requests/s brings none; give a positive one"),
        (
            {"limits": traces.Limits(input_len=1, output_len=1)},
            "hardly any request of lmsys is within",
        ),
    ],
)
def test_what_cannot_be_made_is_a_message(arguments, message):
    with pytest.raises(ValueError, match=message):
        traces.generate(**{"name": "lmsys", "num_requests": 10, "seed": 0, **arguments})
