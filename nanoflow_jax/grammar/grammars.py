"""Compiled grammars of one model, kept for the next request that has the same."""

import collections
import dataclasses
import threading
from collections.abc import Collection
from pathlib import Path

import llguidance

from nanoflow_jax import request as request_lib
from nanoflow_jax.grammar import compile_process, compile_worker, matcher, vocabulary

_LEAST_BYTES = 128 << 10  # of one kept grammar: what is too small to be measured
_KEPT_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """A compiled grammar.

    Attributes:
        compiled: At the beginning of its text; to be copied.
        num_bytes: What it keeps, about.
    """

    compiled: llguidance.LLMatcher
    num_bytes: int


class Grammars:
    """Makes matchers for the requests of one model. Safe to share between threads.

    Reads the tokenizer when the first grammar comes. Nothing is kept on disk.
    Invariant: the kept grammars take at most `kept_bytes`, unless one alone takes more.
    """

    def __init__(
        self,
        folder: Path,
        *,
        vocab_size: int,
        eos_ids: Collection[int],
        limits: compile_process.CompileLimits | None = None,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        """Names the model.

        Args:
            folder: Holds tokenizer.json.
            vocab_size: V of the model.
            eos_ids: The model's end-of-text tokens.
            limits: What compiling one grammar may cost.
            kept_bytes: Memory for compiled grammars.
        """
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self._limits = limits
        self._kept_bytes = kept_bytes
        self._kept: collections.OrderedDict[request_lib.Grammar, Kept] = collections.OrderedDict()
        self._vocabulary: vocabulary.Vocabulary | None = None
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._process: compile_process.CompileProcess | None = None
        self._lock = threading.Lock()  # of what is kept
        self._reading = threading.Lock()

    def matcher(self, grammar: request_lib.Grammar) -> matcher.Matcher:
        """A matcher at the beginning of a text.

        A grammar not seen lately is compiled twice: in the process that may die, then here.

        Raises:
            ValueError: The grammar is wrong or too costly, or the tokenizer cannot be used.
        """
        kept = self.prepare(grammar)
        return matcher.Matcher(kept.compiled.deep_copy(), self._read()[0].known)

    def prepare(self, grammar: request_lib.Grammar) -> Kept:
        """Compiles a grammar, unless it is kept; other threads run meanwhile.

        Raises:
            ValueError: As `matcher`.
        """
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept
        kept = self._compile(grammar)
        with self._lock:
            self._kept[grammar] = kept
            while len(self._kept) > 1 and self.kept_bytes > self._kept_bytes:
                self._kept.popitem(last=False)
        return kept

    def has(self, grammar: request_lib.Grammar) -> bool:
        """Whether a matcher can be had at once."""
        return grammar in self._kept

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept grammars, about."""
        return sum(kept.num_bytes for kept in self._kept.values())

    @property
    def num_kept(self) -> int:
        """Grammars kept."""
        return len(self._kept)

    def close(self) -> None:
        """Ends the process that compiles."""
        if self._process is not None:
            self._process.close()

    def _read(self) -> tuple[vocabulary.Vocabulary, compile_process.CompileProcess]:
        with self._reading:
            if self._vocabulary is None or self._process is None:
                self._vocabulary = vocabulary.Vocabulary.load(
                    self._folder, vocab_size=self._vocab_size, eos_ids=self._eos_ids
                )
                self._process = compile_process.CompileProcess(self._vocabulary, self._limits)
            return self._vocabulary, self._process

    def _compile(self, grammar: request_lib.Grammar) -> Kept:
        words, process = self._read()
        num_bytes = process.check(grammar)
        with self._reading:
            if self._tokenizer is None:
                self._tokenizer = compile_worker.make_tokenizer(
                    words.text, vocab_size=words.size, eos_ids=words.eos_ids
                )
        compiled = compile_worker.compile_grammar(self._tokenizer, grammar.kind.value, grammar.text)
        return Kept(compiled=compiled, num_bytes=max(num_bytes, _LEAST_BYTES) + len(grammar.text))
