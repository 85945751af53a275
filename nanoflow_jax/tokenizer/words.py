"""How one model reads and writes text: its tokenizer and its chat template, if it has them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from nanoflow_jax.tokenizer import chat_template, tokenizer, tool_formats

Prompt = str | Sequence[int]


class TooLongError(ValueError):
    """A text is refused for its length, before it is encoded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """How the model reads and writes text.

    Attributes:
        tokenizer: None for a model of random weights.
        template: None if the model is not made for chat.
        tool_style: How it calls tools.
        no_template: Why it has no template, for those who chat nevertheless.
    """

    tokenizer: tokenizer.Tokenizer | None
    template: chat_template.ChatTemplate | None
    tool_style: tool_formats.ToolStyle
    no_template: str = ""

    @classmethod
    def load(cls, folder: pathlib.Path | None, *, tool_format: str = "") -> "Words":
        """Reads those of a model folder.

        Args:
            folder: None for a model without one.
            tool_format: Name of the form of its calls; empty for what its template writes.

        Raises:
            ValueError: The tokenizer is missing or damaged, or there is no form of that name.
        """
        words, template, no_template = None, None, "this model has no tokenizer, so it cannot chat"
        if folder is not None:
            words = tokenizer.Tokenizer.load(folder)
            try:
                template = chat_template.ChatTemplate.load(folder)
            except ValueError as error:
                no_template = str(error)
        sources = template.sources if template is not None else {}
        return cls(
            tokenizer=words,
            template=template,
            tool_style=tool_formats.ToolStyle.of_model(sources, words, chosen=tool_format),
            no_template=no_template,
        )

    def encode(
        self, prompt: Prompt, *, add_special_tokens: bool = True, max_chars: int | None = None
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            prompt: Text or token ids.
            add_special_tokens: As in `Tokenizer.encode`.
            max_chars: Longest text.

        Raises:
            ValueError: It is text and there is no tokenizer, or it is no Unicode text.
            TooLongError: It is a longer text.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; give the prompt as token ids")
        if max_chars is not None and len(prompt) > max_chars:
            raise TooLongError(
                f"the text has {len(prompt)} characters, and at most {max_chars} are taken here; "
                "shorten it"
            )
        return self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)

    def encode_chat(
        self, messages: Sequence[Any], *, max_chars: int | None = None, **options: Any
    ) -> list[int]:
        """Token ids of a conversation; see `ChatTemplate.render`.

        Args:
            messages: As `ChatTemplate.render` takes them.
            max_chars: Longest rendered text.
            options: Further arguments of `ChatTemplate.render`.

        Raises:
            ValueError: There is no template, or it refuses the messages.
            TooLongError: The conversation is longer.
        """
        if self.template is None or self.tokenizer is None:
            raise ValueError(self.no_template)
        text = self.template.render(messages, **options)
        return self.encode(text, add_special_tokens=False, max_chars=max_chars)

    def close(self) -> None:
        """Ends the template's process."""
        if self.template is not None:
            self.template.close()
