"""How single tokens are written where log-probabilities are shown."""

import re

from nanoflow_jax.tokenizer import tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    r"""Texts and bytes of single tokens, as they stand in the middle of a text.

    A token may be part of a character: its text is then `bytes:\xe2\x80`, as OpenAI writes it.
    """

    def __init__(self, words: tokenizer.Tokenizer | None) -> None:
        """Wrap a tokenizer; None where the model has none: tokens are then `token_id:7`."""
        self._words = words
        self._kinds = _decoder_kinds(words)
        self._bytes_of = _byte_level_alphabet() if "ByteLevel" in self._kinds else {}
        self._known: dict[int, bytes | None] = {}

    def data(self, token_id: int) -> bytes | None:
        """The bytes of a token, None for one that the tokenizer does not know."""
        if token_id not in self._known:
            self._known[token_id] = self._find(token_id)
        return self._known[token_id]

    def text(self, token_id: int, *, as_id: bool = False) -> str:
        """The text of a token, or its id where it has none or `as_id` is set."""
        data = None if as_id else self.data(token_id)
        if data is None:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _find(self, token_id: int) -> bytes | None:
        token = self._words.id_to_token(token_id) if self._words is not None else None
        if self._words is None or token is None:
            return None
        if token_id in self._words.special_ids:
            return token.encode()
        if self._bytes_of and all(character in self._bytes_of for character in token):
            return bytes(self._bytes_of[character] for character in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None and "ByteFallback" in self._kinds:
            return bytes.fromhex(byte[1])
        # The second of two: decoders treat the beginning of a text in a way of its own.
        once = self._words.decode([token_id], skip_special_tokens=False)
        twice = self._words.decode([token_id, token_id], skip_special_tokens=False)
        return (twice[len(once) :] if twice.startswith(once) else once).encode()


def _decoder_kinds(words: tokenizer.Tokenizer | None) -> frozenset[str]:
    decoder = words.decoder if words is not None else None
    if decoder is None:
        return frozenset()
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return frozenset(part["type"] for part in parts)


def _byte_level_alphabet() -> dict[str, int]:
    """Bytes by the characters that stand for them in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
