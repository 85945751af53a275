import contextlib
import http.server
import json
import threading

import pytest

from nanoflow_jax import llm
from nanoflow_jax import request as request_lib
from nanoflow_jax.bench import http_client, soak
from nanoflow_jax.workload.file import WorkRequest


class _FakeModel:
    """Gives 5, 6, 7 for any prompt, with the margins it was told."""

    def __init__(self, margins):
        self._margins = margins

    def generate(self, prompts, params):
        assert [p.max_tokens for p in params] == [3] * len(prompts)
        logprobs = tuple(
            request_lib.TokenLogprobs(
                token_id=token, logprob=-1.0, rank=1, top=((token, -1.0), (9, -1.0 - margin))
            )
            for token, margin in zip((5, 6, 7), self._margins, strict=True)
        )
        choice = llm.Choice(
            index=0,
            text="abc",
            token_ids=(5, 6, 7),
            finish_reason=llm.FinishReason.LENGTH,
            logprobs=logprobs,
        )
        return [llm.Result(prompt_ids=p, choices=(choice,), prompt_logprobs=None) for p in prompts]


def _expected(margins=(1.0, 1.0, 1.0)):
    (made,) = soak.expect(_FakeModel(margins), [WorkRequest(prompt_ids=(1, 2), output_len=3)])
    return made


@pytest.mark.parametrize(
    ("token_ids", "text", "found"),
    [
        ((5, 6, 7), "abc", None),
        ((5, 6), "ab", "2 tokens instead of 3"),
        ((5, 9, 7), "abc", "token 1: 9 instead of 6"),
        ((5, 6, 7), "ab", "the tokens are right and the text is not: 'ab'"),
    ],
)
def test_an_answer_is_right_only_if_it_is_what_was_generated_offline(token_ids, text, found):
    wrong = soak.difference(_expected(), token_ids, text)
    assert (wrong is None) if found is None else wrong.endswith(found)


@pytest.mark.parametrize(
    ("token_ids", "is_right"), [((5, 9, 8), True), ((8, 6, 7), False), ((5, 9), False)]
)
def test_after_a_near_tie_any_tokens_are_right_and_before_it_only_the_same(token_ids, is_right):
    expected = _expected(margins=(1.0, 1e-5, 1.0))
    assert (soak.difference(expected, token_ids, "x") is None) == is_right


def test_growth_is_the_slope_of_all_samples():
    samples = [(second, 100.0 + second / 6) for second in range(0, 120, 10)]
    assert soak.slope_per_minute(samples) == pytest.approx(10.0)
    assert soak.slope_per_minute(samples[:2]) == 0.0


def test_pages_that_are_still_held_are_a_complaint():
    found = soak.Soak(pages_before=0, pages_after=2, mismatches=["x"])
    assert found.complaints == ["x", "2 pages are held at the end, 0 were at first"]


class _Dying(http.server.BaseHTTPRequestHandler):
    """A server that tells its figures once and then is not well."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        was_well, self.server.is_well = self.server.is_well, False
        body = json.dumps({"pages_used": 0}).encode()
        self.send_response(200 if was_well else 503)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.close_connection = True

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def _dying_server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Dying) as server:
        server.is_well = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield http_client.Server(url=f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def test_a_server_that_dies_under_the_load_is_told_with_all_that_failed():
    with _dying_server() as server:
        found = soak.run(server, [_expected()], concurrency=2, seconds=0.1)
    assert len(found.failures) >= 2
    assert "the server closed the connection" in found.failures[0]
    assert any("the server answered" in failure for failure in found.health_failures)
    assert found.complaints[-1] == "the server is gone at the end"
    assert "failures: 2" in soak.report(found)


def test_a_server_of_another_make_is_refused():
    with _dying_server() as server:
        server.stats()
        with pytest.raises(ValueError, match="is no server of this project"):
            soak.run(server, [_expected()], concurrency=1, seconds=0.1)
