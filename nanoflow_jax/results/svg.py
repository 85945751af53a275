"""What all pictures share."""

import html
from collections.abc import Iterable

# Told apart by people who do not see all colours (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#666666", "#000000")
_STYLE = (
    "text{font:10px sans-serif;fill:#222}.title{font-weight:bold;font-size:11px}"
    ".axis{stroke:#888;fill:none}.grid{stroke:#ddd;fill:none}"
    ".even{stroke:#999;stroke-dasharray:2 3;fill:none}.flat{stroke-dasharray:6 3}"
    ".whisker{stroke:#222;fill:none}"
)


def page(width: int, height: int, parts: Iterable[str]) -> str:
    """A whole picture.

    Args:
        width: Pixels.
        height: Pixels.
        parts: Its elements, in which text is escaped.
    """
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    )
    ground = f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def document(picture: str, *, title: str) -> str:
    """A picture as an HTML page that needs nothing else."""
    return f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>\n{picture}'


def tick(top: float, *, most: int = 8) -> float:
    """The distance of the lines across an axis from 0 to a positive top.

    Args:
        top: Of the axis.
        most: Lines.
    """
    step = 10.0**-12
    while True:
        for factor in (1, 2, 5):
            if top / (step * factor) <= most:
                return step * factor
        step *= 10
