"""C5, C6, C7, C9, C10, C12: whatever a body holds, it is bounded, and others are served."""

import contextlib
import http.client
import json
import random
import socket
import threading

import pytest
import served

_PROMPT = {"prompt": "def main():", "max_tokens": 12, "temperature": 0}
_COMPLETIONS, _CHAT = "/v1/completions", "/v1/chat/completions"
_HELLO = [{"role": "user", "content": "hi"}]
_JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served.start(tmp_path_factory.mktemp("server"), *served.SMALL) as made:
        yield made


@pytest.fixture(scope="module")
def known(server):
    status, answer = server.ask(_COMPLETIONS, _PROMPT)
    assert status == 200
    return answer["choices"][0]["text"]


class _Canaries(threading.Thread):
    """Asks for known tokens again and again, and whether the server is well."""

    def __init__(self, server, known):
        super().__init__()
        self._server = server
        self._known = known
        self._ends = threading.Event()
        self.wrong = []
        self.count = 0

    def run(self):
        while not self._ends.is_set():
            try:
                events = self._server.events(_COMPLETIONS, _PROMPT)
                text = "".join(c["text"] for event in events for c in event["choices"])
                health = self._server.ask("/health")
            except (AssertionError, OSError, http.client.HTTPException) as error:
                self.wrong.append(error)
                continue
            if text != self._known or health != (200, {"status": "ready"}):
                self.wrong.append((text, health))
            self.count += 1
            self._ends.wait(0.1)  # others need the processor too

    def end(self):
        self._ends.set()
        self.join()


@contextlib.contextmanager
def _canaries(server, known):
    """Others are served as ever while this holds."""
    made = _Canaries(server, known)
    made.start()
    try:
        yield made
        while made.is_alive() and not made.count and not made.wrong:
            made.join(0.05)
    finally:
        made.end()
    assert made.wrong == []
    assert made.count


class _Asker:
    """One connection to a server, on which whole bodies are sent."""

    def __init__(self, server):
        self._server = server
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)

    def __call__(self, path, data, method="POST"):
        """Status and bytes of the answer; of a stream too."""
        self._connection.request(method, path, data, _JSON)
        with self._connection.getresponse() as answer:
            return answer.status, answer.read()


@pytest.fixture
def asker(server):
    made = _Asker(server)
    yield made
    made._connection.close()


# Beyond every bound; that a body's own limit bounds the rest is tested below.
_HUGE = {
    "text": '"' + "ab " * 30_000 + '"',
    "ids": "[" + "1," * 49_999 + "1]",
    "texts": "[" + '"a",' * 24_999 + '"a"]',
    "messages": "[" + '{"role":"user","content":"a"},' * 8_192 + '{"role":"user","content":"a"}]',
    "object": "{" + ",".join(f'"{i}":1' for i in range(10_000)) + "}",
    "deep": "[" * 900 + "]" * 900,
    "integer": "1" + "0" * 4000,
}
# Beside those of the schema.
_MORE_FIELDS = {
    _COMPLETIONS: ("best_of", "response_format", "structured_outputs", "suffix", "bad_words"),
    _CHAT: ("tools", "tool_choice", "response_format", "guided_choice", "metadata", "functions"),
    "/tokenize": ("messages",),
    "/detokenize": (),
    "/v1/batches": (),
}
_BASE = {
    _COMPLETIONS: {"prompt": "x", "max_tokens": 1},
    _CHAT: {"messages": _HELLO, "max_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
    "/v1/batches": {"input_file_id": "f", "endpoint": "x", "completion_window": "24h"},
}
# Ask for nothing that could cost anything: a number of any size, or a text that is not looked at.
_HARMLESS = 200


def _fields(schema, path):
    body = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    forms = (body, *body.get("anyOf", ()), *body.get("oneOf", ()))
    found = {name for form in forms for name in form.get("properties", ())}
    assert found, body
    return sorted({*found, *_MORE_FIELDS[path]})


@pytest.mark.parametrize("path", list(_BASE))
def test_c5_every_list_count_and_string_is_bounded_before_work(server, known, asker, path):
    fields = _fields(server.ask("/openapi.json")[1], path)
    with _canaries(server, known):
        for field in fields:
            rest = {name: value for name, value in _BASE[path].items() if name != field}
            head = json.dumps(rest)[:-1] + (", " if rest else "") + f'"{field}": '
            for name, value in _HUGE.items():
                status, answer = asker(path, f"{head}{value}}}")
                assert status in (400, 404, 413, _HARMLESS), (field, name, status, answer[:200])
                # Token ids become text there, and text token ids.
                most = 500_000 if path in ("/tokenize", "/detokenize") else 10_000
                assert len(answer) < most, (field, name)
                if path in (_COMPLETIONS, _CHAT) and status == _HARMLESS:
                    assert json.loads(answer)["usage"]["completion_tokens"] == 1, (field, name)
    server.wait_idle()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["ab " * 80] * 1024, "max_tokens": 1, "n": 2},
        {"prompt": [[1]] * 2049},
        {"prompt": "x", "n": 128, "allowed_token_ids": [1] * 8193},
        {"prompt": "x", "max_tokens": 1, "truncate_prompt_tokens": 1, "stop": ["a" * 1025]},
        {"prompt": "ab " * 600_000, "truncate_prompt_tokens": 1},
        {"prompt": "ab " * 1_300_000},
        {"prompt": "a" * 4_000_000},
    ],
)
def test_c5_what_is_large_only_together_is_bounded_too(server, known, body):
    with _canaries(server, known):
        status, _ = server.ask(_COMPLETIONS, body)
    assert status in (400, 429)


