"""Sessions share a gateway's bytes in the order in which they ask."""

import asyncio

import split_runs

from nanoflow_jax.split import budget


def test_takes_wait_in_order_until_there_is_room() -> None:
    async def body() -> None:
        shared = budget.ByteBudget(100)
        await shared.take(60)
        large, small = (asyncio.create_task(shared.take(n)) for n in (50, 10))
        await asyncio.sleep(0)
        assert not large.done() and not small.done()
        shared.give(60)
        await asyncio.gather(large, small)
        assert shared.taken_bytes == 60

    split_runs.run(body())


def test_take_larger_than_the_limit_waits_until_it_is_alone() -> None:
    async def body() -> None:
        shared = budget.ByteBudget(100)
        await shared.take(1)
        large = asyncio.create_task(shared.take(500))
        await asyncio.sleep(0)
        assert not large.done()
        shared.give(1)
        await large
        assert shared.taken_bytes == 500

    split_runs.run(body())


def test_take_that_is_cancelled_takes_nothing() -> None:
    async def body() -> None:
        shared = budget.ByteBudget(100)
        await shared.take(100)
        gone, next_one = (asyncio.create_task(shared.take(100)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        shared.give(100)
        await next_one
        assert shared.taken_bytes == 100

    split_runs.run(body())


def test_take_that_is_cancelled_as_it_is_granted_gives_back() -> None:
    async def body() -> None:
        shared = budget.ByteBudget(100)
        await shared.take(100)
        gone = asyncio.create_task(shared.take(100))
        await asyncio.sleep(0)
        shared.give(100)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert shared.taken_bytes == 0

    split_runs.run(body())
