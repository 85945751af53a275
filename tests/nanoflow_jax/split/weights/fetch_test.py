"""Layers that were fetched are those of the gateway, whatever happened on the way."""

import asyncio
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys

import batch_runs
import jax
import numpy as np
import pytest
import random_folder
import split_raw
import split_runs
import split_weights
from split_weights import LAYERS, check_whole, ends, fetch_into, sharing

from checkpoints import orbax_store, safetensors_file
from checkpoints.folder import ModelFolder
from nanoflow_jax.models import architecture, huggingface, loading
from nanoflow_jax.split import errors, frames, messages, transport
from nanoflow_jax.split.messages import Code


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = random_folder.write(
        tmp_path_factory.mktemp("model") / "whole", seed=3, num_hidden_layers=4
    )
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return path


def _whole_bytes(path):
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def _tuned(path, output):
    """A fine-tune: a value of layer 3 is another, and nothing else."""
    shutil.copytree(path, output)
    _flip(output / "model.safetensors", "model.layers.3.mlp.down_proj.weight")
    return output


def _flip(file, tensor):
    """Changes a bit of a tensor in place."""
    place = safetensors_file.read_header(file)[tensor].start
    with open(file, "r+b") as opened:
        opened.seek(place)
        value = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([value ^ 1]))


@pytest.mark.parametrize("tied", [False, True], ids=["head of its own", "tied"])
@pytest.mark.parametrize("is_orbax", [False, True], ids=["safetensors", "orbax"])
def test_fetched_layers_can_be_loaded_and_are_those_of_the_gateway(tmp_path, tied, is_orbax):
    async def body():
        path = random_folder.write(
            tmp_path / "whole", seed=4, num_hidden_layers=4, tie_word_embeddings=tied
        )
        given = path
        if is_orbax:
            given = tmp_path / "orbax"
            orbax_store.convert(ModelFolder.open(path), given)
        output = tmp_path / "fetched"
        async with ends(given) as (_, proxy):
            said = await fetch_into(output, proxy.port)
        check_whole(output, path)
        total = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        assert total < 0.7 * _whole_bytes(path)
        assert re.search(r"of [\d.]+ kB, [\d.]+ [kM]B/s\n$", said), said
        whole, fetched = ModelFolder.open(path), ModelFolder.open(output)
        config = huggingface.read_config(fetched.config)
        spans = [architecture.Span(*layers) for layers in LAYERS]
        wanted, found = (
            loading.load_spans(
                folder,
                config,
                spans,
                dtype=np.dtype(np.float32),
                placement=loading.place_model(config, jax.devices()[:1]),
            )
            for folder in (whole, fetched)
        )
        for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
            np.testing.assert_array_equal(one, other)

    split_runs.run(body())


def test_what_is_there_is_compared_and_not_fetched_again(tmp_path, model):
    async def body():
        output = tmp_path / "fetched"
        async with ends(model) as (_, proxy):
            await fetch_into(output, proxy.port, layers=[(0, 1)])
            await fetch_into(output, proxy.port)
            before = proxy.down_bytes
            await fetch_into(output, proxy.port)
            assert proxy.down_bytes - before < 8192 < _whole_bytes(output)
        check_whole(output, model)

    split_runs.run(body())


def test_flipped_byte_in_a_fetched_part_is_found_and_the_part_fetched_again(tmp_path, model):
    async def body():
        output = tmp_path / "fetched"
        async with ends(model) as (_, proxy):
            await fetch_into(output, proxy.port)
            (file,) = {
                path
                for path in output.glob("*.safetensors")
                if "lm_head.weight" in safetensors_file.read_header(path)
            }
            _flip(file, "lm_head.weight")
            assert split_weights.identity_of(output, LAYERS).parts != (
                split_weights.identity_of(model, LAYERS).parts
            )
            said = await fetch_into(output, proxy.port)
            assert f"{file} was damaged; it is fetched again\n" in said
        check_whole(output, model)

    split_runs.run(body())


def test_flipped_byte_on_the_way_is_found_and_fetching_goes_on(tmp_path, model):
    async def body():
        output = tmp_path / "fetched"
        async with ends(model) as (_, proxy):
            proxy.spoil = "down"
            await fetch_into(output, proxy.port)
            assert proxy.spoil is None
            assert proxy.down_bytes < 1.5 * _whole_bytes(output)
        check_whole(output, model)

    split_runs.run(body())