def test_c5_more_logprobs_than_a_server_has_room_for_are_refused_before_work(server, known):
    body = {"prompt": [[5] * 200] * 1000, "max_tokens": 1, "echo": True, "logprobs": 20}
    with _canaries(server, known):
        status, answer = server.ask(_COMPLETIONS, body)
    assert status == 400
    assert (
        "the answer could show 4221000 log-probabilities, and at most 4194304 are shown at once"
        in answer["error"]["message"]
    )


def test_c5_the_most_that_is_allowed_at_once_is_served_beside_others(server, known):
    body = {
        "prompt": "x",
        "n": 128,
        "max_tokens": 5,
        "allowed_token_ids": [7] * 8192,
        "logit_bias": {str(i): 1 for i in range(300)},
        "stop": [chr(0x4E00 + i) * 1024 for i in range(16)],
        "stop_token_ids": list(range(1000, 1128)),
        "logprobs": 20,
    }
    with _canaries(server, known):
        status, answer = server.ask(_COMPLETIONS, body)
    assert status == 200, answer
    assert [len(c["logprobs"]["tokens"]) for c in answer["choices"]] == [5] * 128


def test_c5_a_body_larger_than_the_limit_is_answered_though_it_is_still_being_sent(server, known):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {**_JSON, "connection": "close"}
    with _canaries(server, known), contextlib.closing(connection):
        connection.request("POST", _COMPLETIONS, b" " * (16 << 20), headers)
        answer = connection.getresponse()
        assert answer.status == 413
        assert json.load(answer)["error"]["code"] == "body_too_large"


_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e300, 2**31, 2**63, 10**25, "", "x", "none"),
    *("auto", "required", "\u0000", "\ud800", "😀" * 50, [], [0], [-1], [10**9], [[]], [[1], [2]]),
    *(["a"], [""], ["a", 1], {}, {"1": 1}, {"a": {}}, {"type": "text"}, {"type": "json_object"}),
    *({"regex": "a+"}, {"regex": "("}, {"json": {"type": "object"}}, {"choice": ["a", "b"]}),
    *({"json": {"$ref": "#"}}, {"grammar": "start: start"}, {"include_usage": True}),
    [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": []}],
    [{"role": "tool", "content": [{"type": "text", "text": "a"}], "tool_call_id": "x"}],
)


def _random_body(chance, fields, base):
    body = dict(base)
    for field in chance.sample(fields, chance.randint(1, min(5, len(fields)))):
        body[field] = chance.choice(_VALUES)
    if chance.random() < 0.1:
        body[chance.choice(["x", "", "\u0000", "a" * 500])] = chance.choice(_VALUES)
    if isinstance(body.get("n"), int) and body["n"] > 4:
        body["n"] = 4
    return body


