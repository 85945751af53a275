"""Finds the calls of tools in a text that comes in pieces.

What is a call: the opening marker of the format (or, for llama3, a text that begins with an
object), followed by the name of an offered tool and its arguments, in any order. As soon as the
name is known and arguments begin, the call starts, and its arguments are handed on as they come: a
model that writes broken JSON, or is cut off, gives broken arguments. Everything else is content: a
call that breaks off before that, one of a tool that was not offered. White space around calls is
dropped.
"""

import dataclasses
import enum
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator

from nanoflow_jax.openai.tool_call_reader import SPACE, CallReader, Opens, State
from nanoflow_jax.tokenizer.tool_formats import HERMES_END, ToolFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """Text of the message itself."""

    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CallStart:
    """A call begins.

    Attributes:
        index: Its number in the message.
        call_id: Its id.
        name: Of the function.
    """

    index: int
    call_id: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """More text of a call's arguments, which are JSON."""

    index: int
    text: str


Piece = Content | CallStart | Arguments


class ToolParser:
    """Takes the text of one choice apart.

    Invariant: content, markers and white space given so far are either handed on, dropped for good
    or kept in `_spaces`, `_held` and `_raw`, in this order. Each character is looked at a bounded
    number of times.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        names: Collection[str],
        *,
        call_id: Callable[[int], str],
        max_calls: int | None = None,
    ) -> None:
        """Begin a text.

        Args:
            tool_format: How the model writes calls.
            names: Of the tools that were offered.
            call_id: Gives the id of a call by its index.
            max_calls: Calls after this many are dropped; None keeps all.
        """
        self._format = tool_format
        self._names = frozenset(names)
        self._call_id = call_id
        self._max_calls = max_calls
        self._num_calls = 0
        self._place = _Place.START
        self._spaces: list[str] = []  # white space that a call may follow
        self._held = ""  # the beginning of a marker, perhaps
        self._raw: list[str] = []  # a call that has not started, marker included
        self._call: CallReader | None = None
        self._pieces: list[Piece] = []

    @property
    def num_calls(self) -> int:
        """Calls that have started and were not dropped."""
        return self._num_calls if self._max_calls is None else min(self._num_calls, self._max_calls)

    def push(self, text: str) -> list[Piece]:
        """The pieces that are certain with some more text."""
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text):
            at = self._in_call(text, at) if self._call is not None else self._outside(text, at)
        return self._take()

    def finish(self) -> list[Piece]:
        """The last pieces; nothing may be pushed after them."""
        if self._call is not None:
            for piece in self._call.cut():
                self._add_argument(piece)
            if not self._call.started:
                self._add_raw()
        elif self._held and not (self._place is _Place.NEXT and HERMES_END.startswith(self._held)):
            self._add_content(self._held)
        elif self._place in (_Place.START, _Place.INSIDE):
            self._flush_spaces()
        self._call, self._held = None, ""
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return _joined(pieces)

    def _outside(self, text: str, at: int) -> int:
        """Reads text that is in no call; returns where it stopped."""
        space = SPACE.match(text, at)
        if space is not None:
            self._spaces.append(space[0])
            return space.end()
        for marker, opens in self._markers():
            if text.startswith(marker, at):
                if opens is not None:
                    self._begin(marker, opens)
                else:
                    self._spaces.clear()
                    self._place = _Place.AFTER
                return at + len(marker)
            if marker.startswith(text[at : at + len(marker)]):
                self._held = text[at:]  # all that is left, as it is shorter than the marker
                return len(text)
        end = _WORD.match(text, at)
        stop = at + 1 if end is None else end.end()
        self._add_content(text[at:stop])
        return stop

    def _markers(self) -> Iterator[tuple[str, "Opens | None"]]:
        """Markers that may stand here, and what they open; None is for an end."""
        after = self._place in (_Place.AFTER, _Place.NEXT, _Place.LISTED)
        if self._format.is_mistral:
            if self._place is _Place.LISTED:
                yield ",", Opens.NEXT_OBJECT
                yield "]", None
            yield self._format.opening, Opens.LIST_OR_NAME
            return
        yield self._format.opening, Opens.OBJECT
        if self._format is ToolFormat.HERMES:
            if self._place is _Place.NEXT:
                yield HERMES_END, None
            return
        if self._place is _Place.NEXT:
            yield ";", None
        if after or self._place is _Place.START:
            yield "{", Opens.IN_OBJECT

    def _begin(self, marker: str, opens: "Opens") -> None:
        self._raw = [*self._spaces, marker]
        self._spaces.clear()
        self._call = CallReader(opens, self._names)

    def _in_call(self, text: str, at: int) -> int:
        call = self._call
        assert call is not None
        had_started = call.started
        end, arguments = call.read(text, at)
        if not had_started:
            self._raw.append(text[at:end])
        if call.started and not had_started:
            self._start(call.name)
        for piece in arguments:
            self._add_argument(piece)
        if call.state is State.FAILED and not call.started:
            self._add_raw()
            self._call = None
        elif call.state in (State.DONE, State.FAILED):
            self._call = None
            listed = call.in_list and call.state is State.DONE
            self._place = _Place.LISTED if listed else _Place.NEXT
        return end

    def _start(self, name: str) -> None:
        index = self._num_calls
        self._num_calls += 1
        self._raw = []
        if not self._dropped(index):
            self._pieces.append(CallStart(index=index, call_id=self._call_id(index), name=name))

    def _dropped(self, index: int) -> bool:
        return self._max_calls is not None and index >= self._max_calls

    def _add_argument(self, text: str) -> None:
        index = self._num_calls - 1
        if text and not self._dropped(index):
            self._pieces.append(Arguments(index=index, text=text))

    def _add_raw(self) -> None:
        text, self._raw = "".join(self._raw), []
        self._add_content(text)

    def _add_content(self, text: str) -> None:
        self._flush_spaces()
        self._pieces.append(Content(text=text))
        self._place = _Place.INSIDE

    def _flush_spaces(self) -> None:
        if self._spaces:
            self._pieces.append(Content(text="".join(self._spaces)))
            self._spaces.clear()


class _Place(enum.Enum):
    """Where the text outside of calls is."""

    START = "nothing but white space so far"
    INSIDE = "after content"
    NEXT = "right after a call"
    LISTED = "right after a call in a list"
    AFTER = "after the end marker of a call"


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces with neighbours of one kind made one."""
    joined: list[Piece] = []
    for _, group in itertools.groupby(pieces, _kind):
        first, *others = group
        if others and not isinstance(first, CallStart):
            text = first.text + "".join(p.text for p in others if not isinstance(p, CallStart))
            first = dataclasses.replace(first, text=text)
        joined.append(first)
    return joined


def _kind(piece: Piece) -> tuple[str, int]:
    return type(piece).__name__, -1 if isinstance(piece, Content) else piece.index


_WORD = re.compile(r"[^ \t\r\n<\[{,\];]+")
