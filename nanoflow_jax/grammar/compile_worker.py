"""Compiles grammars in a process of its own, which may die without harm to the engine.

A grammar comes with a request and is not to be trusted. llguidance's limits bound what a lexer or
a parser may grow to, but some schemas of 200 characters (a `allOf` of patterns, say) keep its
compiler busy for hours before any of them counts. So what is to be compiled in the engine has been
compiled here before, where the system ends what takes too much time or memory. This file is started
as a plain script that imports llguidance and nothing of ours.

One JSON object per line comes in, one goes out. The first line in is the vocabulary, the first one
out says that the worker is ready.
"""

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import llguidance
import numpy as np

_STACK_BYTES = 1 << 20


def make_tokenizer(text: str, *, vocab_size: int, eos_ids: Sequence[int]) -> llguidance.LLTokenizer:
    """The vocabulary as llguidance wants it: a tree of the bytes of all tokens.

    Args:
        text: Of tokenizer.json.
        vocab_size: V of the model, at least the tokenizer's.
        eos_ids: End-of-text tokens, at least one.

    Raises:
        ValueError: The bytes of the tokens cannot be told from this file.
    """
    return llguidance.LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_ids))


def compile_grammar(
    tokenizer: llguidance.LLTokenizer, kind: str, text: str
) -> llguidance.LLMatcher:
    """A matcher at the beginning of its text.

    Args:
        tokenizer: From `make_tokenizer`.
        kind: A value of GrammarKind.
        text: The grammar.

    Raises:
        ValueError: The grammar is wrong, passes a limit, or no text can follow it.
    """
    matcher = llguidance.LLMatcher(tokenizer, _source(kind, text), log_level=0, limits=limits())
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    # Builds the lexer's first states, and finds out whether any token may begin a text.
    mask = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
    if matcher.is_error():
        reason = matcher.get_error()
        raise ValueError("no text can follow it" if "NoExtension" in reason else reason)
    return matcher


def limits() -> llguidance.LLParserLimits:
    """What one matcher may cost; docs/decisions.md has measurements."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_items_in_row=2_000,
        max_lexer_states=20_000,  # of 1 to 2 kB each, and every request has its own
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def _source(kind: str, text: str) -> str:
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    if kind == "lark":
        return llguidance.LLMatcher.grammar_from_lark(text)
    # llguidance pastes the text into JSON of its own, so it must be whole.
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(schema, dict | bool):
        raise ValueError(f"a schema is an object, true or false, not {text:.40}")
    return llguidance.LLMatcher.grammar_from_json_schema(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def main(read: BinaryIO, write: BinaryIO, *, seconds: float) -> None:
    """Answers requests until the input ends.

    Args:
        read: The vocabulary, then grammars.
        write: Answers.
        seconds: Processor time of one compilation; the system ends this process when it is over.
    """
    try:
        tokenizer = make_tokenizer(**json.loads(read.readline()))
    except ValueError as error:
        _send(write, {"error": str(error)})
        return
    _send(write, {"ready": True})
    for line in read:
        gc.collect()
        before = _resident_bytes()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            matcher = compile_grammar(tokenizer, **json.loads(line))
            answer: Mapping[str, Any] = {"bytes": max(0, _resident_bytes() - before)}
            del matcher
        except ValueError as error:
            answer = {"error": str(error)}
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        _send(write, answer)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _send(write: BinaryIO, answer: Mapping[str, Any]) -> None:
    write.write(json.dumps(answer).encode() + b"\n")
    write.flush()


if __name__ == "__main__":
    _limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (_limit, _limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Chains of $ref recurse; what fits here fits into any thread of the engine.
    resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, _STACK_BYTES))
    main(sys.stdin.buffer, sys.stdout.buffer, seconds=float(sys.argv[2]))
