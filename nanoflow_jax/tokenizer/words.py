"""How one model reads and writes text: its tokenizer and its chat template, if it has them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from nanoflow_jax.tokenizer import chat_template, tokenizer

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """How the model reads and writes text.

    Attributes:
        tokenizer: None for a model of random weights.
        template: None if the model is not made for chat.
        no_template: Why it has none, for those who chat nevertheless.
    """

    tokenizer: tokenizer.Tokenizer | None
    template: chat_template.ChatTemplate | None
    no_template: str = ""

    @classmethod
    def load(cls, folder: pathlib.Path | None) -> "Words":
        """Reads those of a model folder; None for a model without one.

        Raises:
            ValueError: The tokenizer is missing or damaged.
        """
        if folder is None:
            return cls(tokenizer=None, template=None, no_template="this model has no tokenizer")
        words = tokenizer.Tokenizer.load(folder)
        try:
            template = chat_template.ChatTemplate.load(folder)
        except ValueError as error:
            return cls(tokenizer=words, template=None, no_template=str(error))
        return cls(tokenizer=words, template=template)

    def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Raises:
            ValueError: It is text and there is no tokenizer, or it is no Unicode text.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; give the prompt as token ids")
        return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    def encode_chat(self, messages: Sequence[Any], **options: Any) -> list[int]:
        """Token ids of a conversation; see `ChatTemplate.render`.

        Raises:
            ValueError: There is no template, or it refuses the messages.
        """
        if self.template is None or self.tokenizer is None:
            raise ValueError(self.no_template)
        text = self.template.render(messages, **options)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def close(self) -> None:
        """Ends the template's process."""
        if self.template is not None:
            self.template.close()
