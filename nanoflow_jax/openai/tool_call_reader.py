"""Reads one call of a tool, character by character, from a text that comes in pieces."""

import enum
import json
import re
from collections.abc import Collection

SPACE = re.compile(r"[ \t\r\n]+")


class Opens(enum.Enum):
    """What follows a marker."""

    OBJECT = "an object"
    IN_OBJECT = "the inside of an object"
    NEXT_OBJECT = "a further object of a list"
    LIST_OR_NAME = "a list of objects, or a name with arguments"


class State(enum.Enum):
    """Where in a call the text is."""

    OPENED = "before the object, list or name"
    LIST = "before an object of a list"
    NAME = "in a bare name"
    KEY = "before a key"
    IN_KEY = "in a key"
    COLON = "before a colon"
    VALUE = "before a value"
    IN_TEXT = "in a value that is text"
    IN_VALUE = "in a value"
    COMMA = "after a value"
    DONE = "after the call"
    FAILED = "no call, or broken"


class _Value(enum.Enum):
    """Which value of a call's object is read."""

    NAME = "name"
    ARGUMENTS = "arguments"
    OTHER = "other"


class CallReader:
    """Reads one call.

    Invariant: `started` means that the name is one of the offered and arguments were seen; until
    then arguments are kept in `_early`.
    """

    def __init__(self, opens: Opens, names: Collection[str]) -> None:
        self.name = ""
        self.started = False
        self.in_list = opens is Opens.NEXT_OBJECT
        self.state = _FIRST_STATES[opens]
        self._lists_allowed = opens is Opens.LIST_OR_NAME
        self._names = names
        self._value = _Value.OTHER
        self._is_bare = False
        self._seen_arguments = False
        self._early: list[str] = []
        self._text: list[str] = []  # of a key, a name or arguments written as text
        self._escaped = False
        self._quoted = False
        self._depth = 0
        self._out: list[str] = []

    def read(self, text: str, at: int) -> tuple[int, list[str]]:
        """Reads on; returns where it stopped and the arguments that are certain."""
        while at < len(text) and self.state not in (State.DONE, State.FAILED):
            at = self._step(text, at)
        out, self._out = self._out, []
        return at, out

    def cut(self) -> list[str]:
        """Arguments that were kept back when the text ends inside the call."""
        if self.started and self.state is State.IN_TEXT and self._value is _Value.ARGUMENTS:
            return ['"', *self._text]
        return []

    def _step(self, text: str, at: int) -> int:
        match self.state:
            case State.IN_KEY | State.IN_TEXT:
                return self._quoted_text(text, at)
            case State.IN_VALUE:
                return self._in_value(text, at)
            case State.NAME:
                return self._bare_name(text, at)
        space = SPACE.match(text, at)
        return self._between(text[at], at) if space is None else space.end()

    def _between(self, char: str, at: int) -> int:
        """A character that is no white space, between the parts of an object."""
        match self.state, char:
            case State.OPENED, "[" if self._lists_allowed:
                self.in_list = True
                self.state = State.LIST
            case ((State.OPENED | State.LIST), "{"):
                self.state = State.KEY
            case State.OPENED, _ if self._lists_allowed:
                self.state = State.NAME
                return at
            case State.KEY, '"':
                self.state = State.IN_KEY
            case ((State.KEY | State.COMMA), "}"):
                self._close()
            case State.COLON, ":":
                self.state = State.VALUE
            case State.COMMA, ",":
                self.state = State.KEY
            case State.VALUE, _ if char not in _NO_VALUE:
                self._begin_value(char)
                return at + (self.state is State.IN_TEXT)
            case _:
                self.state = State.FAILED
                return at
        return at + 1

    def _begin_value(self, char: str) -> None:
        if self._value is _Value.ARGUMENTS:
            self._seen_arguments = True
            self._try_start()
        self.state = State.IN_TEXT if char == '"' else State.IN_VALUE
        if self._value is _Value.NAME and char != '"':
            self.state = State.FAILED
        self._depth = 0

    def _quoted_text(self, text: str, at: int) -> int:
        """The inside of a key, or of a value that is text."""
        plain = None if self._escaped else _PLAIN_TEXT.match(text, at)
        end = at + 1 if plain is None else plain.end()
        if plain is None and not self._escaped and text[at] == '"':
            self._close_text()
            return end
        self._escaped = plain is None and not self._escaped and text[at] == "\\"
        if self.state is State.IN_KEY or self._value is not _Value.OTHER:
            self._text.append(text[at:end])
        return end

    def _close_text(self) -> None:
        written, self._text = '"' + "".join(self._text) + '"', []
        was_key = self.state is State.IN_KEY
        self.state = State.COLON if was_key else State.COMMA
        try:
            decoded = json.loads(written, strict=False)
            decoded.encode()
        except ValueError:
            # No JSON, or half a character: as a key or a name it is none of ours, and arguments
            # stay as they are.
            decoded = None
        if was_key:
            self._value = self._value_of(decoded)
            if decoded not in _KEYS and not self.started:
                self.state = State.FAILED
        elif self._value is _Value.NAME:
            self.name = decoded if decoded in self._names else ""
            self.state = State.COMMA if self.name else State.FAILED
            self._try_start()
        elif self._value is _Value.ARGUMENTS:
            # Some models write the object as text; what they mean is the object.
            self._put(written if decoded is None else decoded)

    def _value_of(self, key: str | None) -> _Value:
        if key == "name" and not self.name:
            return _Value.NAME
        if key in ("arguments", "parameters") and not self._seen_arguments:
            return _Value.ARGUMENTS
        return _Value.OTHER

    def _in_value(self, text: str, at: int) -> int:
        """A value that is not text: only brackets and strings matter."""
        end, state = at, State.IN_VALUE
        while end < len(text) and state is State.IN_VALUE:
            if self._escaped:
                self._escaped = False
                end += 1
                continue
            plain = (_PLAIN_TEXT if self._quoted else _PLAIN_VALUE).match(text, end)
            if plain is not None:
                end = plain.end()
                continue
            char = text[end]
            if self._quoted:
                self._escaped = char == "\\"
                self._quoted = char != '"'
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char == "<" or (char in ",}] \t\r\n" and self._depth == 0):
                # The value ended before this; no JSON has a < outside of text.
                state = State.FAILED if char == "<" else self._after_value()
                break
            elif char in "}]":
                self._depth -= 1
                state = State.IN_VALUE if self._depth else self._after_value()
            end += 1
        if self._value is _Value.ARGUMENTS:
            self._put(text[at:end])
        self.state = state
        return end

    def _after_value(self) -> State:
        return State.DONE if self._is_bare else State.COMMA

    def _bare_name(self, text: str, at: int) -> int:
        """A name up to the object of its arguments."""
        plain = _BARE_HEAD.match(text, at)
        if plain is not None:
            self._text.append(plain[0])
            return plain.end()
        head = _BARE_NAME.fullmatch("".join(self._text)) if text[at] == "{" else None
        self._text = []
        if head is None or head[1] not in self._names:
            self.state = State.FAILED
            return at
        self.name, self._is_bare, self._value = head[1], True, _Value.ARGUMENTS
        self._begin_value("{")
        return at

    def _close(self) -> None:
        self.state = State.DONE if self.name else State.FAILED
        if self.name and not self._seen_arguments:
            self._seen_arguments = True
            self._try_start()
            self._put("{}")

    def _try_start(self) -> None:
        if self.name and self._seen_arguments and not self.started:
            self.started = True
            self._out += self._early
            self._early = []

    def _put(self, arguments: str) -> None:
        (self._out if self.started else self._early).append(arguments)


# What the object of a call may hold; another key says that it is no call.
_KEYS = frozenset({"name", "arguments", "parameters", "type", "id"})
_FIRST_STATES = {
    Opens.OBJECT: State.OPENED,
    Opens.IN_OBJECT: State.KEY,
    Opens.NEXT_OBJECT: State.LIST,
    Opens.LIST_OR_NAME: State.OPENED,
}
_PLAIN_TEXT = re.compile(r'[^"\\]+')
_PLAIN_VALUE = re.compile(r'[^"{}\[\]<, \t\r\n]+')
_NO_VALUE = frozenset(",:}]<>")
_BARE_HEAD = re.compile(r"[\w\-\[\]. \t\r\n]+")
_BARE_NAME = re.compile(r"([\w\-.]+)\s*(?:\[CALL_ID\]\s*\w*\s*)?(?:\[ARGS\])?\s*")
