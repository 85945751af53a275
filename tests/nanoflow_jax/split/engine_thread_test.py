"""The event loop sees an engine's pieces in order, and none of its thread."""

import pytest
import split_model
import split_runs

from nanoflow_jax.split import engine_thread, interface


def _piece(name: str, **changes: int) -> interface.Piece:
    fields = {"start": 0, "stop": 2, "prompt_len": 4, "max_len": 8} | changes
    return interface.Piece(piece_id=name, params=split_runs.PARAMS, **fields)


def test_outputs_before_a_roll_back_are_told_before_it_returns() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine(rows_per_step=1)
        async with engine_thread.EngineThread(engine) as thread:
            heard: list[interface.PieceOutput] = []
            await thread.open(_piece("a"), heard.append)
            thread.feed("a", 0, token_ids=(1, 2, 3))
            await split_runs.until(lambda: len(heard) == 3)
            await thread.truncate("a", 1)
            num_before = len(heard)
            thread.feed("a", 1, token_ids=(2, 3))
            await split_runs.until(lambda: len(heard) == num_before + 2)
            assert [output.position for output in heard] == [0, 1, 2, 1, 2]
            assert (heard[3].hidden == heard[1].hidden).all()
        assert not engine.open_pieces

    split_runs.run(body())


def test_rows_that_the_engine_refuses_end_their_piece_alone() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with engine_thread.EngineThread(engine) as thread:
            heard: dict[str, list[interface.PieceOutput]] = {"a": [], "b": []}
            for name, outputs in heard.items():
                await thread.open(_piece(name), outputs.append)
            taken: list[str] = []
            thread.feed("a", 3, token_ids=(1,), on_taken=lambda: taken.append("a"))
            thread.feed("b", 0, token_ids=(1,))
            await split_runs.until(lambda: heard["a"] and heard["b"])
            assert heard["a"][0].error == "rows from 3 came; those from 0 are due"
            assert heard["b"][0].error is None
            assert list(engine.open_pieces) == ["b"]
            assert taken == ["a"]

    split_runs.run(body())


def test_failed_step_ends_every_open_piece_with_the_reason() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with engine_thread.EngineThread(engine) as thread:
            heard: list[interface.PieceOutput] = []
            for name in ("a", "b"):
                await thread.open(_piece(name), heard.append)
            engine.fails = RuntimeError("no device")
            thread.feed("a", 0, token_ids=(1,))
            await split_runs.until(lambda: len(heard) == 2)
            assert {output.error for output in heard} == {"a step of the engine failed: no device"}
            assert not engine.open_pieces

    split_runs.run(body())


def test_piece_that_the_engine_refuses_is_not_open() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine(held=((0, 2),))
        async with engine_thread.EngineThread(engine) as thread:
            with pytest.raises(ValueError, match=r"layers \[1, 3\) are not here"):
                await thread.open(_piece("a", start=1, stop=3), lambda output: None)
            assert not engine.open_pieces

    split_runs.run(body())


def test_closed_piece_tells_nothing_more() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with engine_thread.EngineThread(engine) as thread:
            heard: list[interface.PieceOutput] = []
            await thread.open(_piece("a"), heard.append)
            await thread.open(_piece("b"), heard.append)
            with engine.paused():
                thread.feed("a", 0, token_ids=(1,))
                thread.close_piece("a")
            thread.feed("b", 0, token_ids=(1,))
            await split_runs.until(lambda: heard)
            assert [output.piece_id for output in heard] == ["b"]

    split_runs.run(body())


def test_rows_wait_for_those_of_others_so_that_they_share_a_step() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with engine_thread.EngineThread(engine, patience_s=split_runs.PATIENCE_S) as thread:
            heard: list[interface.PieceOutput] = []
            for name in ("a", "b"):
                await thread.open(_piece(name), heard.append)
            thread.feed("a", 0, token_ids=(1,))  # nobody else has given anything yet
            await split_runs.until(lambda: len(heard) == 1)
            thread.feed("b", 0, token_ids=(1,))
            thread.feed("a", 1, token_ids=(2,))
            await split_runs.until(lambda: len(heard) == 3)
            assert engine.steps == [1, 2]

    split_runs.run(body())


def test_rows_do_not_wait_for_a_piece_that_is_closed() -> None:
    async def body() -> None:
        engine = split_model.ToyEngine()
        async with engine_thread.EngineThread(engine, patience_s=4 * split_runs.PATIENCE_S) as t:
            heard: dict[str, list[interface.PieceOutput]] = {"a": [], "b": []}
            for name, outputs in heard.items():
                await t.open(_piece(name), outputs.append)
            t.feed("a", 0, token_ids=(1,))
            await split_runs.until(lambda: heard["a"])
            t.feed("b", 0, token_ids=(1,))
            t.close_piece("a")
            await split_runs.until(lambda: heard["b"])

    split_runs.run(body())
