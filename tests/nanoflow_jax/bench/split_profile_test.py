"""Plans for slower clients, from times that can be added up by hand; and the longer link."""

import asyncio
import time

import pytest
import split_runs

from nanoflow_jax.bench import split_ends, split_link, split_profile
from nanoflow_jax.split.planning.asked import Request
from nanoflow_jax.split.planning.costs import Model
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile, NodeTimes

_MODEL = Model("S", split_ends.source_of("S").config)
_LINK = LinkProfile(
    name="none",
    source="a test",
    rtt_p50_s=0.01,
    rtt_p95_s=0.01,
    up_bytes_per_s=1e12,
    up_p10_bytes_per_s=1e12,
    down_bytes_per_s=1e12,
    down_p10_bytes_per_s=1e12,
    serialisation_s=0.0,
)


def _server() -> DeviceProfile:
    """A layer takes 2 ms of a step and the head 4 ms: 20 ms for all 8; prompts take nothing."""
    times = {"embedding": 0.0, "attention": 0.001, "mlp": 0.001, "head": 0.004}
    return DeviceProfile(
        name="server",
        source="a test",
        memory_bytes=1e12,
        weight_bits=32,
        kv_bits=32,
        batch=4,
        model="S",
        times={
            name: NodeTimes(prefill_s=(0.0, 0.0, 0.0), decode_s=(seconds, 0.0))
            for name, seconds in times.items()
        },
    )


def test_the_slowest_client_that_saves_a_third_is_found() -> None:
    """With six times as long (12 ms a layer), 6 layers take 72 ms, the server 8 and the link 10.

    That is under 91.8 ms, which the guard leaves; the server is charged 8 of 20 ms.
    """
    asked = Request(prompt_len=32, output_len=48, ttft_s=10.0, tpot_s=0.102)
    found = split_profile.find(_MODEL, _server(), _LINK, asked, grid=2)
    assert found is not None
    assert (found.slowness, found.start, found.stop) == (6.0, 6, 8)
    assert found.load == pytest.approx(0.4)
    assert found.tpot_s == pytest.approx(0.072 + 0.008 + 0.01, rel=1e-3)


def test_deadlines_that_leave_no_room_for_the_link_have_no_point() -> None:
    asked = Request(prompt_len=32, output_len=48, ttft_s=10.0, tpot_s=0.025)
    assert split_profile.find(_MODEL, _server(), _LINK, asked, grid=2) is None


def test_a_longer_link_delays_each_way_and_ends_with_its_server() -> None:
    async def body() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(100):
                writer.write(data)
            writer.close()

        async with (
            await asyncio.start_server(echo, "127.0.0.1", 0) as server,
            split_link.delayed(server.sockets[0].getsockname()[1], one_way_s=0.02) as port,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            begun_s = time.monotonic()
            writer.write(b"there and back")
            assert await reader.read(100) == b"there and back"
            assert time.monotonic() - begun_s >= 0.04
            writer.close()

    split_runs.run(body())
