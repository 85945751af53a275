"""Ranges of layers are timed at this end and through a gateway, without a trace."""

import pytest
import split_choices
import split_model
import split_runs

from nanoflow_jax.split import errors, measuring, stand_in
from nanoflow_jax.split.planning import segments

_LENS = (8, 16, 32)


def test_ranges_are_those_between_borders_and_from_either_end_of_what_is_held():
    assert measuring.ranges((0, 2, 4, 6), ((0, 4),)) == [(0, 2), (0, 4), (2, 4)]
    assert measuring.ranges((0, 2, 4, 6), ((0, 2), (4, 6))) == [(0, 2), (4, 6)]
    assert (2, 4) in measuring.ranges((0, 2, 4, 6), ((0, 6),))


def test_each_range_and_length_is_timed_and_said() -> None:
    engine, said = split_model.ToyEngine(), []
    timed = measuring.time_engine(
        engine,
        [(0, 2), (2, 4), (4, 6), (0, 6)],
        prompt_lens=_LENS,
        num_steps=2,
        width=split_model.WIDTH,
        num_layers=split_model.NUM_LAYERS,
        say=said.append,
    )
    assert [(one.start, one.stop, one.prompt_len) for one in timed[:4]] == [
        (0, 2, 8),
        (0, 2, 16),
        (0, 2, 32),
        (2, 4, 8),
    ]
    assert len(timed) == len(said) == 12
    assert all(one.prefill_s > 0 and one.step_s > 0 for one in timed)
    assert timed[0].context_len == 8 + 1.5
    assert said[0].startswith("this end, layers 0:2: 8 tokens in ")
    assert not engine.open_pieces


def test_a_range_that_the_engine_does_not_hold_is_its_error() -> None:
    engine = split_model.ToyEngine(held=((0, 2),))
    with pytest.raises(ValueError, match=r"layers \[2, 4\) are not here"):
        measuring.time_engine(
            engine, [(2, 4)], prompt_lens=_LENS, num_steps=1, width=16, num_layers=6, say=print
        )


def test_a_gateway_is_timed_by_sessions_whose_client_computes_nothing() -> None:
    async def body() -> None:
        computes_nothing = stand_in.StandIn(width=split_model.WIDTH, num_layers=6)
        async with split_runs.ends(client_engine=computes_nothing) as ends:
            said: list[str] = []
            timed = await measuring.time_gateway(
                ends.client, split_model.KINDS, prompt_lens=_LENS, num_steps=2, say=said.append
            )
            assert [(one.start, one.stop) for one in timed[::3]] == [
                (cut.start, cut.stop) for cut in split_model.KINDS
            ]
            assert all(one.prefill_s > 0 and one.step_s > 0 for one in timed)
            assert said[-1].startswith("the gateway, layers 2:4: 32 tokens in ")
            assert ends.gateway.counts["opened"] == 4 * 3 * 6
            await split_runs.until(lambda: not ends.engine.open_pieces)

    split_runs.run(body())


def test_a_gateway_says_what_it_offers() -> None:
    async def body() -> None:
        async with split_runs.ends(max_rows=99, max_len=777) as ends:
            offer = await ends.client.ask()
            assert offer.borders == tuple(range(split_model.NUM_LAYERS + 1))
            assert (offer.max_rows, offer.max_len) == (99, 777)
        async with split_runs.ends(token="another") as ends:
            with pytest.raises(errors.RefusedError, match="the token is not one of the server's"):
                await ends.client.ask()

    split_runs.run(body())


def test_measured_times_can_be_planned_with() -> None:
    timed = measuring.time_engine(
        split_model.ToyEngine(),
        measuring.ranges(split_choices.BORDERS, split_choices.WHOLE),
        prompt_lens=_LENS,
        num_steps=2,
        width=split_model.WIDTH,
        num_layers=split_model.NUM_LAYERS,
        say=lambda text: None,
    )
    fitted = segments.fit_nodes(split_choices.model(), timed)
    assert set(fitted.times) == {"embedding", "attention", "mlp", "head"}
    assert sum(sum(one.prefill_s) for one in fitted.times.values()) > 0