def test_c6_whatever_the_body_others_finish_and_health_stays_well(server, known, asker):
    schema = server.ask("/openapi.json")[1]
    chance = random.Random(6)
    statuses = []
    with _canaries(server, known):
        for _ in range(200):
            path = chance.choice(list(_BASE))
            fields = [name for name in _fields(schema, path) if not name.startswith("max_")]
            body = _random_body(chance, fields, _BASE[path])
            status, answer = asker(path, json.dumps(body))
            assert status < 500, (path, body, answer)
            statuses.append(status)
    assert {200, 400} <= set(statuses)
    server.wait_idle()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"prompt": "\xff"}', b'{"a": NaN}', b"[" * 10_000],
)
@pytest.mark.parametrize("path", list(_BASE))
def test_c6_a_body_that_is_no_json_object_is_refused(asker, path, data):
    status, answer = asker(path, data)
    assert status == 400
    assert json.loads(answer)["error"]["code"] in (
        *("invalid_json", "invalid_request", "unknown_parameter"),
    )


@pytest.mark.parametrize(
    ("path", "field"),
    [(_COMPLETIONS, "prompt"), ("/tokenize", "model"), ("/v1/batches", "metadata")],
)
def test_c6_a_body_nested_at_any_depth_is_refused(asker, path, field):
    for depth in range(900, 1000):  # at one of them Python can read the body, but not write it
        status, answer = asker(path, f'{{"{field}": {"[" * depth}{"]" * depth}}}')
        assert status == 400, (depth, answer)


_MANY = {"allOf": [{"type": "string", "pattern": f"^(a|b{i}){{1,60}}$"} for i in range(100)]}
_REFS = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(1000)}


@pytest.mark.parametrize(
    "asked",
    [
        {"json": _MANY},
        {"json": {"$defs": {**_REFS, "a1000": {}}, "$ref": "#/$defs/a0"}},
        {"json": {"$ref": "http://127.0.0.1:9/x.json"}},
        {"regex": "(" * 20_000},
        {"grammar": "start: " + "(" * 5000},
        {"grammar": "start: foo"},
    ],
)
def test_c7_a_hostile_grammar_is_refused_beside_others(server, known, asked):
    with _canaries(server, known):
        status, answer = server.ask(_COMPLETIONS, {**_PROMPT, "structured_outputs": asked})
    assert (status, answer["error"]["param"]) == (400, "response_format")


def test_c7_a_good_grammar_is_served_after_a_client_with_a_hostile_one_left(server):
    body = {**_PROMPT, "structured_outputs": {"json": _MANY}}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", _COMPLETIONS, json.dumps(body), _JSON)
    connection.close()
    status, answer = server.ask(
        _COMPLETIONS, {**_PROMPT, "structured_outputs": {"choice": ["yes"]}}
    )
    assert (status, answer["choices"][0]["text"]) == (200, "yes")


def _batch_counts(server, bodies):
    """Counts of the rows of a batch of such bodies, at its end."""
    envelope = {"method": "POST", "url": _COMPLETIONS}
    rows = [{"custom_id": str(i), **envelope, "body": body} for i, body in enumerate(bodies)]
    batch = server.wait_for_batch(
        server.begin_batch(rows), lambda batch: batch["status"] in ("completed", "failed")
    )
    assert batch["status"] == "completed", batch
    return batch["request_counts"]


def test_c7_a_hostile_grammar_in_a_batch_fails_its_row_alone_beside_others(server, known):
    asked = [{"json": _MANY}, {"choice": ["yes"]}, {"regex": "("}, {"choice": ["no"]}]
    bodies = [{**_PROMPT, "structured_outputs": outputs} for outputs in asked]
    with _canaries(server, known):
        counts = _batch_counts(server, bodies)
    assert counts == {"total": 4, "completed": 2, "failed": 2}


@pytest.mark.parametrize("token", [-1, 4096, 2**63, 2**64, 10**30])
def test_c10_a_number_that_is_no_token_id_fails_its_row_of_a_batch_alone(server, token):
    counts = _batch_counts(server, [{**_PROMPT, "prompt": [1, token]}, _PROMPT])
    assert counts == {"total": 2, "completed": 1, "failed": 1}


