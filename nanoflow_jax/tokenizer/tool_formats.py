"""How models write the calls of tools, and which way a model at hand writes them.

- hermes (Qwen, Hermes): `<tool_call>`, `{"name": ..., "arguments": {...}}` and `</tool_call>`, each
  on a line of its own, once per call.
- llama3 (Llama 3.1 and later): `{"name": ..., "parameters": {...}}` as the whole answer, sometimes
  after `<|python_tag|>`; one call at a time.
- mistral: `[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]`.
- mistral_args (Mistral's tokenizers from version 11 on): `[TOOL_CALLS]name[ARGS]{...}` per call.
"""

import dataclasses
import enum
from collections.abc import Mapping

from nanoflow_jax.tokenizer import tokenizer


class ToolFormat(enum.StrEnum):
    """One way to write calls."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"
    MISTRAL_ARGS = "mistral_args"

    @property
    def opening(self) -> str:
        """The marker before a call."""
        return _OPENINGS[self]

    @property
    def arguments_key(self) -> str:
        """The key of a call's arguments where calls are JSON objects."""
        return "parameters" if self is ToolFormat.LLAMA3 else "arguments"

    @property
    def is_mistral(self) -> bool:
        return self in (ToolFormat.MISTRAL, ToolFormat.MISTRAL_ARGS)


HERMES_END = "</tool_call>"
MISTRAL_ARGUMENTS = "[ARGS]"

_OPENINGS = {
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.LLAMA3: "<|python_tag|>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
    ToolFormat.MISTRAL_ARGS: "[TOOL_CALLS]",
}
_MARKERS = (*dict.fromkeys(_OPENINGS.values()), HERMES_END, MISTRAL_ARGUMENTS, "[CALL_ID]")
# Templates that share a marker with hermes, but write calls as XML.
_NOT_HERMES = ("<function=", "<arg_key>")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolStyle:
    """How one model writes calls.

    Attributes:
        format: The form of its calls.
        is_native: The model's template writes this form, or the user says that it does. Otherwise
            only a grammar brings the model to it.
        token_ids: Ids of the markers that are single tokens of the model.
        special: Those of them that are left out of the text with `skip_special_tokens`.
    """

    format: ToolFormat
    is_native: bool = True
    token_ids: Mapping[str, int] = dataclasses.field(default_factory=dict)
    special: frozenset[str] = frozenset()

    @classmethod
    def of_model(
        cls,
        templates: Mapping[str, str],
        words: tokenizer.Tokenizer | None,
        *,
        chosen: str = "",
    ) -> "ToolStyle":
        """The style of a model.

        Args:
            templates: Sources of its chat templates by name, as `ChatTemplate` takes them.
            words: Its tokenizer, if it has one.
            chosen: Name of the form that the user wants instead of what the template says; empty
                for none.

        Raises:
            ValueError: There is no form of that name.
        """
        if chosen and chosen not in list(ToolFormat):
            raise ValueError(f"--tool_format={chosen} is not one of {', '.join(ToolFormat)}")
        found = (
            ToolFormat(chosen)
            if chosen
            else detect(templates.get("tool_use", templates.get("default", "")))
        )
        ids = {m: words.token_to_id(m) for m in _MARKERS} if words is not None else {}
        known = {marker: token for marker, token in ids.items() if token is not None}
        special = words.special_ids if words is not None else frozenset()
        return cls(
            format=found or ToolFormat.HERMES,
            is_native=found is not None,
            token_ids=known,
            special=frozenset(marker for marker, token in known.items() if token in special),
        )

    @property
    def needs_special_tokens(self) -> bool:
        """Whether calls are seen only where special tokens stay in the text."""
        used = {self.format.opening}
        if self.format is ToolFormat.HERMES:
            used.add(HERMES_END)
        elif self.format is ToolFormat.MISTRAL_ARGS:
            used.add(MISTRAL_ARGUMENTS)
        return not used.isdisjoint(self.special)


def detect(template: str) -> ToolFormat | None:
    """The form of calls that a chat template writes, None if it writes none of ours."""
    if "[TOOL_CALLS]" in template:
        has_arguments = MISTRAL_ARGUMENTS in template
        return ToolFormat.MISTRAL_ARGS if has_arguments else ToolFormat.MISTRAL
    if "<tool_call>" in template and not any(mark in template for mark in _NOT_HERMES):
        return ToolFormat.HERMES
    if "<|python_tag|>" in template or ('"parameters": ' in template and "ipython" in template):
        return ToolFormat.LLAMA3
    return None