def test_link_that_breaks_again_and_again_loses_what_was_under_way_alone(tmp_path, model):
    async def body():
        output = tmp_path / "fetched"
        async with ends(model) as (_, proxy):
            task = asyncio.create_task(fetch_into(output, proxy.port))
            for _ in range(3):
                before = proxy.num_cuts
                proxy.cut_after(down=20_000)
                await split_runs.until(lambda n=before: proxy.num_cuts > n or task.done())
            await task
            assert proxy.num_cuts == 3
            assert proxy.down_bytes < 3 * _whole_bytes(output)
        check_whole(output, model)

    split_runs.run(body())


_CHILD = """
import asyncio, pathlib, sys
from nanoflow_jax.split import settings, transport
from nanoflow_jax.split.weights import fetch

output, port, token = sys.argv[1:]
where = transport.Endpoint(host="127.0.0.1", port=int(port), token=token)
asyncio.run(
    fetch.fetch(
        where, [(0, 1), (3, 4)], pathlib.Path(output), knobs=settings.ClientSection(), tell=print,
        stream=sys.stderr,
    )
)
"""


def test_fetch_that_was_killed_goes_on_where_it_stopped(tmp_path, model):
    async def body():
        output = tmp_path / "fetched"
        async with ends(model) as (_, proxy):
            proxy.cut_after(down=30_000)
            proxy.target_after_cut = 1  # nobody is there
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(output), str(proxy.port), split_runs.TOKEN],
                env=batch_runs.environment(),
                stderr=subprocess.PIPE,
            )
            try:
                await split_runs.until(lambda: proxy.num_cuts or child.poll() is not None)
                assert proxy.num_cuts, child.communicate()
            finally:
                child.kill()
                child.communicate()
        kept = split_weights.partial_bytes(output) + _whole_bytes(output)
        assert 0 < kept < 40_000
        assert not (output / "model.safetensors.index.json").exists()
        with pytest.raises(ValueError, match=r"has no weights|but neither"):
            ModelFolder.open(output)
        async with ends(model) as (_, proxy):
            await fetch_into(output, proxy.port)
            left = _whole_bytes(output) - kept
            assert left < proxy.down_bytes < 1.3 * left + 8192
        check_whole(output, model)

    split_runs.run(body())


async def _until_begun(model, output, *, layers=LAYERS):
    """A fetch that its gateway leaves in the middle."""
    async with ends(model) as (_, proxy):
        proxy.cut_after(down=30_000)
        proxy.target_after_cut = 1
        with pytest.raises(errors.SplitError, match="bytes fetched; run it again and it goes on"):
            await fetch_into(output, proxy.port, layers=layers, max_attempts=2)


def test_gateway_that_was_started_anew_goes_on_giving(tmp_path, model):
    async def body():
        output = tmp_path / "fetched"
        async with ends(model) as (_, proxy), sharing(model) as second:
            proxy.cut_after(down=30_000)
            proxy.target_after_cut = second.port
            await fetch_into(output, proxy.port)
            assert proxy.num_cuts == 1
            assert proxy.down_bytes < 1.5 * _whole_bytes(output)
        check_whole(output, model)

    split_runs.run(body())


def test_gateway_that_comes_back_with_another_model_is_not_mixed_with_the_first(tmp_path, model):
    async def body():
        output, other = tmp_path / "fetched", _tuned(model, tmp_path / "tuned")
        async with ends(model) as (_, proxy), sharing(other) as second:
            proxy.cut_after(down=30_000)
            proxy.target_after_cut = second.port
            with pytest.raises(errors.SplitError, match="changed while it was fetched: layer 3"):
                await fetch_into(output, proxy.port)
            assert not (output / "model.safetensors.index.json").exists()

    split_runs.run(body())


def test_folder_of_one_model_takes_no_parts_of_another(tmp_path, model):
    async def body():
        output, other = tmp_path / "fetched", _tuned(model, tmp_path / "tuned")
        await _until_begun(model, output)
        async with ends(other) as (_, proxy):
            with pytest.raises(ValueError, match=r"holds layer 3 with hash .* the two are not mix"):
                await fetch_into(output, proxy.port)

    split_runs.run(body())