@pytest.fixture
def listener():
    """A place on this machine that nobody may call."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made
        made.setblocking(False)
        with pytest.raises(BlockingIOError):
            made.accept()


def _with_urls(url):
    kinds = {
        "image_url": {"url": url},
        "input_audio": {"data": url, "format": "wav"},
        "audio_url": {"url": url},
        "video_url": {"url": url},
        "file": {"file_id": url},
        "input_image": url,
    }
    for kind, value in kinds.items():
        part = {"type": kind, kind: value}
        yield _CHAT, {"messages": [{"role": "user", "content": [part]}]}
        yield "/tokenize", {"messages": [{"role": "user", "content": [part]}]}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": url}}}
    yield _COMPLETIONS, {"prompt": "x", "response_format": schema}
    yield _COMPLETIONS, {"prompt": "x", "prompt_url": url}
    yield _COMPLETIONS, {"prompt": {"url": url}}
    yield _CHAT, {"messages": _HELLO, "web_search_options": {"url": url}}
    yield _CHAT, {"messages": _HELLO, "audio": {"url": url}}
    yield _CHAT, {"messages": _HELLO, "chat_template": url}
    yield "/v1/batches", {**_BASE["/v1/batches"], "input_file_id": url, "endpoint": _CHAT}
    yield "/v1/batches", {**_BASE["/v1/batches"], "webhook": url}


def test_c9_no_url_of_a_request_is_ever_fetched(server, listener):
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"
    for path, body in _with_urls(url):
        status, answer = server.ask(path, body)
        wanted = 404 if answer["error"]["code"] == "file_not_found" else 400
        assert status == wanted, (body, answer)
    # As text it is text.
    body = {"messages": [{"role": "user", "content": url}], "max_tokens": 2}
    assert server.ask(_CHAT, body)[0] == 200
    assert server.ask(_COMPLETIONS, {"prompt": url, "user": url, "max_tokens": 2})[0] == 200
    server.wait_idle()


@pytest.mark.parametrize("token", [-1, 4096, 2**31, 2**63, 2**64, 10**30, 1.5, True, "1"])
def test_c10_a_token_id_outside_the_vocabulary_is_refused(server, token):
    bodies = [
        (_COMPLETIONS, {"prompt": [1, token]}),
        (_COMPLETIONS, {"prompt": [[1], [token]]}),
        (_COMPLETIONS, {"prompt": "x", "stop_token_ids": [token]}),
        (_COMPLETIONS, {"prompt": "x", "allowed_token_ids": [token]}),
        (_COMPLETIONS, {"prompt": "x", "logit_bias": {json.dumps(token): 1}}),
        (_CHAT, {"messages": _HELLO, "stop_token_ids": [token]}),
        ("/detokenize", {"tokens": [token]}),
    ]
    for path, body in bodies:
        status, answer = server.ask(path, body)
        assert status == 400, (body, answer)
    assert server.ask(_COMPLETIONS, {"prompt": [4095], "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    "name",
    [
        *("../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/x", "/etc/passwd"),
        *(
            "file-0%00",
            "%00",
            "..",
            ".",
            "%2e",
            "file-../x",
            "~root",
            "file-" + "0" * 24,
            "a" * 9999,
        ),
        *("%ff", "file-0%0d%0aX:%20y", "..%5c..%5cx"),
    ],
)
def test_c11_no_name_in_a_path_leads_to_a_file(server, asker, name):
    for method, path in (
        ("GET", f"/v1/files/{name}"),
        ("GET", f"/v1/files/{name}/content"),
        ("DELETE", f"/v1/files/{name}"),
        ("GET", f"/v1/batches/{name}"),
        ("POST", f"/v1/batches/{name}/cancel"),
        ("GET", f"/page/{name}"),
        ("GET", f"/{name}"),
    ):
        status, answer = asker(path, None, method)
        assert status in (400, 404, 405, 503), (method, path, status)
        assert b"root:x:" not in answer
    body = {"input_file_id": name, "endpoint": _COMPLETIONS, "completion_window": "24h"}
    assert server.ask("/v1/batches", body)[0] in (400, 404)


def test_c12_no_request_tells_what_others_asked(server):
    """There is no prefix cache: nothing of a prompt outlives its request, salted or not."""
    secret = {"prompt": "the secret of somebody " * 5, "max_tokens": 8, "temperature": 0}
    answers = []
    for body in (secret, {**secret, "cache_salt": "a"}, _PROMPT, {**secret, "cache_salt": "b"}):
        status, answer = server.ask(_COMPLETIONS, body)
        assert status == 200
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        answers.append(answer["choices"])
    assert answers[0] == answers[1] == answers[3] != answers[2]
    status, answer = server.ask(_CHAT, {"messages": _HELLO, "cache_salt": "a", "max_tokens": 2})
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
