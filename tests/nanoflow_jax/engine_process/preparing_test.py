import queue
import threading

import pytest

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine_process import messages, preparing


class _FakeGrammars:
    """Compiles when it is told to."""

    def __init__(self):
        self.may_go_on = threading.Event()
        self.asked = queue.SimpleQueue()
        self.error = None
        self.kept = set()

    def has(self, grammar):
        return grammar in self.kept

    def prepare(self, grammar):
        self.asked.put(grammar.text)
        assert self.may_go_on.wait(60)
        if self.error is not None:
            raise self.error
        self.kept.add(grammar)


def _submit(name, text="a"):
    grammar = text and request_lib.Grammar(kind=request_lib.GrammarKind.REGEX, text=text)
    return messages.Submit(
        request_id=name,
        prompt_ids=(1,),
        params=request_lib.SamplingParams(seed=1, grammar=grammar or None),
        priority=0,
        stream=False,
        sent_s=0.0,
    )


@pytest.fixture
def grammars():
    return _FakeGrammars()


@pytest.fixture
def told():
    return queue.SimpleQueue()


def test_c7_a_request_is_held_until_its_grammar_is_there(grammars, told):
    made = preparing.Preparer(grammars, told.put)
    submit = _submit("a")
    assert made.try_hold(submit)
    assert grammars.asked.get(timeout=60) == "a"
    assert told.empty()
    grammars.may_go_on.set()
    assert told.get(timeout=60) == preparing.Prepared(submit=submit)
    assert made.release("a")
    assert not made.release("a")
    assert not made.try_hold(submit)  # it is kept


def test_a_request_that_needs_no_compilation_is_not_held(grammars, told):
    made = preparing.Preparer(grammars, told.put)
    assert not made.try_hold(_submit("a", text=""))
    assert not preparing.Preparer(None, told.put).try_hold(_submit("a"))


def test_nothing_is_compiled_for_a_request_that_was_let_go(grammars, told):
    made = preparing.Preparer(grammars, told.put)
    for name in "abc":
        made.try_hold(_submit(name, text=name))
    assert grammars.asked.get(timeout=60) == "a"
    assert made.release("b")
    grammars.may_go_on.set()
    assert [told.get(timeout=60).submit.request_id for _ in range(2)] == ["a", "c"]
    assert grammars.asked.get(timeout=60) == "c"


@pytest.mark.parametrize("error", [ValueError("too large"), OSError("no process")])
def test_whatever_fails_is_said_and_the_next_grammar_is_compiled(grammars, told, error):
    made = preparing.Preparer(grammars, told.put)
    grammars.may_go_on.set()
    grammars.error = error
    made.try_hold(_submit("a"))
    assert told.get(timeout=60).error == str(error)
    grammars.error = None
    made.try_hold(_submit("b"))
    assert told.get(timeout=60).error is None
