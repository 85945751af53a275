import asyncio

import pytest

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine_process import tickets


def _delta(text: str, index: int = 0) -> request_lib.Delta:
    return request_lib.Delta(
        request_id="r", index=index, text=text, token_ids=tuple(map(ord, text))
    )


def _end() -> request_lib.Completion:
    return request_lib.Completion(request_id="r", prompt_ids=(), choices=())


def test_unread_deltas_of_a_choice_are_merged_and_the_end_comes_last():
    async def read() -> list[tickets.Event]:
        ticket = tickets.Ticket("r", [1, 2])
        for event in (
            _delta("a"),
            _delta("x", 1),
            _delta("b"),
            _end(),
        ):
            ticket.put(event)
        found = [await ticket.next()]
        while not isinstance(found[-1], request_lib.Completion):
            found.append(await ticket.next())
        return found

    first, second, last = asyncio.run(read())
    assert isinstance(first, request_lib.Delta)
    assert isinstance(second, request_lib.Delta)
    assert (first.text, first.token_ids) == ("ab", (97, 98))
    assert (second.index, second.text) == (1, "x")
    assert isinstance(last, request_lib.Completion)
    assert last.prompt_ids == (1, 2)


def test_what_comes_after_the_end_is_dropped():
    async def read() -> None:
        ticket = tickets.Ticket("r", [1])
        ticket.put(ValueError("too late"))
        ticket.put(_end())
        ticket.put(_delta("a"))
        with pytest.raises(ValueError, match="too late"):
            await ticket.next()

    asyncio.run(read())


def test_a_reader_waits_for_news_and_an_error_follows_what_came_before_it():
    async def read() -> str:
        ticket = tickets.Ticket("r", [1])
        asyncio.get_running_loop().call_later(0.01, ticket.put, _delta("a"))
        event = await ticket.next()
        assert isinstance(event, request_lib.Delta)
        ticket.put(_delta("b"))
        ticket.put(tickets.EngineStoppedError("gone"))
        later = await ticket.next()
        assert isinstance(later, request_lib.Delta)
        with pytest.raises(tickets.EngineStoppedError, match="gone"):
            await ticket.next()
        return event.text + later.text

    assert asyncio.run(read()) == "ab"
