"""Saves pictures as SVG, as an HTML page, or in pixels."""

import pathlib
import shutil
import subprocess
import tempfile

from nanoflow_jax import console
from nanoflow_jax.results import svg


def save(picture: str, path: str, *, title: str, flag: str) -> None:
    """Writes a picture that `svg.page` made, in the form that the file's name asks for.

    Args:
        picture: An SVG document.
        path: Ends in .svg, .html or .png.
        title: Of the page.
        flag: That gave the path, for messages.

    Raises:
        ValueError: The name has another ending, the file cannot be written, or no browser is there
            to make pixels.
        console.RunError: The browser made none.
    """
    target = pathlib.Path(path)
    try:
        match target.suffix:
            case ".svg":
                target.write_text(picture, encoding="utf-8")
            case ".html":
                target.write_text(svg.document(picture, title=title), encoding="utf-8")
            case ".png":
                _photograph(picture, target)
            case other:
                raise ValueError(f"--{flag} ends in {other!r}; pictures are .svg, .html or .png")
    except OSError as error:
        raise ValueError(f"--{flag}={path} cannot be written: {error.strerror}") from error


def _photograph(picture: str, path: pathlib.Path) -> None:
    """Has a browser turn a picture into pixels."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise ValueError("a .png needs chromium on the path; take .svg or .html")
    width, height = svg.size(picture)
    with tempfile.TemporaryDirectory() as folder:
        page = pathlib.Path(folder, "picture.svg")
        page.write_text(picture, encoding="utf-8")
        command = [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--user-data-dir={folder}", f"--window-size={width},{height}"),
            *(f"--screenshot={path.resolve()}", page.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        raise console.RunError(f"{browser} made no picture: {done.stderr.strip()[-500:]}")
