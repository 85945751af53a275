"""Text of a token stream, as soon as it is certain.

The decoder of a tokenizer is a chain of steps, each of which turns a list of strings into another.
Here every step is a small machine that takes one string at a time and remembers only what it must,
so that what comes out, put together, is exactly what decoding all tokens at once gives. (Decoding a
window of recent tokens again for every token, as tokenizers' DecodeStream does, is not: one invalid
byte turns a whole run of byte tokens, already emitted, into replacement characters.)
"""

import codecs
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from nanoflow_jax.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Prompt tokens looked at for one with text; only special and byte tokens have none.
_TAIL = 8


class Detokenizer:
    """Decodes one sequence, token by token, in constant time per token.

    All pushes and the finish, put together, are `tokenizer.decode` of all ids. A piece never ends
    in half a character. A run of byte tokens (`<0xE2>`) is one unit: whether it is text depends on
    all of it, so its text comes with the next ordinary token.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        """Start an empty sequence.

        Raises:
            ValueError: The tokenizer's decoder has a step that cannot be streamed.
        """
        self._id_to_token = tokenizer.id_to_token
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._steps = _steps(tokenizer.decoder)

    def push(self, token_id: int) -> str:
        """Add one token.

        Returns:
            The text that became certain, often empty.
        """
        token = self._id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        pieces = [token]
        for step in self._steps:
            pieces = [out for piece in pieces for out in step.push(piece)]
        return "".join(pieces)

    def finish(self) -> str:
        """End the sequence.

        Returns:
            The text held back; bytes that never became a character are U+FFFD.
        """
        pieces: list[str] = []
        for step in self._steps:
            pieces = [out for piece in pieces for out in step.push(piece)]
            pieces += step.finish()
        return "".join(pieces)


def continuing(
    tokenizer: Tokenizer, prompt_ids: Sequence[int], *, skip_special_tokens: bool
) -> Detokenizer:
    """A detokenizer for what follows a prompt.

    Decoders of the SentencePiece kind drop the space before the first word of a text. After a
    prompt that ends in text the first generated word is not that word, so the decoder is shown
    the prompt's last token with text; what that gives is not part of the output.
    """
    for token in reversed(prompt_ids[-_TAIL:]):
        made = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        if made.push(token):
            return made
    return Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)


class _Step(Protocol):
    """One step of a decoder, on a stream of strings."""

    def push(self, piece: str) -> list[str]: ...

    def finish(self) -> list[str]: ...


class _Stateless:
    """A step that holds nothing back."""

    def finish(self) -> list[str]:
        return []


class _ByteLevel:
    """Each character of a token is one byte; a token with any other character is plain text."""

    def __init__(self) -> None:
        self._bytes = _byte_of_character()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> list[str]:
        try:
            data = bytes([self._bytes[character] for character in piece])
        except KeyError:
            data = piece.encode()
        return [self._utf8.decode(data)]

    def finish(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """Runs of byte tokens become text, or one U+FFFD per byte if they are not UTF-8."""

    def __init__(self) -> None:
        self._run = bytearray()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._invalid = False

    def push(self, piece: str) -> list[str]:
        match = _BYTE_TOKEN.fullmatch(piece)
        if match is None:
            return [*self.finish(), piece]
        if self._invalid:
            return [_REPLACEMENT]
        byte = bytes.fromhex(match[1])
        self._run += byte
        try:
            self._utf8.decode(byte)
        except UnicodeDecodeError:
            self._invalid = True
            return [_REPLACEMENT] * len(self._run)
        return []

    def finish(self) -> list[str]:
        run, invalid = bytes(self._run), self._invalid
        self._run.clear()
        self._utf8.reset()
        self._invalid = False
        if invalid or not run:
            return []
        try:
            return [run.decode()]
        except UnicodeDecodeError:
            return [_REPLACEMENT] * len(run)


class _Metaspace(_Stateless):
    """The mark is a space; in the first token it is nothing, if the encoder put one there."""

    def __init__(self, mark: str, *, drop_first: bool) -> None:
        self._mark = mark
        self._drop = drop_first

    def push(self, piece: str) -> list[str]:
        drop, self._drop = self._drop, False
        return [piece.replace(self._mark, "" if drop else " ")]


class _Replace(_Stateless):
    """One text for another inside each token."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern = pattern
        self._content = content

    def push(self, piece: str) -> list[str]:
        return [piece.replace(self._pattern, self._content)]


class _StripStart(_Stateless):
    """Takes up to `most` characters off the beginning: of each token, or of a fused text."""

    def __init__(self, character: str, most: int, *, fused: bool) -> None:
        self._character = character
        self._most = most
        self._left = most
        self._fused = fused

    def push(self, piece: str) -> list[str]:
        if not self._fused:
            self._left = self._most
        cut = 0
        while cut < min(self._left, len(piece)) and piece[cut] == self._character:
            cut += 1
        # Only a beginning that is the character all through leaves more to strip.
        self._left = self._left - cut if cut == len(piece) else 0
        return [piece[cut:]]


class _Join(_Stateless):
    """Tokens of a tokenizer without decoder are words."""

    def __init__(self) -> None:
        self._first = True

    def push(self, piece: str) -> list[str]:
        first, self._first = self._first, False
        return [piece if first else " " + piece]


def _steps(decoder: Mapping[str, Any] | None) -> list[_Step]:
    if decoder is None:
        return [_Join()]
    steps: list[_Step] = []
    fused = False
    for part in _flatten(decoder):
        match part:
            case {"type": "Fuse"}:
                fused = True
            case {"type": "ByteLevel"} if not fused:
                steps.append(_ByteLevel())
                fused = True
            case {"type": "ByteFallback"} if not fused:
                steps.append(_ByteFallback())
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme} if not fused:
                steps.append(_Metaspace(mark, drop_first=scheme != "never"))
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": content} if (
                pattern and not (fused and len(pattern) > 1)
            ):
                steps.append(_Replace(pattern, content))
            case {"type": "Strip", "content": character, "start": most, "stop": 0}:
                steps.append(_StripStart(character, most, fused=fused))
            case _:
                raise ValueError(
                    f"the tokenizer's decoder has the step {dict(part)}, whose text cannot be "
                    "streamed; supported are ByteLevel, ByteFallback, Metaspace, Replace of a "
                    "text, Fuse and Strip at the start: use a model with such a tokenizer.json"
                )
    return steps


def _flatten(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flatten(part)
    else:
        yield decoder


@functools.cache
def _byte_of_character() -> Mapping[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
