import dataclasses

import hypothesis
import pytest
import random_folder
from engine_runs import ask, build_small, run
from hypothesis import strategies as st
from same_tokens import check_same_tokens
from scripted_engine import ScriptedEngine, say

from nanoflow_jax.engine import engine, replicas

_SHAPE = {"max_requests": 3, "dense_batch": 16, "buckets": "16:3:3", "cache_page_size": 8}


class _Scripted(ScriptedEngine):
    """One that can be counted."""

    limits = engine.Limits(vocab_size=1000, max_context_len=50, eos_ids=())

    @property
    def has_work(self):
        return bool(self._queues)

    def check(self):
        pass


def _pair(scripts):
    made = [_Scripted(scripts), _Scripted(scripts)]
    return made, replicas.Replicas(made)


def _script(name, count):
    return say(name, list(range(count)))


def test_a_request_goes_where_the_fewest_tokens_are_left_to_do():
    scripts = {name: _script(name, 3) for name in "abcd"}
    (first, second), both = _pair(scripts)
    for name, prompt_len in (("a", 30), ("b", 5), ("c", 4), ("d", 2)):
        both.add(ask(name, [1] * prompt_len, max_tokens=3))
    assert set(first.requests) == {"a"}
    assert set(second.requests) == {"b", "c", "d"}
    both.check()


def test_a_request_without_a_limit_counts_as_a_whole_context():
    (first, second), both = _pair({name: _script(name, 1) for name in "abc"})
    both.add(ask("a", [1], max_tokens=None))
    both.add(ask("b", [1] * 20, max_tokens=20))
    both.add(ask("c", [1], max_tokens=1))
    assert (set(first.requests), set(second.requests)) == ({"a"}, {"b", "c"})


def test_a_request_that_was_refused_is_nobodys():
    (first, _), both = _pair({"a": _script("a", 1)})
    with pytest.raises(ValueError, match="999 is not a token id"):
        both.add(ask("a", [999]))
    both.check()
    both.add(ask("a", [1]))
    assert set(first.requests) == {"a"}


def test_an_id_in_use_is_refused_whichever_replica_has_it():
    _, both = _pair({"a": _script("a", 2)})
    both.add(ask("a", [1]))
    with pytest.raises(ValueError, match="request id 'a' is already in use"):
        both.add(ask("a", [1]))


@hypothesis.given(st.lists(st.sampled_from(["add", "abort", "step"]), max_size=40), st.randoms())
def test_nothing_is_lost_or_left_over_whatever_comes(turns, random):
    names = [str(i) for i in range(len(turns))]
    made, both = _pair({name: _script(name, 1 + len(name)) for name in names})
    live, waiting = set(), iter(names)
    for turn in turns:
        if turn == "add":
            name = next(waiting)
            both.add(ask(name, [1] * random.randint(1, 9), max_tokens=4))
            live.add(name)
        elif turn == "abort" and live:
            name = random.choice(sorted(live))
            both.abort(name, output_len=None)
            live.discard(name)
        else:
            live -= {u.request_id for u in both.step() if u.finish_reason is not None}
        both.check()
        assert both.has_work == bool(live)
    both.abort("nobody")
    assert sum(len(one.requests) for one in made) == len(set().union(*(o.requests for o in made)))


def test_two_replicas_give_the_tokens_of_one(tmp_path):
    folder = random_folder.write(tmp_path / "model", seed=3)
    prompts = [[(7 * i + j) % 101 for j in range(4 + 3 * i)] for i in range(8)]
    requests = [
        ask(str(i), prompt, max_tokens=12, ignore_eos=True, logprobs=2)
        for i, prompt in enumerate(prompts)
    ]
    one = build_small(folder, **_SHAPE)
    wanted = run(one, requests)
    both = build_small(folder, **_SHAPE, data_parallel=2)
    found = run(both, requests)
    check_same_tokens(
        [output.token_ids for output in found],
        [output.token_ids for output in wanted],
        [output.margins for output in wanted],
    )
    assert both.counters.generated_tokens == one.counters.generated_tokens
    assert len(both.compile_seconds) == 2 * len(one.compile_seconds)
    assert both.num_pages_used == both.num_running == both.num_waiting == 0
    assert dataclasses.asdict(both.counters)["failed_steps"] == 0
    one.close()
    both.close()
