"""A gateway gives weights in small pieces, as fast as they are taken, and to few at once."""

import pathlib

import pytest
import random_folder
import split_raw
import split_runs
import split_weights

from checkpoints import content
from checkpoints.folder import ModelFolder
from nanoflow_jax.split import frames, messages, parts, transport
from nanoflow_jax.split.messages import Code


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
    """Its embedding, of 3 MB, is more than what may lie in the ways between two ends."""
    return random_folder.write(
        tmp_path_factory.mktemp("model") / "whole", seed=3, vocab_size=24_000, num_hidden_layers=1
    )


def _want(model: pathlib.Path, part: str = "embedding", offset: int = 0) -> messages.Want:
    found = dict(split_weights.identity_of(model).parts)[part]
    return messages.Want(sha256=found, offset=offset)


def test_who_does_not_read_makes_the_gateway_read_little_and_loses_its_turn(model, monkeypatch):
    async def body() -> None:
        sizes: list[int] = []
        want, other = _want(model), _want(model, "head")
        read = ModelFolder.read_range

        def counted(self: ModelFolder, name: str, start: int, stop: int) -> bytes:
            sizes.append(stop - start)
            return read(self, name, start, stop)

        limits = {"max_fetches": 1, "write_timeout_s": 0.3}
        async with (
            split_weights.sharing(model, **limits) as served,
            split_raw.channel(served.port) as make,
        ):
            monkeypatch.setattr(content, "READ_BYTES", 1 << 16)
            monkeypatch.setattr(ModelFolder, "read_range", counted)
            slow = make(transport.WEIGHTS)
            await slow.say(want)
            await split_runs.until(lambda: sizes)
            refused = await make(transport.WEIGHTS).ask(other, messages.Reject)
            assert refused.code is Code.OVERLOADED
            assert refused.reason == "weights are given on 1 streams; no more are begun"
            assert refused.retry_after_s == 1.0

            async def is_free() -> bool:
                answer = await make(transport.WEIGHTS).ask_any(other)
                return isinstance(answer, messages.Chunk)

            while not await is_free():
                pass
            assert max(sizes) <= 1 << 16
            assert sum(sizes) < 1 << 21
            slow.vanish()

    split_runs.run(body())


@pytest.mark.parametrize(
    ("question", "code", "reason"),
    [
        (
            messages.AskBlobs(major=1, minor=0, layers=((0, 1),)),
            Code.PROTOCOL,
            "the client speaks version 1.0 of the protocol",
        ),
        (
            messages.Want(sha256="f" * 64, offset=0),
            Code.MODEL,
            "nothing with hash ffffffffffff is given away here: the gateway has another model",
        ),
        (messages.Close(), Code.PROTOCOL, "Close is nothing that asks for weights"),
    ],
)
def test_question_that_cannot_be_answered_is_refused(model, question, code, reason):
    async def body() -> None:
        async with (
            split_weights.sharing(model) as served,
            split_raw.channel(served.port) as make,
        ):
            reject = await make(transport.WEIGHTS).ask(question, messages.Reject)
            assert reject.code is code
            assert reason in reject.reason

    split_runs.run(body())


def test_garbage_and_offsets_past_the_end_are_refused(model):
    async def body() -> None:
        async with (
            split_weights.sharing(model) as served,
            split_raw.channel(served.port) as make,
        ):
            garbage = make(transport.WEIGHTS)
            await garbage.say_bytes(b"\x00" * 40)
            assert (await garbage.hear(messages.Reject)).code is Code.BAD_FRAME
            wrong = _want(model, offset=1 << 40)
            reject = await make(transport.WEIGHTS).ask(wrong, messages.Reject)
            assert reject.code is Code.LIMIT
            assert reject.reason.endswith(" bytes; 1099511627776 were asked for")

    split_runs.run(body())


def test_part_that_is_not_shared_cannot_be_had_by_its_hash(model):
    async def body() -> None:
        async with (
            split_weights.sharing(model, ["0:1"]) as served,
            split_raw.channel(served.port) as make,
        ):
            reject = await make(transport.WEIGHTS).ask(_want(model), messages.Reject)
            assert reject.code is Code.MODEL

    split_runs.run(body())


@pytest.mark.parametrize("sha256", ["", "f" * 63, "F" * 64, "../" + "f" * 61, "f" * 64 + "\n"])
def test_what_has_not_the_form_of_a_hash_is_no_message(sha256):
    for message in (
        messages.Want(sha256=sha256, offset=0),
        messages.Blobs(model="m", blobs=(messages.Blob(name="n", sha256=sha256, nbytes=1),)),
    ):
        with pytest.raises(frames.FrameError, match="a frame's header is no message"):
            messages.from_frame(messages.to_frame(message), frames.FrameLimits())


def test_shared_parts_are_named_as_layers_are():
    assert parts.shared([], 4) == frozenset()
    assert parts.shared(["embed", "1:3"], 4) == {"embedding", "layer 1", "layer 2"}
    assert parts.shared(["head", "0:1"], 4) == {"layer 0", "head"}
    assert parts.shared(["all"], 2) == {"embedding", "layer 0", "layer 1", "head"}


@pytest.mark.parametrize("text", ["", "none", "0", "2:1", "0:5", "1:1", "-1:2"])
def test_what_is_no_part_of_the_model_cannot_be_shared(text):
    with pytest.raises(ValueError, match="is none of all, embed, head and a range START:STOP of"):
        parts.shared(["all", text], 4)


def test_toy_sessions_and_weights_have_one_gateway(model):
    """Of streams that ask for weights, none opens a session."""

    async def body() -> None:
        async with split_weights.sharing(model) as served, split_raw.channel(served.port) as make:
            assert (await make(transport.WEIGHTS).ask_any(split_raw.HELLO)) is not None
            assert served.num_sessions == 0
            client = make()
            assert (await client.open()).position == 0
            await client.ask(messages.Close(), messages.Close)

    split_runs.run(body())
