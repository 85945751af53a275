import pytest
import split_choices

from nanoflow_jax.split.planning import segments
from nanoflow_jax.split.planning.segments import Timed

_MODEL = split_choices.model(hidden_size=64)
_LENS = (16, 64, 256)


def _timed(start, stop, length, *, layer=(2e-4, 3e-6, 4e-9), step=(1e-4, 2e-7), ends=True):
    """A range whose embedding takes 20 us + 0.1 us P and whose head takes 50 us."""
    m, p = stop - start, length
    prefill_s = m * (layer[0] + layer[1] * p + layer[2] * p**2)
    step_s = m * (step[0] + step[1] * p)
    if ends and start == 0:
        prefill_s += 2e-5 + 1e-7 * p
        step_s += 3e-5
    if ends and stop == 6:
        prefill_s += 5e-5
        step_s += 6e-5
    return Timed(
        start=start, stop=stop, prompt_len=p, prefill_s=prefill_s, context_len=p, step_s=step_s
    )


def test_ranges_of_layers_give_the_times_of_their_nodes():
    spans = ((0, 2), (0, 6), (2, 4), (2, 6))
    found = segments.fit_nodes(_MODEL, [_timed(*span, p) for span in spans for p in _LENS])
    times = found.times
    assert times["embedding"].prefill_s == pytest.approx((2e-5, 1e-7, 0))
    assert times["embedding"].decode_s == pytest.approx((3e-5, 0))
    assert times["head"].prefill_s == pytest.approx((5e-5, 0, 0))
    assert times["head"].decode_s == pytest.approx((6e-5, 0))
    both = zip(times["attention"].prefill_s, times["mlp"].prefill_s, strict=True)
    assert [a + b for a, b in both] == pytest.approx([2e-4, 3e-6, 4e-9])
    # What grows with what is cached is attention's.
    assert (times["mlp"].prefill_s[2], times["mlp"].decode_s[1]) == (0, 0)
    assert times["attention"].decode_s[1] == pytest.approx(2e-7)
    assert found.prefill_error < 1e-6
    assert found.step_error < 1e-6


def test_how_far_the_fit_is_from_what_was_measured_is_said():
    timed = [_timed(0, 2, p, ends=False) for p in (*_LENS, *_LENS)]
    for number, sign in enumerate((1, 1, 1, -1, -1, -1)):
        one = timed[number]
        timed[number] = Timed(
            start=0,
            stop=2,
            prompt_len=one.prompt_len,
            prefill_s=one.prefill_s * (1 + sign * 0.1),
            context_len=one.context_len,
            step_s=one.step_s,
        )
    found = segments.fit_nodes(_MODEL, timed)
    assert found.prefill_error == pytest.approx(0.1, rel=0.02)
    assert found.step_error < 1e-6


@pytest.mark.parametrize(
    ("timed", "message"),
    [
        ([_timed(0, 2, 16), _timed(0, 2, 32)], "2 lengths of prompts do not tell three coeffic"),
        (
            [_timed(0, 2, 16), _timed(0, 2, 32), _timed(0, 2, 64, layer=(0, 0, 0), ends=False)],
            "layers 0:2 took 0 s and .* with 64 tokens, which is no measurement; measure again",
        ),
    ],
)
def test_measurements_that_tell_nothing_are_refused(timed, message):
    with pytest.raises(ValueError, match=message):
        segments.fit_nodes(_MODEL, timed)
