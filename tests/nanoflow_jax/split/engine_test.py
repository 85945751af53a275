"""Sessions over two engines give what one process gives, alone and beside all others."""

import pytest
import random_folder
import split_runs
from engine_runs import ask, build_small, run
from split_runs import Session, build_split, greedy

_LAYERS, _VOCAB = 4, 101
_KNOBS = {
    "max_requests": 8,
    "dense_batch": 24,
    "buckets": "2:2:0,8:8:0,24:8:8",
    "cache_page_size": 5,
    "max_context_len": 64,
    "cache_num_pages": 60,
}
_PROMPTS = [[7, 3, 50, 2, 91, 17, 33], [5], [i % _VOCAB for i in range(9, 90, 3)], [44, 45]]
_LENGTH = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_folder.write(
        tmp_path_factory.mktemp("model") / "llama", seed=3, num_hidden_layers=_LAYERS
    )


@pytest.fixture(scope="module")
def wanted(folder):
    """What one process says to each prompt."""
    whole = build_small(folder, **_KNOBS)
    asked = [ask(str(i), p, max_tokens=_LENGTH, ignore_eos=True) for i, p in enumerate(_PROMPTS)]
    found = [output.token_ids for output in run(whole, asked)]
    whole.close()
    return found


@pytest.fixture(scope="module")
def server(folder):
    made = build_split(folder, grid=(1, 2, 3), **_KNOBS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(folder):
    """It has all layers too, so that each plan can be had of it."""
    made = build_split(folder, grid=(1, 2, 3), layers=[(0, 4)], **_KNOBS)
    yield made
    made.close()


def _session(name, prompt, plan, **more):
    return Session(name=name, prompt=prompt, plan=plan, params=greedy(max_tokens=_LENGTH), **more)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_session_of_two_pieces_gives_the_tokens_of_one_process(server, client, wanted, cut):
    for first, last in ((client, server), (server, client)):
        plan = [(first, 0, cut), (last, cut, _LAYERS)]
        for prompt, tokens in zip(_PROMPTS, wanted, strict=True):
            session = _session("a", prompt, plan)
            session.open()
            split_runs.finish([client, server], [session])
            assert session.token_ids == tokens
            assert session.finish_reason == "length"