def test_gateway_whose_files_change_gives_nothing_more(tmp_path, model):
    async def body():
        output, path = tmp_path / "fetched", shutil.copytree(model, tmp_path / "model")
        async with ends(path) as (_, proxy):
            _flip(path / "model.safetensors", "lm_head.weight")
            os.utime(path / "model.safetensors", (1, 1))
            with pytest.raises(errors.SplitError, match="it must be started again") as failure:
                await fetch_into(output, proxy.port)
            assert failure.value.code is Code.MODEL
            (path / "model.safetensors").unlink()
            with pytest.raises(errors.SplitError, match="was there before"):
                await fetch_into(output, proxy.port)
        assert not list(output.glob("*.safetensors"))

    split_runs.run(body())


def test_bytes_that_change_unseen_at_the_gateway_are_found_and_never_kept(tmp_path, model):
    async def body():
        output, path = tmp_path / "fetched", shutil.copytree(model, tmp_path / "model")
        async with ends(path) as (_, proxy):
            file = path / "model.safetensors"
            then = file.stat().st_mtime_ns
            _flip(file, "model.layers.0.mlp.down_proj.weight")
            os.utime(file, ns=(then, then))
            with pytest.raises(errors.SplitError, match=r"layer 0 came with hash .*, twice: the g"):
                await fetch_into(output, proxy.port)
        assert len(list(output.glob("*.safetensors"))) == 1  # the embedding, which is sound
        assert not (output / "model.safetensors.index.json").exists()

    split_runs.run(body())


def test_clients_beyond_the_most_at_once_wait_for_their_turn(tmp_path, model):
    async def body():
        async with ends(model, max_fetches=1, retry_after_s=0.01) as (_, proxy):
            outputs = [tmp_path / str(i) for i in range(3)]
            said = await asyncio.gather(*(fetch_into(out, proxy.port) for out in outputs))
        for output in outputs:
            check_whole(output, model)
        assert any("waiting for a turn: weights are given on 1 streams" in text for text in said)

    split_runs.run(body())


def test_weights_wait_for_rows_while_sessions_are_open(tmp_path):
    """Beside a session they would take a minute, at the least rate there is."""

    async def body():
        path = random_folder.write(
            tmp_path / "whole", seed=3, vocab_size=30_000, num_hidden_layers=4
        )
        output = tmp_path / "fetched"
        slow = {
            "busy_fetch_bytes_per_s": 1 << 16,
            "heartbeat_s": 3600.0,
            "max_payload_bytes": 1 << 15,
        }
        async with ends(path, **slow) as (_, proxy), split_raw.channel(proxy.port) as make:
            client = make()
            await client.open()
            task = asyncio.create_task(fetch_into(output, proxy.port))
            await split_weights.until_partial(output, at_least=1)
            for step in range(1, 9):
                await client.act(step, step - 1, split_raw.rows(step - 1))
                await client.hear(messages.Act)
            assert not task.done()
            await client.ask(messages.Close(), messages.Close)
            await task
        check_whole(output, path)

    split_runs.run(body())


def test_full_disk_is_said_and_fetching_goes_on_when_there_is_room(tmp_path, model, monkeypatch):
    async def body():
        output = tmp_path / "fetched"
        part = dict(split_weights.identity_of(model).parts)["layer 0"]
        output.mkdir()
        partial = output / f".{part}.safetensors.partial"
        async with ends(model) as (_, proxy):
            (output / "fetched.json").write_text('{"version": 1, "blobs": {}}')
            partial.symlink_to("/dev/full")
            with pytest.raises(ValueError, match=r"the disk is full .* it goes on where"):
                await fetch_into(output, proxy.port)
            partial.unlink()
            with monkeypatch.context() as patch:
                usage = shutil.disk_usage(output)._replace(free=1000)
                patch.setattr(shutil, "disk_usage", lambda path: usage)
                with pytest.raises(ValueError, match=r"\d+ bytes are still to be fetched and the "):
                    await fetch_into(output, proxy.port)
            await fetch_into(output, proxy.port)
        check_whole(output, model)

    split_runs.run(body())


