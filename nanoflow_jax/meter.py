"""Progress on a terminal as a bar, elsewhere as a line every few seconds."""

import time
from collections.abc import Callable
from typing import TextIO

import tqdm

_LINE_S = 5.0


class Meter:
    """Shows how much of a known amount is done.

    A bar is redrawn at most ten times a second, so it may be told as often as one likes.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str,
        stream: TextIO,
        first: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins.

        Args:
            total: The whole amount.
            unit: Of what: `row`, or `B` for bytes, which are shown as kB, MB, ....
            stream: Where to show it.
            first: How much is done already.
            clock: Seconds.
        """
        self._total = total
        self._unit = unit
        self._stream = stream
        self._first = self._done = first
        self._clock = clock
        self._began = self._shown = clock()
        self._note = ""
        self._bar = None
        if stream.isatty():
            self._bar = tqdm.tqdm(
                total=total,
                initial=first,
                unit=unit,
                unit_scale=unit == "B",
                file=stream,
                dynamic_ncols=True,
            )

    def update(self, done: int, note: str = "") -> None:
        """Shows a new amount, and a note such as a speed."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._done)
        self._done = done
        self._note = note
        if self._bar is None and self._clock() - self._shown >= _LINE_S:
            self._write_line()

    def close(self) -> None:
        """Shows the last amount for good."""
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._first:
            self._write_line()

    def _write_line(self) -> None:
        self._shown = self._clock()
        self._stream.write(self._line() + "\n")
        self._stream.flush()

    def _line(self) -> str:
        parts = [f"{self._amount(self._done)} of {self._amount(self._total)}"]
        if self._unit != "B":
            parts[0] += f" {self._unit}s"
        if self._note:
            parts.append(self._note)
        if self._first < self._done < self._total:
            per_s = (self._done - self._first) / max(self._clock() - self._began, 1e-9)
            left = tqdm.tqdm.format_interval((self._total - self._done) / per_s)
            parts.append(f"{left} left")
        return ", ".join(parts)

    def _amount(self, value: int) -> str:
        return bytes_text(value) if self._unit == "B" else str(value)


def bytes_text(num_bytes: int) -> str:
    """Bytes for people: 3.2 GB."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
