"""Uses every feature of the server through the openai SDK, of version 2 or newer, as its users do.

Run by `clients_test.py` with the interpreter of an environment that has the SDK:
`python openai_features.py URL KEY`. Says one line per feature; ends with code 1 at the first that
fails.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import openai
import pydantic
from openai import OpenAI

_PROMPT = "def main():"
_FIXED: dict[str, Any] = {"model": "embedded", "max_tokens": 12, "temperature": 0}
_ASK: list[Any] = [{"role": "user", "content": "What does textwrap.dedent do?"}]
_CITIES = {"enum": ["Oslo", "Rome"]}
_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": _CITIES, "ok": {"type": "boolean"}},
    "required": ["city", "ok"],
    "additionalProperties": False,
}
_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": name, "description": "Of a city.", "parameters": _SCHEMA},
    }
    for name in ("weather", "time")
]
# A small model at a loss writes white space for ever, where JSON allows any.
_NO_LOOPS: dict[str, Any] = {"frequency_penalty": 2}
_MUST_END_S = 120.0


class Answer(pydantic.BaseModel):
    """What the model is held to, in the form that `parse` takes."""

    ok: bool


def models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["embedded"]
    assert client.models.retrieve("embedded").owned_by == "nanoflow_jax"


def completion_and_its_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {**_FIXED, "prompt": _PROMPT, "logprobs": 2, "n": 2}
    whole = client.completions.create(**asked)
    assert whole.object == "text_completion" and whole.model == "embedded"
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert choice.logprobs is not None
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [v for p in parts if p.logprobs for v in getattr(p.logprobs, name)]
            assert told == getattr(choice.logprobs, name), name
        assert parts[-1].finish_reason == choice.finish_reason
    *others, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in others)
    assert last.usage is not None and last.usage.completion_tokens == 24
    details = last.usage.prompt_tokens_details
    assert details is not None and details.cached_tokens is not None


def echo_with_prompt_logprobs(client: OpenAI) -> None:
    asked: dict[str, Any] = {**_FIXED, "prompt": _PROMPT, "echo": True, "logprobs": 1}
    whole = client.completions.create(**asked).choices[0]
    assert whole.text.startswith(_PROMPT) and whole.logprobs is not None
    found = whole.logprobs
    assert found.tokens and found.token_logprobs and found.text_offset and found.top_logprobs
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    assert len(found.tokens) == len(found.text_offset) == len(found.token_logprobs)
    assert found.text_offset == sorted(found.text_offset)
    for token, offset in zip(found.tokens[1:], found.text_offset[1:], strict=True):
        assert whole.text.startswith(token, offset) or token.startswith(("<|", "bytes:"))
    parts = [c for e in client.completions.create(**asked, stream=True) for c in e.choices]
    assert "".join(part.text for part in parts) == whole.text
    assert [t for p in parts if p.logprobs for t in p.logprobs.tokens or ()] == found.tokens


def prompts_as_token_ids_and_several_at_once(client: OpenAI) -> None:
    shown = client.completions.create(
        **_FIXED, prompt=_PROMPT, extra_body={"return_token_ids": True}
    ).choices[0]
    assert shown.model_extra is not None
    ids = shown.model_extra["prompt_token_ids"]
    assert client.completions.create(**_FIXED, prompt=ids).choices[0].text == shown.text
    many = client.completions.create(**_FIXED, prompt=[ids, ids, ids], n=2)
    assert [choice.index for choice in many.choices] == list(range(6))
    assert {choice.text for choice in many.choices} == {shown.text}
    texts = client.completions.create(**_FIXED, prompt=[_PROMPT, "import"])
    assert texts.choices[0].text == shown.text
    streamed = ["", ""]
    for chunk in client.completions.create(**_FIXED, prompt=[_PROMPT, "import"], stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in texts.choices]


def sampling(client: OpenAI) -> None:
    def text(**fields: Any) -> str:
        asked = {**_FIXED, "prompt": _PROMPT, **fields}
        return client.completions.create(**asked).choices[0].text

    plain = text()
    drawn = {"temperature": 1.0, "seed": 7, "max_tokens": 20}
    assert text(**drawn) == text(**drawn)
    assert text(**drawn, top_p=1e-6) == text(max_tokens=20)
    assert text(**drawn, extra_body={"top_k": 1, "min_p": 0.1}) == text(max_tokens=20)
    assert text(presence_penalty=2, frequency_penalty=2, max_tokens=40) != text(max_tokens=40)
    stop = plain.strip()[:4]
    cut = client.completions.create(**_FIXED, prompt=_PROMPT, stop=[stop, "zzz"]).choices[0]
    assert cut.finish_reason == "stop" and stop not in cut.text
    first = client.completions.create(
        **{**_FIXED, "max_tokens": 1}, prompt=_PROMPT, extra_body={"return_token_ids": True}
    ).choices[0]
    assert first.model_extra is not None
    (token,) = first.model_extra["token_ids"]
    assert text(logit_bias={str(token): -100}, max_tokens=1) != first.text
    assert text(logit_bias={"100": 100}, max_tokens=4) == text(
        extra_body={"allowed_token_ids": [100]}, max_tokens=4
    )
    word = plain.split()[0]
    assert word not in text(extra_body={"bad_words": [word]})
    assert len(text(extra_body={"ignore_eos": True, "min_tokens": 12})) > 0


def chat_and_its_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "embedded",
        "messages": _ASK,
        "temperature": 0,
        "max_completion_tokens": 12,
        "logprobs": True,
        "top_logprobs": 2,
        "n": 2,
        "user": "somebody",
    }
    whole = client.chat.completions.create(**asked)
    assert whole.object == "chat.completion" and whole.usage is not None
    assert whole.usage.completion_tokens <= 24
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert choice.logprobs is not None and choice.logprobs.content
        told = [e for p in parts if p.logprobs for e in p.logprobs.content or ()]
        assert told == choice.logprobs.content
        assert all(len(entry.top_logprobs) == 2 for entry in told)
        assert parts[-1].finish_reason == choice.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def chat_helpers(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "embedded", "messages": _ASK, "max_completion_tokens": 60}
    parsed = client.chat.completions.parse(
        **asked, **_NO_LOOPS, temperature=0, response_format=Answer
    )
    assert isinstance(parsed.choices[0].message.parsed, Answer)
    with client.chat.completions.stream(**asked, seed=1) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and final.choices[0].finish_reason in ("stop", "length")


def chat_that_goes_on_with_an_answer(client: OpenAI) -> None:
    begun = [*_ASK, {"role": "assistant", "content": "It removes"}]
    asked: dict[str, Any] = {**_FIXED, "messages": begun}
    going_on = client.chat.completions.create(**asked, extra_body={"continue_final_message": True})
    after = client.chat.completions.create(**asked)
    assert going_on.usage and after.usage
    assert going_on.usage.prompt_tokens < after.usage.prompt_tokens
    parts = [{"type": "text", "text": _ASK[0]["content"]}]
    same = client.chat.completions.create(**_FIXED, messages=[{"role": "user", "content": parts}])
    assert same.choices == client.chat.completions.create(**_FIXED, messages=_ASK).choices


def structured_answers(client: OpenAI) -> None:
    def said(stream: bool = False, **fields: Any) -> str:
        asked = {**_FIXED, **_NO_LOOPS, "max_tokens": 80, "messages": _ASK, **fields}
        if not stream:
            return client.chat.completions.create(**asked).choices[0].message.content or ""
        events = client.chat.completions.create(**asked, stream=True)
        return "".join(e.choices[0].delta.content or "" for e in events)

    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA, "strict": True}}
    for stream in (False, True):
        assert json.loads(said(stream, response_format=form))["city"] in _CITIES["enum"]
        assert said(stream, response_format={"type": "json_object"}).lstrip().startswith("{")
        for outputs, wanted in [
            ({"regex": "(ab){3}"}, {"ababab"}),
            ({"choice": ["yes", "no"]}, {"yes", "no"}),
            ({"grammar": 'start: "x" | "yy"'}, {"x", "yy"}),
        ]:
            assert said(stream, extra_body={"structured_outputs": outputs}) in wanted
        assert json.loads(said(stream, extra_body={"structured_outputs": {"json": _SCHEMA}}))
    asked: dict[str, Any] = {**_FIXED, **_NO_LOOPS, "max_tokens": 80, "prompt": _PROMPT}
    written = client.completions.create(**asked, extra_body={"response_format": form})
    assert json.loads(written.choices[0].text)["ok"] in (True, False)


def tool_calls(client: OpenAI) -> None:
    asked: dict[str, Any] = {**_FIXED, "messages": _ASK, "max_tokens": 110, "tools": _TOOLS}
    named = {"type": "function", "function": {"name": "time"}}
    for choice, names in [("required", {"weather", "time"}), (named, {"time"})]:
        fields = {**asked, "tool_choice": choice, "parallel_tool_calls": False}
        answer = client.chat.completions.create(**fields).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
        (call,) = answer.message.tool_calls
        assert call.function.name in names and call.id.startswith("call_")
        assert json.loads(call.function.arguments)["city"] in _CITIES["enum"]
        parts = [
            c for e in client.chat.completions.create(**fields, stream=True) for c in e.choices
        ]
        deltas = [d for part in parts for d in part.delta.tool_calls or ()]
        assert deltas[0].id and deltas[0].function and deltas[0].function.name == call.function.name
        assert "".join((d.function and d.function.arguments) or "" for d in deltas) == (
            call.function.arguments
        )
        assert {d.index for d in deltas} == {0}
        assert parts[-1].finish_reason == "tool_calls"
    for choice in ("auto", "none"):
        free = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        assert free.message.content or free.message.tool_calls
    with_none = client.chat.completions.create(**asked, tool_choice="none").choices
    del asked["tools"]
    assert with_none == client.chat.completions.create(**asked).choices


def _wait(check: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + _MUST_END_S
    while not (found := check()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def _rows(count: int, **body: Any) -> bytes:
    rows = [
        {
            "custom_id": f"row-{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {**_FIXED, "prompt": f"def f{i}(", **body},
        }
        for i in range(count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def files_and_batches(client: OpenAI) -> None:
    bad = {"custom_id": "bad", "method": "POST", "url": "/v1/completions", "body": {"prompt": 3}}
    data = _rows(3) + json.dumps(bad).encode() + b"\n"
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    assert file.status == "processed" and file.bytes == len(data)
    assert client.files.retrieve(file.id) == file
    assert file.id in [known.id for known in client.files.list()]
    assert client.files.content(file.id).read() == data
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/completions",
        completion_window="24h",
        metadata={"made": "by a test"},
    )
    assert batch.id in [known.id for known in client.batches.list(limit=5)]
    _wait(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch ends")
    done = client.batches.retrieve(batch.id)
    assert done.request_counts and done.request_counts.completed == 3
    assert done.request_counts.failed == 1 and done.metadata == {"made": "by a test"}
    assert done.output_file_id and done.error_file_id
    output = [json.loads(line) for line in client.files.content(done.output_file_id).iter_lines()]
    texts = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in output}
    wanted = client.completions.create(**_FIXED, prompt=[f"def f{i}(" for i in range(3)])
    assert texts == {f"row-{i}": choice.text for i, choice in enumerate(wanted.choices)}
    (error,) = client.files.content(done.error_file_id).iter_lines()
    assert json.loads(error)["custom_id"] == "bad"
    for file_id in (done.output_file_id, done.error_file_id, file.id):
        assert client.files.delete(file_id).deleted


def a_batch_can_be_cancelled(client: OpenAI) -> None:
    data = _rows(60, max_tokens=200, ignore_eos=True)
    file = client.files.create(file=("long.jsonl", data), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
    )
    _wait(lambda: client.batches.retrieve(batch.id).status == "in_progress", "the batch begins")
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    _wait(lambda: client.batches.retrieve(batch.id).status == "cancelled", "the batch is cancelled")
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts and counts.completed < 60


def _refused(kind: type[openai.APIStatusError], ask: Callable[[], Any]) -> openai.APIStatusError:
    try:
        ask()
    except kind as error:
        return error
    raise AssertionError(f"there was no {kind.__name__}")


def errors(client: OpenAI) -> None:
    def bad(**fields: Any) -> openai.APIStatusError:
        asked = {**_FIXED, "prompt": _PROMPT, **fields}
        return _refused(openai.BadRequestError, lambda: client.completions.create(**asked))

    assert bad(temperature=-1).param == "temperature"
    assert bad(prompt="x " * 4000).code == "context_length_exceeded"
    assert bad(suffix="x").param == "suffix"
    assert "1000000 is not a token id" in bad(prompt=[[1], [10**6]], stream=True).message
    unknown = bad(extra_body={"temprature": 1})
    assert unknown.code == "unknown_parameter" and "temperature" in unknown.message
    assert bad(extra_body={"structured_outputs": {"regex": "("}}).type == "invalid_request_error"
    other = {**_FIXED, "prompt": _PROMPT, "model": "other"}
    for ask in (
        lambda: client.completions.create(**other),
        lambda: client.models.retrieve("other"),
        lambda: client.files.retrieve("file-none"),
        lambda: client.batches.retrieve("batch_none"),
    ):
        assert _refused(openai.NotFoundError, ask).status_code == 404
    busy = _refused(  # one choice more than the server's --max_queue
        openai.RateLimitError,
        lambda: client.completions.create(**_FIXED, prompt=_PROMPT, n=9),
    )
    assert int(busy.response.headers["retry-after"]) >= 1


def another_key_is_refused(client: OpenAI) -> None:
    stranger = client.with_options(api_key="wrong")
    error = _refused(openai.AuthenticationError, stranger.models.list)
    assert error.code == "invalid_api_key"


def _is_idle(client: OpenAI) -> bool:
    stats: Any = client.get("/../page/stats", cast_to=object)
    return bool(stats["running"] == stats["waiting"] == stats["pages_used"] == 0)


def a_stream_can_be_left(client: OpenAI) -> None:
    endless: dict[str, Any] = {**_FIXED, "max_tokens": 230, "extra_body": {"ignore_eos": True}}
    for stream in (
        client.completions.create(**endless, prompt=_PROMPT, stream=True),
        client.chat.completions.create(**endless, messages=_ASK, stream=True),
    ):
        next(iter(stream))
        stream.close()
        _wait(lambda: _is_idle(client), "a stream that was left is dropped")


def the_asynchronous_client(client: OpenAI) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key=client.api_key) as other:

            async def one() -> str:
                stream = await other.completions.create(**_FIXED, prompt=_PROMPT, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one() for _ in range(4)))

    wanted = client.completions.create(**_FIXED, prompt=_PROMPT).choices[0].text
    assert asyncio.run(talk()) == [wanted] * 4


_FEATURES: tuple[Callable[[OpenAI], None], ...] = (
    models,
    completion_and_its_stream,
    echo_with_prompt_logprobs,
    prompts_as_token_ids_and_several_at_once,
    sampling,
    chat_and_its_stream,
    chat_helpers,
    chat_that_goes_on_with_an_answer,
    structured_answers,
    tool_calls,
    files_and_batches,
    a_batch_can_be_cancelled,
    errors,
    another_key_is_refused,
    a_stream_can_be_left,
    the_asynchronous_client,
)


def main(url: str, key: str) -> None:
    """Runs all features."""
    print("openai", openai.__version__)  # noqa: T201
    with OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=_MUST_END_S) as client:
        for feature in _FEATURES:
            began = time.monotonic()
            feature(client)
            took_s = time.monotonic() - began
            print(f"ok {feature.__name__} ({took_s:.1f} s)", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
