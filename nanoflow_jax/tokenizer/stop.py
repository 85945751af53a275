"""Ends a text at its stop strings while the text is still being made."""


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    The text ends at the first character that completes a stop string; if that character completes
    several, the longest counts. This needs no look-ahead and does not depend on how the text is cut
    into pieces. (vLLM looks once per token and takes the first string in the caller's order, which
    is the same unless two stop strings are completed by one token.)

    Text that may be the beginning of a stop string is held back until it is known to be none.
    """

    def __init__(self, stop: tuple[str, ...], include_in_output: bool = False) -> None:
        """Start with an empty text.

        Args:
            stop: Stop strings, none of them empty.
            include_in_output: Keep the stop string at the end of the text.

        Raises:
            ValueError: A stop string is empty.
        """
        if "" in stop:
            raise ValueError(f"stop={list(stop)} holds an empty string; leave it out")
        self._stop = stop
        self._include_in_output = include_in_output
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self._hit: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text.

        Returns:
            Text that is now certain to be part of the output, and the stop string that ended it,
            if one did. After that, all further text is dropped.
        """
        if self._hit is not None:
            return "", self._hit
        text = self._held + text
        ends = [(text.find(s) + len(s), -len(s), s) for s in self._stop if s in text]
        if ends:
            end, _, self._hit = min(ends)
            self._held = ""
            return text[: end if self._include_in_output else end - len(self._hit)], self._hit
        cut = len(text) - self._num_held(text)
        self._held = text[cut:]
        return text[:cut], None

    def finish(self) -> str:
        """The text held back, which no stop string completed."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(s.startswith(end) for s in self._stop):
                return length
        return 0
