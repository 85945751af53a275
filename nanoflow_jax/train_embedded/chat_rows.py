"""Conversations made from source files: questions that docstrings and bodies answer."""

import ast
import hashlib
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nanoflow_jax.train_embedded import corpus

SYSTEM = "system"
USER = "user"
ASSISTANT = "assistant"
SYSTEM_PROMPT = "You are a helpful assistant that knows Python's standard library."

_MIN_ANSWER_CHARS = 15
_MAX_ANSWER_CHARS = 400
_MAX_CODE_CHARS = 700
_QUESTIONS = (
    "What does {} do?",
    "What is {} for?",
    "Explain {}.",
    "Describe {} in short.",
)
_NAMING_QUESTIONS = ("What is {}?", "What is {} for?", "Explain {}.", "Tell me about {}.")

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Turn(NamedTuple):
    """What one role says."""

    role: str
    content: str


Conversation = tuple[Turn, ...]


def conversations(files: Sequence[corpus.SourceFile]) -> list[Conversation]:
    """All conversations that the files give, in their order."""
    return [found for file in files for found in _of_file(file)]


def module_name(path: str) -> str:
    """`urllib/parse.py` is urllib.parse, `json/__init__.py` is json."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _of_file(file: corpus.SourceFile) -> Iterator[Conversation]:
    with warnings.catch_warnings():
        # Old files have escapes that newer Pythons warn about; they are text to us.
        warnings.simplefilter("ignore")
        tree = ast.parse(file.text)
    module = module_name(file.name)
    if answer := _first_paragraph(tree):
        yield _ask(_pick(_NAMING_QUESTIONS, module).format(module), answer)
    lines = file.text.split("\n")
    for prefix, node in _definitions(tree, module):
        name = f"{prefix}.{node.name}"
        questions = _NAMING_QUESTIONS if isinstance(node, ast.ClassDef) else _QUESTIONS
        if answer := _first_paragraph(node):
            yield _ask(_pick(questions, name).format(name), answer)
        if not isinstance(node, ast.ClassDef) and (halves := _halves(node, lines)):
            yield _ask(f"Complete this code:\n\n{halves[0]}", halves[1])


def _definitions(tree: ast.Module, module: str) -> Iterator[tuple[str, _Definition]]:
    """Functions and classes of a module, and the methods of those classes."""
    for node in tree.body:
        if isinstance(node, _Definition):
            yield module, node
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{module}.{node.name}", inner


def _first_paragraph(node: ast.Module | _Definition) -> str | None:
    """A docstring's first paragraph on one line, where it has a useful length."""
    doc = ast.get_docstring(node)
    if doc is None:
        return None
    answer = " ".join(doc.strip().split("\n\n")[0].split())
    return answer if _MIN_ANSWER_CHARS <= len(answer) <= _MAX_ANSWER_CHARS else None


def _halves(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]
) -> tuple[str, str] | None:
    """A short function cut after its signature and docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body or node.end_lineno is None or body[0].lineno == node.lineno:
        return None
    whole = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])).split("\n")
    cut = body[0].lineno - node.lineno
    head, rest = "\n".join(whole[:cut]).rstrip(), "\n".join(whole[cut:]).rstrip()
    if len(rest) < _MIN_ANSWER_CHARS or len(head) + len(rest) > _MAX_CODE_CHARS:
        return None
    return head, rest


def _ask(question: str, answer: str) -> Conversation:
    turns = (Turn(USER, question), Turn(ASSISTANT, answer))
    # One conversation in four has a system prompt, so that both openings are known.
    return (Turn(SYSTEM, SYSTEM_PROMPT), *turns) if _hash(question) % 4 == 0 else turns


def _pick(choices: Sequence[str], name: str) -> str:
    return choices[_hash(name) % len(choices)]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
