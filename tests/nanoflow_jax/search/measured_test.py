import dataclasses

import profile_files
import pytest
from profile_files import point

from nanoflow_jax.cost import layer_work
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.results.profile import LAUNCH
from nanoflow_jax.search import interference, measured

_LOAD = layer_work.Load(tokens=512, decode_rows=256, context_len=600, prefix_len=100)


def _times(*points, **more):
    return measured.Times(profile_files.made(*points, **more))


def test_the_best_cap_and_tile_count_and_an_empty_program_is_taken_off():
    times = _times(
        point(LAUNCH, 1, 0.25),
        point("o", 128, 5.0, num_ctas=4),
        point("o", 128, 3.0, tile="big"),
        point("o", 256, 4.0, 5.0, 9.0),
        num_sms=8,
    )
    assert times.seconds("o", 128) == 2.75
    assert times.seconds("o", 192) == 3.75
    assert times.seconds("o", 0) == 0.0
    assert times.operations == {"o"}
    assert times.spread_s("o", 256) == pytest.approx(2.16, rel=1e-3)


def test_on_a_busy_machine_the_sample_that_was_disturbed_least_counts():
    samples = point("o", 128, 9.0, 2.0, 5.0)
    assert _times(samples).seconds("o", 128) == 5.0
    busy = profile_files.made(samples, load=2.5)
    assert measured.Times(busy).seconds("o", 128) == 2.0
    assert "Toy 1, which was busy (load 2.5; so the fastest samples count), 2026-" in busy.source
    assert not profile_files.made(samples, load=2.5, num_sms=8).is_busy  # a GPU has its own clock


def test_an_operation_that_was_timed_in_two_parts_takes_both():
    times = _times(point("norm", 128, 1.0), point("kqv", 128, 2.0))
    assert times.seconds("norm_kqv", 128) == 3.0
    assert times.operations == {"norm", "kqv", "norm_kqv"}
    spread = _times(point("norm", 128, 1.0, 7.0), point("kqv", 128, 2.0, 10.0))
    assert spread.spread_s("norm_kqv", 128) == 5.0


def test_attention_lies_between_contexts_that_were_measured_for_so_many_rows():
    def decode(rows, context, seconds):
        return point("decode_attention", rows, seconds, context=context)

    times = _times(decode(64, 100, 1.0), decode(256, 100, 4.0), decode(64, 300, 3.0))
    assert times.seconds("decode_attention", 64, 200) == 2.0
    assert times.seconds("decode_attention", 64, 50) == 1.0
    assert times.seconds("decode_attention", 256, 100) == 4.0
    for rows, context, most in ((256, 200, "200 is beyond 100"), (300, 50, "300 is beyond 256")):
        with pytest.raises(ValueError, match=f"decode_attention of {rows} tokens.*{most}, the mos"):
            times.seconds("decode_attention", rows, context)
    with pytest.raises(ValueError, match="the profile of toy has no times of o: it has decode_at"):
        times.seconds("o", 64)


def test_a_part_of_a_step_has_its_share_of_decode_rows():
    found = measured.Measured(
        file=profile_files.made(
            point("decode_attention", 128, 1.0, context=600),
            point("decode_attention", 256, 2.0, context=600),
            point("prefill_attention", 128, 3.0, context=100),
            point("down", 256, 7.0),
        ),
        name="toy.json",
        load=_LOAD,
    )
    assert found.seconds("decode_attention", 256) == 1.0
    assert found.seconds("decode_attention", 512) == 2.0
    assert found.seconds("prefill_attention", 256) == 3.0
    assert found.seconds("down_columns", 256) == 7.0
    assert found.source.startswith("measured on Toy 1, 2026-11-26, float32, jax 0.10.2 (toy.json)")
    prompts = dataclasses.replace(found, load=dataclasses.replace(_LOAD, decode_rows=0))
    assert prompts.seconds("decode_attention", 512) == 0.0


def test_shares_that_others_beat_are_left_out():
    points = [
        point("o", 128, seconds, num_ctas=sms) for sms, seconds in ((2, 4.0), (4, 5.0), (6, 2.0))
    ]
    whole = profile_files.made(*points, point("o", 128, 1.0), num_sms=8)
    assert measured.shares(whole, whole.points) == [
        (0.25, 4.0),
        (0.75, 2.0),
        (1.0, 1.0),
    ]


def _with_pairs():
    """A product of 6 s and decode attention of 3 s, which loses half of what the product gains."""
    return profile_files.made(
        point("up_gate", 128, 6.0),
        point("decode_attention", 64, 3.0, context=512),
        point("decode_attention", 128, 6.0, context=512),
        num_sms=8,
        pairs=(
            profile_files.pair(128, 64, 4, 12.0),
            profile_files.pair(128, 64, 6, 7.5),
            profile_files.pair(128, 128, 5, 10.0),
            profile_files.pair(128, 128, 7, 60.0),  # beaten: attention has no room
        ),
    )


def test_what_is_kept_side_by_side_by_hand():
    (row,) = measured.kept(_with_pairs())["decode_attention"]
    # 6 of 7.5 and of 10 seconds: the product keeps 0.8 and 0.6; attention 3 / 7.5 and 6 / 10.
    assert row.points == (pytest.approx((0.6, 0.6)), pytest.approx((0.8, 0.4)))
    assert row.other_keeps(0.1) == pytest.approx(0.2)
    assert row.other_keeps(0.3) == pytest.approx(0.5)
    assert row.other_keeps(0.5) is None
    lines = measured.kept_lines(_with_pairs())
    assert lines[0].startswith("decode_attention beside products of 1 shapes")
    assert lines[1:3] == ["  0.1 0.20 0.20 0.20 of 1", "  0.2 0.40 0.40 0.40 of 1"]


def test_speeds_come_from_pairs_where_there_are_any():
    found = measured.speeds(_with_pairs(), interference.ROOFLINE)
    assert found.speed(Resource.MEMORY, 0.2) == pytest.approx(0.4)
    assert found.speed(Resource.MEMORY, 1.0) == 1.0
    assert found.speed(Resource.COMPUTE, 0.5) == 0.5
    assert "measured on Toy 1" in found.source
    none = measured.speeds(profile_files.made(point("o", 1, 1.0), num_sms=8), interference.TABLE_3)
    assert none.points == interference.TABLE_3.points
    assert none.source.endswith("; the profile has no pairs")
    alone = measured.speeds(profile_files.made(point("o", 1, 1.0)), interference.TABLE_3)
    assert alone.speed(Resource.MEMORY, 0.3) == pytest.approx(0.3)
