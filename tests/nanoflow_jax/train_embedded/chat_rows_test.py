"""Questions come from names, answers from docstrings and bodies."""

import pathlib

import pytest

from nanoflow_jax.train_embedded import chat_rows, corpus
from tests.nanoflow_jax.train_embedded import library

_SOURCE = '''"""Tools for text.

More about them.
"""


class Wrapper:
    """Wraps lines
    of text."""

    def wrap(self, text):
        return self._split(text) or [text]


def short(): return 1
'''


def _file(text: str, name: str = "text/tools.py") -> corpus.SourceFile:
    return corpus.SourceFile(name=name, text=text, sha256="")


def test_docstrings_and_bodies_become_turns() -> None:
    found = chat_rows.conversations([_file(_SOURCE)])
    spoken = [(c[-2].content, c[-1].content) for c in found]
    assert [answer for _, answer in spoken] == [
        "Tools for text.",
        "Wraps lines of text.",
        "    return self._split(text) or [text]",
    ]
    assert "text.tools" in spoken[0][0]
    assert "text.tools.Wrapper" in spoken[1][0]
    assert spoken[2][0] == "Complete this code:\n\ndef wrap(self, text):"


def test_a_user_asks_and_the_assistant_answers_last(tmp_path: pathlib.Path) -> None:
    found = chat_rows.conversations(corpus.read_corpus(library.write(tmp_path)))
    openings = {tuple(turn.role for turn in c) for c in found}
    assert openings == {("user", "assistant"), ("system", "user", "assistant")}
    assert len(found) == 24 * (1 + 2 * 6)


@pytest.mark.parametrize(
    ("path", "name"),
    [("re/__init__.py", "re"), ("urllib/parse.py", "urllib.parse"), ("os.py", "os")],
)
def test_modules_are_called_as_in_an_import(path: str, name: str) -> None:
    assert chat_rows.module_name(path) == name


def test_very_long_and_very_short_answers_are_left_out() -> None:
    long = f'def f(x):\n    """{"word " * 100}"""\n    return {"x + " * 300}x\n'
    short = 'def g(x):\n    """No."""\n    pass\n'
    assert chat_rows.conversations([_file(long), _file(short)]) == []
