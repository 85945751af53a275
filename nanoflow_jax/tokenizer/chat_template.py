"""Turns chat messages into the text a model was trained on, by the template in its folder."""

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from nanoflow_jax.tokenizer import files
from nanoflow_jax.tokenizer.template_process import RenderLimits, TemplateProcess

_FILE = "chat_template.jinja"
_MORE_FILES = "additional_chat_templates"
_OLD_FILE = "chat_template.json"
# What kwargs may not be: arguments of their own, and those of transformers' apply_chat_template
# that are no variables.
_RESERVED = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template",
        "tokenize",
    }
)
# Functions of templates: a variable of that name would hide them.
_FUNCTIONS = frozenset({"raise_exception", "strftime_now", "range", "dict", "namespace"})
MAX_KWARGS = 32
_NAME = re.compile(r"[^\W\d]\w*")
# Marks where the message to continue ends; its last space tells whether a template strips.
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_PROBE = "nanoflow probe"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The chat template of one model, rendered as transformers renders it.

    Templates are not trusted: they run in a process of their own, with limits. That process starts
    at the first rendering and ends with this object. Safe to share between threads.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        special_tokens: Mapping[str, str],
        limits: RenderLimits | None = None,
        clock: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        """Wrap templates.

        Args:
            templates: Sources by name; `tool_use`, if there, serves when tools are given, and
                `default` otherwise.
            special_tokens: Variables such as bos_token that the template may write.
            limits: What one rendering may cost.
            clock: Local time, for templates that write today's date.

        Raises:
            ValueError: There is no default template.
        """
        if "default" not in templates:
            raise ValueError(
                f"the model has the chat templates {sorted(templates)} but none named 'default'; "
                f"save the one to use as {_FILE} in the model folder"
            )
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._clock = clock
        self._process = TemplateProcess(limits or RenderLimits())
        self._reads_parts: dict[str, bool] = {}
        self._names: dict[str, frozenset[str]] = {}

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        limits: RenderLimits | None = None,
        clock: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> "ChatTemplate":
        """Read the templates of a model folder.

        chat_template.jinja and additional_chat_templates/*.jinja come first, then
        tokenizer_config.json, then chat_template.json.

        Raises:
            ValueError: The folder has no chat template, or an unreadable one.
        """
        folder = Path(folder)
        templates = _read_templates(folder)
        if not templates:
            raise ValueError(
                f"{folder} has no chat template: the model is not made for chat; use plain "
                f"prompts, or save a template as {folder / _FILE}"
            )
        return cls(
            templates, special_tokens=files.special_tokens(folder), limits=limits, clock=clock
        )

    @property
    def sources(self) -> Mapping[str, str]:
        """The templates as they are written, by name."""
        return self._templates

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        now: datetime.datetime | None = None,
    ) -> str:
        """The text of a conversation.

        The text holds all special tokens the model wants: encode it with
        `add_special_tokens=False`.

        Args:
            messages: Each with a `role`, and usually a `content` that is text or a list of
                `{"type": "text", "text": ...}`. Parts go to the template if it reads them, and are
                joined by line ends if it does not.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: End with the beginning of the assistant's answer; None: unless
                the final message is continued.
            continue_final_message: End with the text of the final message, for the model to go
                on with it.
            kwargs: Further variables, such as enable_thinking. Those that the template does not
                read, its functions and special tokens are left out.
            now: Local time, for templates that write today's date; None: by the clock.

        Raises:
            ValueError: The messages are malformed, the template refuses them, fails or passes a
                limit; or the final message is to be continued and cannot be.
        """
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise ValueError(
                "add_generation_prompt begins an answer and continue_final_message goes on with "
                "the final message; set one of them to false"
            )
        kwargs = kwargs or {}
        if taken := sorted(_RESERVED & kwargs.keys()):
            raise ValueError(f"template kwargs {taken} are not for the template to read")
        if len(kwargs) > MAX_KWARGS:
            raise ValueError(f"{len(kwargs)} template kwargs are more than {MAX_KWARGS}")
        checked = [_checked(message, index) for index, message in enumerate(_listed(messages))]
        if tools is not None and not (_is_list(tools) and all(_is_object(t) for t in tools)):
            raise ValueError(f"tools must be a list of JSON objects, not {_described(tools)}")
        source = self._source(tools)
        if any(isinstance(m.get("content"), list) for m in checked) and not self._takes_parts(
            source
        ):
            checked = [_joined(message) for message in checked]
        final = ""
        if continue_final_message:
            final, checked[-1] = _marked(checked[-1])
        text = self._render(
            source,
            {
                **self._special_tokens,
                "documents": None,
                **self._allowed(kwargs, source),
                "messages": checked,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
            },
            now=now,
            num_items=len(checked) + len(tools or ()),
        )
        return _cut_at_mark(text, final) if continue_final_message else text

    def close(self) -> None:
        """End the rendering process; a later rendering starts another."""
        self._process.close()

    def _source(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        wanted = "tool_use" if tools is not None else "default"
        return self._templates.get(wanted, self._templates["default"])

    def _allowed(self, kwargs: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Those kwargs that the template reads and that are the caller's to set."""
        if source not in self._names:
            self._names[source] = frozenset(_NAME.findall(source)) - _FUNCTIONS
        names = self._names[source] - self._special_tokens.keys()
        return {name: value for name, value in kwargs.items() if name in names}

    def _render(
        self,
        source: str,
        variables: Mapping[str, Any],
        *,
        num_items: int,
        now: datetime.datetime | None = None,
    ) -> str:
        time = (now or self._clock()).isoformat()
        return self._process.render(source, variables=variables, now=time, num_items=num_items)

    def _takes_parts(self, source: str) -> bool:
        """Whether a template reads lists of parts: it writes the text of one, not its JSON."""
        if source not in self._reads_parts:
            probe = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
            variables = {**self._special_tokens, "messages": probe, "tools": None}
            try:
                text = self._render(source, variables, num_items=1)
            except ValueError:
                # A template that fails on parts does not read them.
                text = ""
            self._reads_parts[source] = (
                _PROBE in text and f"'{_PROBE}'" not in text and f'"{_PROBE}"' not in text
            )
        return self._reads_parts[source]


def _read_templates(folder: Path) -> dict[str, str]:
    templates = {}
    default = files.read_text(folder / _FILE)
    if default is not None:
        templates["default"] = default
    for path in sorted((folder / _MORE_FILES).glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if templates:
        return templates
    for name in (files.CONFIG_FILE, _OLD_FILE):
        found = files.read_object(folder / name).get("chat_template")
        if found is not None:
            return _named_templates(found, folder / name)
    return {}


def _named_templates(found: object, path: Path) -> dict[str, str]:
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, dict):
        named = found
    elif isinstance(found, list) and all(
        isinstance(t, dict) and {"name", "template"} <= t.keys() for t in found
    ):
        named = {t["name"]: t["template"] for t in found}
    else:
        named = {None: None}
    if not all(isinstance(k, str) and isinstance(v, str) for k, v in named.items()):
        raise ValueError(
            f"chat_template in {path} is neither text nor a list of names with templates; "
            f"save the template as {_FILE} beside it"
        )
    return named


def _listed(messages: object) -> Sequence[Any]:
    if not _is_list(messages):
        raise ValueError(
            f"messages must be a list of objects with a role, not {_described(messages)}"
        )
    if not messages:
        raise ValueError("messages is empty; a chat needs at least one message")
    return messages


def _checked(message: object, index: int) -> dict[str, Any]:
    """A copy of a message in the form that templates expect."""
    if not _is_object(message):
        raise ValueError(
            f"messages[{index}] must be an object with a role, not {_described(message)}"
        )
    # Clients write null for what is not there, and templates ask only whether a key exists.
    known = {k: v for k, v in message.items() if v is not None}
    if not isinstance(known.get("role"), str):
        raise ValueError(
            f"messages[{index}] needs a role that is text, such as 'user', not "
            f"{_described(known.get('role'))}"
        )
    content = known.get("content")
    if _is_list(content):
        known["content"] = [_checked_part(part, index) for part in content]
    elif content is not None and not isinstance(content, str):
        raise ValueError(
            f"the content of messages[{index}] must be text or a list of text parts, not "
            f"{_described(content)}"
        )
    reasoning = next((known[key] for key in _REASONING if key in known), None)
    if reasoning is not None:
        known = {"thinking": reasoning, **known, "reasoning_content": reasoning}
    return known


def _checked_part(part: object, index: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not _is_object(part):
        raise ValueError(
            f"a part of messages[{index}] must be {{'type': 'text', 'text': ...}}, not "
            f"{_described(part)}"
        )
    kind = part.get("type")
    if kind != "text":
        raise ValueError(
            f"messages[{index}] has a part of type {kind!r}; only 'text' parts are supported"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError(f"a text part of messages[{index}] needs a text, not {_described(text)}")
    return dict(part)


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _marked(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of a message's end, and the message with a mark behind it."""
    content = message.get("content")
    if isinstance(content, str):
        return content, {**message, "content": content + _MARK}
    if not content:
        raise ValueError("continue_final_message: the final message has no text to continue")
    *parts, last = content
    return last["text"], {**message, "content": [*parts, {**last, "text": last["text"] + _MARK}]}


def _cut_at_mark(text: str, final: str) -> str:
    """A rendered conversation up to the end of its final message, as transformers cuts it."""
    place = text.rfind(_MARK.strip())
    if place < 0 or final.strip() not in text:
        raise ValueError(
            "continue_final_message: the chat template does not write the final message as it is; "
            "leave continue_final_message out"
        )
    # A template that strips messages has stripped this one's end only behind the mark.
    return text[:place] if text.startswith(_MARK, place) else text[:place].rstrip()


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_object(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _described(value: object) -> str:
    return "nothing" if value is None else f"{value!r:.80} ({type(value).__name__})"
