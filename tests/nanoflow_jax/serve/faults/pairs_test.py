"""Every two features together, on a running server, and what others get after each case.

The cases are a covering array: each pair of values of any two features occurs in one of them.
"""

import contextlib
import dataclasses
import http.client
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import served

_Case = dict[str, str]
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
_JSON = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}
# What each value of a feature adds to a body.
_FEATURES: Mapping[str, Mapping[str, dict[str, Any]]] = {
    "endpoint": {"completions": {}, "chat": {}},
    "n": {"one": {}, "three": {"n": 3}, "six": {"n": 6}},
    "logprobs": {"none": {}, "drawn": {"logprobs": 0}, "several": {"logprobs": 4}},
    "stop": {
        "none": {},
        "text": {"stop": ["e", "never said"]},
        "token": {"stop_token_ids": [40, 300, 301]},
        "kept": {"stop": "a", "include_stop_str_in_output": True, "min_tokens": 4},
    },
    "grammar": {
        "none": {},
        "regex": {"structured_outputs": {"regex": "[a-f ]{4,30}"}},
        "schema": {"response_format": _JSON},
    },
    "penalties": {
        "none": {},
        "openai": {"presence_penalty": 0.7, "frequency_penalty": 0.9},
        "repetition": {"repetition_penalty": 1.4, "logit_bias": {"45": 2.5, "300": -100}},
    },
    "sampling": {"greedy": {"temperature": 0}, "drawn": {"temperature": 0.9, "top_p": 0.9}},
    "stream": {"no": {}, "yes": {"stream": True}},
    "cancel": {"no": {}, "yes": {}},
}


def covering_array(features: Mapping[str, Sequence[str]], *, seed: int) -> list[_Case]:
    """Cases in which every pair of values of two features occurs; greedy, so nearly the fewest."""
    drawn = random.Random(seed)
    missing = {
        ((one, x), (other, y))
        for one, other in itertools.combinations(features, 2)
        for x in features[one]
        for y in features[other]
    }
    cases = []
    while missing:
        tries = [_grow(features, missing, drawn) for _ in range(30)]
        best = max(tries, key=lambda case: len(_pairs(case) & missing))
        missing -= _pairs(best)
        cases.append(best)
    return cases


def _pairs(case: _Case) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(itertools.combinations(case.items(), 2))


def _grow(features: Mapping[str, Sequence[str]], missing: set[Any], drawn: random.Random) -> _Case:
    """A case that has one missing pair, and of each other feature the value that adds most."""
    case = dict(drawn.choice(sorted(missing)))
    for name in drawn.sample(sorted(features), len(features)):
        if name not in case:
            values = drawn.sample(list(features[name]), len(features[name]))
            case[name] = max(
                values, key=lambda value: len(_ordered_pairs(features, case, name, value) & missing)
            )
    return {name: case[name] for name in features}


def _ordered_pairs(
    features: Mapping[str, Sequence[str]], case: _Case, name: str, value: str
) -> set[Any]:
    whole = {**case, name: value}
    return _pairs({key: whole[key] for key in features if key in whole})


_CASES = covering_array({name: list(values) for name, values in _FEATURES.items()}, seed=0)


def test_the_cases_hold_every_pair_and_are_few():
    for one, other in itertools.combinations(_FEATURES, 2):
        found = {(case[one], case[other]) for case in _CASES}
        assert found == set(itertools.product(_FEATURES[one], _FEATURES[other]))
    assert len(_CASES) <= 22


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served.start(tmp_path_factory.mktemp("pairs"), *served.SMALL) as made:
        yield made


_CANARY = {"prompt": "def main():", "max_tokens": 12, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="module")
def known(server):
    """The canary's answer, before anything else was asked."""
    return _canary(server)


def _canary(server: served.Served) -> Any:
    status, found = server.ask("/v1/completions", _CANARY)
    assert status == 200, found
    return found["choices"]


def _request(case: _Case) -> tuple[str, dict[str, Any]]:
    body: dict[str, Any] = {"max_tokens": 40, "seed": 11}
    for name, value in case.items():
        body |= _FEATURES[name][value]
    if case["endpoint"] == "completions":
        return "/v1/completions", {"prompt": "import os\n", **body}
    if "logprobs" in body:
        body["top_logprobs"], body["logprobs"] = body["logprobs"], True
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], **body}


@dataclasses.dataclass
class _Said:
    """What one choice says."""

    text: str = ""
    tokens: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: str | None = None

    def add(self, part: Any) -> None:
        """Adds a choice of an answer, or a piece of one."""
        assert self.reason is None, "a piece came after the last one"
        words = part.get("delta", part.get("message", {})).get("content")
        self.text += part.get("text", words or "")
        self.reason = part["finish_reason"]
        shown = part.get("logprobs") or {}
        for entry in shown.get("content", ()):
            self.tokens.append(entry["token"])
            self.logprobs.append(entry["logprob"])
        self.tokens += shown.get("tokens", ())
        self.logprobs += shown.get("token_logprobs", ())


def _said(answers: Sequence[Any], n: int) -> list[_Said]:
    """What the choices of an answer say, of a whole one or of its pieces."""
    found = [_Said() for _ in range(n)]
    for answer in answers:
        for part in answer["choices"]:
            found[part["index"]].add(part)
    return found


def _leave(server: served.Served, path: str, body: dict[str, Any]) -> None:
    """Asks, and hangs up once the engine works on it or has said something."""
    steps = server.stats()["totals"]["steps"]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json"}
        connection.request("POST", path, json.dumps({**body, "max_tokens": 200}), headers)
        if body.get("stream"):
            with connection.getresponse() as answer:
                assert answer.readline().startswith(b"data: ")
        else:
            server.wait_for(lambda stats: stats["totals"]["steps"] > steps)


@pytest.mark.parametrize("case", _CASES, ids=lambda case: "-".join(case.values()))
def test_any_two_features_work_together_and_harm_nobody(server, known, case):
    path, body = _request(case)
    if case["cancel"] == "yes":
        _leave(server, path, body)
        assert _canary(server) == known
    whole = {name: value for name, value in body.items() if name != "stream"}
    status, answer = server.ask(path, whole)
    assert status == 200, answer
    wanted = _said([answer], body.get("n", 1))
    for ours, theirs in zip(_said(server.events(path, whole), len(wanted)), wanted, strict=True):
        assert (ours.text, ours.tokens, ours.reason) == (theirs.text, theirs.tokens, theirs.reason)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
        assert bool(ours.tokens) == (case["logprobs"] != "none")
        assert ours.reason in ("stop", "length")
    assert _canary(server) == known
    server.wait_idle()
