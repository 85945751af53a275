"""What grammars need to know of a model's tokens."""

import dataclasses
from collections.abc import Collection
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from nanoflow_jax.tokenizer import tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        text: tokenizer.json, with the tokens that only tokenizer_config.json names.
        size: V of the model.
        eos_ids: End-of-text tokens, at least one.
        known: Bitmask of the ids that are tokens; a model's vocabulary is often padded.
    """

    text: str
    size: int
    eos_ids: tuple[int, ...]
    known: Int32[np.ndarray, "W"]

    @classmethod
    def load(cls, folder: Path, *, vocab_size: int, eos_ids: Collection[int]) -> "Vocabulary":
        """Reads the tokens of a model folder.

        Args:
            folder: Holds tokenizer.json.
            vocab_size: V of the model.
            eos_ids: The model's end-of-text tokens.

        Raises:
            ValueError: The tokenizer is missing or unreadable, or there is no end-of-text token.
        """
        if not eos_ids:
            raise ValueError(
                f"{folder} names no end-of-text token, without which no grammar can end; set "
                "eos_token_id in its config.json"
            )
        words = tokenizer.Tokenizer.load(folder)
        words.check_fits(vocab_size)
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[[i for i in range(words.vocab_size) if words.id_to_token(i) is not None]] = 1
        return cls(
            text=words.to_json(),
            size=vocab_size,
            eos_ids=tuple(sorted(eos_ids)),
            known=np.packbits(bits, bitorder="little").view(np.int32),
        )
