"""Text to token ids and back, from a model folder's tokenizer.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from nanoflow_jax.tokenizer import files

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Tokenizer:
    """The tokenizer of one model. Immutable, and safe to share between threads.

    Attributes:
        vocab_size: Highest token id plus one, added tokens included.
        longest_token: Characters in the longest spelling of a token.
        bos_id: Begin-of-text id, None if the model has none.
        eos_id: End-of-text id, None if the model has none. Further ones may stand in the
            model's generation_config.json.
        special_ids: Ids that decode leaves out on request.
        decoder: How tokens become text: the `decoder` part of tokenizer.json, None if it has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, named: Mapping[str, str]) -> None:
        """Wrap a backend that nobody else changes.

        Args:
            backend: Of the tokenizers library.
            named: Texts of named special tokens, by names such as bos_token.
        """
        # A folder may come from training: its cut and its padding are not for serving.
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        have = {token.content for token in added.values()}
        missing = [text for text in dict.fromkeys(named.values()) if text not in have]
        backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in missing])
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.longest_token = max(map(len, vocabulary))
        self.bos_id = self._named_id(named, "bos_token")
        self.eos_id = self._named_id(named, "eos_token")
        self.special_ids = frozenset(
            token_id for token_id, t in backend.get_added_tokens_decoder().items() if t.special
        )
        self.decoder: Mapping[str, Any] | None = (
            json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
        )
        self._adds_bos = (
            self.bos_id is not None
            and backend.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]
            and backend.encode("a", add_special_tokens=False).ids[:1] != [self.bos_id]
        )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer of a model folder.

        Args:
            folder: Holds tokenizer.json, and usually tokenizer_config.json.

        Raises:
            ValueError: tokenizer.json is missing or unreadable.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        text = files.read_text(path)
        if text is None:
            raise ValueError(
                f"{folder} has no tokenizer.json; download it with the model, or make it from "
                "tokenizer.model once with transformers: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        # The library raises plain Exception and nothing narrower.
        except Exception as error:
            raise ValueError(
                f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} can read "
                f"({error}); download it again"
            ) from error
        if backend.get_vocab_size(with_added_tokens=True) == 0:
            raise ValueError(f"{path} has an empty vocabulary; download it again")
        _add_config_tokens(backend, files.read_object(folder / files.CONFIG_FILE))
        return cls(backend, named=files.special_tokens(folder))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; special tokens written out in it are recognised.

        Args:
            text: Any text without lone surrogates.
            add_special_tokens: Put what the model expects around a plain prompt, usually a BOS.
                A text that begins with the BOS already, such as a rendered chat, gets no second.

        Raises:
            ValueError: The text holds a lone surrogate, which no UTF-8 text can.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate at character {error.start}, which is not "
                "Unicode text; replace it before sending"
            ) from error
        # Of tokenizers' methods only those for batches let other threads run meanwhile.
        (encoded,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoded.ids
        if add_special_tokens and self._adds_bos and ids[1:2] == [self.bos_id]:
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know are left out.

        Args:
            ids: Not negative. A model's vocabulary is often padded beyond the tokenizer's.
            skip_special_tokens: Leave out `special_ids`.
        """
        text: str
        (text,) = self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token, None for an id it does not know."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its spelling, None if the vocabulary has no such token."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def to_json(self) -> str:
        """The whole tokenizer as the text of one tokenizer.json."""
        text: str = self._backend.to_str()
        return text

    def check_fits(self, vocab_size_of_model: int) -> None:
        """Refuse a tokenizer that can produce ids the model has no embedding for.

        Raises:
            ValueError: The tokenizer's vocabulary is larger than the model's.
        """
        if self.vocab_size > vocab_size_of_model:
            last = self.vocab_size - 1
            raise ValueError(
                f"the tokenizer has ids up to {last} ({self.id_to_token(last)!r}), but the model's "
                f"vocabulary has {vocab_size_of_model} entries: this tokenizer belongs to another "
                "model; put the model's own tokenizer.json and tokenizer_config.json in its folder"
            )

    def _named_id(self, named: Mapping[str, str], name: str) -> int | None:
        text = named.get(name)
        return None if text is None else self.token_to_id(text)


def _add_config_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json knows, as transformers does."""
    have = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder", {})
    if not (isinstance(listed, dict) and all(map(_is_listed_token, listed.items()))):
        raise ValueError(
            f"added_tokens_decoder in {files.CONFIG_FILE} is not an object of ids with tokens, "
            f"each with a content: {listed!r:.200}; download the file again"
        )
    for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
        if token["content"] not in have:
            flags = {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
            backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])


def _is_listed_token(item: tuple[str, Any]) -> bool:
    token_id, token = item
    return (
        token_id.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
    )
