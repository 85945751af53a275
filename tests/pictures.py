"""What tests look at in an SVG picture."""

import xml.etree.ElementTree
from xml.etree.ElementTree import Element

_SPACE = "{http://www.w3.org/2000/svg}"


def parse(picture: str) -> Element:
    """The root of a picture; it must be well formed."""
    return xml.etree.ElementTree.fromstring(picture)


def texts(root: Element, tag: str = "text") -> list[str]:
    """What is written in elements of a kind, in order."""
    return [one.text or "" for one in root.iter(f"{_SPACE}{tag}")]


def bars(root: Element) -> list[Element]:
    """All rectangles but the ground."""
    return [one for one in root.iter(f"{_SPACE}rect") if one.get("width") != "100%"]


def titles(root: Element) -> list[str]:
    """What is written in bold."""
    return [one.text or "" for one in root.iter(f"{_SPACE}text") if one.get("class") == "title"]