@pytest.mark.parametrize(
    ("shared", "fetching", "reason"),
    [
        (("embed", "0:2"), {}, "need layer 3 of .* gives embed, 0:2 .its --share_weights"),
        (("0:4", "head"), {}, "layers 0:1,3:4 need embedding of"),
        (("all",), {"layers": [(0, 5)]}, r"\[0, 5\) is no range of layers of a model with 4"),
        (("all",), {"layers": [(2, 2)]}, r"\[2, 2\) is no range of layers of a model with 4"),
        (("all",), {"token": "guess"}, "the token is not one of the server's"),
        (("all",), {"token": ""}, "no token was shown"),
    ],
)
def test_what_is_not_given_away_is_refused(tmp_path, model, shared, fetching, reason):
    async def body():
        async with ends(model, shared) as (_, proxy):
            with pytest.raises(errors.RefusedError, match=reason):
                await fetch_into(tmp_path / "fetched", proxy.port, **fetching)
        assert not list((tmp_path / "fetched").iterdir())

    split_runs.run(body())


def test_gateway_that_shares_nothing_says_so(tmp_path):
    async def body():
        async with split_runs.serving(split_runs.split_model.ToyEngine()) as served:
            with pytest.raises(errors.RefusedError, match="this gateway gives no weights away"):
                await fetch_into(tmp_path / "fetched", served.port)

    split_runs.run(body())


def test_gateway_that_is_not_there_is_said(tmp_path):
    async def body():
        with pytest.raises(errors.SplitError, match=r"unavailable.*\(attempt 2 of 2, 0 bytes"):
            await fetch_into(tmp_path / "fetched", 1, max_attempts=2)

    split_runs.run(body())


_DATA = b"0123456789"
_BLOB = messages.Blob(name="layer 0", sha256=hashlib.sha256(_DATA).hexdigest(), nbytes=len(_DATA))
_LISTED = messages.to_frame(messages.Blobs(model="toy", blobs=(_BLOB,)))


def _chunk(offset, data):
    return messages.to_frame(messages.Chunk(offset=offset), data)


@contextlib.asynccontextmanager
async def _answering(answer):
    """The port of a gateway of a test's own."""
    where = transport.Endpoint(host="127.0.0.1", port=0)
    server, port = await transport.listen(
        where, {transport.WEIGHTS: answer}, max_frame_bytes=1 << 20
    )
    try:
        yield port
    finally:
        await server.stop(grace=None)


@pytest.mark.parametrize(
    ("listed", "given", "code", "reason"),
    [
        (messages.to_frame(messages.Blobs(model="m", blobs=())), None, Code.PROTOCOL, "nothing at"),
        (_chunk(0, _DATA), None, Code.PROTOCOL, "Chunk is nothing that a gateway says here"),
        (b"\x00" * 40, None, Code.BAD_FRAME, "attempt 2 of 2"),
        (None, None, Code.LINK, "the gateway ended the stream"),
        (_LISTED, _LISTED, Code.PROTOCOL, "Blobs is nothing that a gateway says here"),
        (_LISTED, None, Code.LINK, "the gateway ended the stream"),
        (
            _LISTED,
            _chunk(3, _DATA),
            Code.PROTOCOL,
            "bytes [3, 13) of layer 0 came; those from 0 to",
        ),
        (_LISTED, _chunk(0, _DATA * 2), Code.PROTOCOL, "those from 0 to at most 10 are due"),
        (_LISTED, _chunk(0, b""), Code.PROTOCOL, "bytes [0, 0) of layer 0 came"),
        (_LISTED, _chunk(0, _DATA[::-1]), Code.MODEL, "layer 0 came with hash"),
    ],
)
def test_gateway_that_gives_what_it_should_not_is_not_believed(
    tmp_path, listed, given, code, reason
):
    async def body():
        async def answer(stream):
            question, _ = messages.from_frame(await stream.read(), frames.FrameLimits())
            frame = listed if isinstance(question, messages.AskBlobs) else given
            if frame is not None:
                await stream.write(frame)

        async with _answering(answer) as port:
            with pytest.raises(errors.SplitError, match=re.escape(reason)) as failure:
                await fetch_into(tmp_path / "fetched", port, max_attempts=2)
        assert failure.value.code is code
        assert not list((tmp_path / "fetched").glob("*.safetensors"))

    split_runs.run(body())


def test_gateway_that_falls_silent_is_given_up(tmp_path):
    async def body():
        ended = asyncio.Event()

        async def answer(stream):
            await stream.read()
            await ended.wait()

        async with _answering(answer) as port:
            with pytest.raises(errors.SplitError, match=r"nothing came of the gateway for 0\.2 s"):
                await fetch_into(tmp_path / "f", port, max_attempts=1, step_timeout_s=0.2)
            ended.set()

    split_runs.run(body())
