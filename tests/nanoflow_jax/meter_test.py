"""Progress on terminals and elsewhere."""

import io

import pytest

from nanoflow_jax import meter


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_elsewhere_a_line_comes_every_five_seconds_and_at_the_end() -> None:
    now = 0.0
    stream = io.StringIO()
    shown = meter.Meter(100, unit="row", stream=stream, first=20, clock=lambda: now)
    for now, done in ((1.0, 22), (5.0, 30), (9.9, 35), (10.0, 40), (12.0, 100)):  # noqa: B007
        shown.update(done, "7.0 tokens/s")
    shown.close()
    assert stream.getvalue().splitlines() == [
        "30 of 100 rows, 7.0 tokens/s, 00:35 left",
        "40 of 100 rows, 7.0 tokens/s, 00:30 left",
        "100 of 100 rows, 7.0 tokens/s",
    ]


def test_nothing_is_promised_before_something_is_done() -> None:
    now = 0.0
    stream = io.StringIO()
    shown = meter.Meter(100, unit="row", stream=stream, first=20, clock=lambda: now)
    now = 60.0
    shown.update(20)
    assert stream.getvalue() == "20 of 100 rows\n"


def test_bytes_have_units() -> None:
    now = 0.0
    stream = io.StringIO()
    shown = meter.Meter(4_000_000_000, unit="B", stream=stream, clock=lambda: now)
    now = 10.0
    shown.update(1_000_000_000)
    assert stream.getvalue() == "1.0 GB of 4.0 GB, 00:30 left\n"


def test_on_a_terminal_there_is_a_bar() -> None:
    stream = _Terminal()
    shown = meter.Meter(10, unit="row", stream=stream, first=2)
    shown.update(10, "7.0 tokens/s")
    shown.close()
    assert "2/10" in stream.getvalue()
    assert "10/10" in stream.getvalue()
    assert "7.0 tokens/s" in stream.getvalue()


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_500_000, "2.5 MB"),
        (7_000_000_000_000_000, "7000.0 TB"),
    ],
)
def test_amounts_are_for_people(num_bytes: int, text: str) -> None:
    assert meter.bytes_text(num_bytes) == text
