"""The text: Python sources of one folder, in a fixed order, each with its hash."""

import dataclasses
import hashlib
import pathlib
import sysconfig
from collections.abc import Sequence

# Tests, tables of characters, old copies and what an installer adds: bulk that teaches little.
_EXCLUDED_FOLDERS = frozenset(
    """
    site-packages dist-packages test tests idle_test encodings idlelib lib2to3 distutils
    pydoc_data turtledemo ensurepip __phello__ __pycache__
    """.split()
)
# Made when Python was built: they describe that machine.
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the corpus; `name` is its path under the root, with forward slashes."""

    name: str
    text: str
    sha256: str


def standard_library() -> pathlib.Path:
    """Where this Python keeps its standard library."""
    return pathlib.Path(sysconfig.get_path("stdlib"))


def read_corpus(root: pathlib.Path) -> list[SourceFile]:
    """Every Python file under `root` that is worth learning from, sorted by name.

    Raises:
        ValueError: There is none.
    """
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    found = [_read(root, name) for name in names if _is_wanted(name)]
    if not found:
        raise ValueError(f"--corpus_root={root} has no Python sources to train on")
    return found


def _is_wanted(name: str) -> bool:
    parts = name.split("/")
    if _EXCLUDED_FOLDERS.intersection(parts):
        return False
    return not any(part.startswith(_EXCLUDED_PREFIXES) for part in parts)


def _read(root: pathlib.Path, name: str) -> SourceFile:
    data = (root / name).read_bytes()
    text = data.decode("utf-8").replace("\r\n", "\n")
    return SourceFile(name=name, text=text, sha256=hashlib.sha256(data).hexdigest())


def split(files: Sequence[SourceFile], *, one_in: int) -> tuple[list[SourceFile], list[SourceFile]]:
    """Files for training and files for validation.

    A file's side follows from its name alone, so it stays there when other files come or go.

    Raises:
        ValueError: One side would be empty.
    """
    held_out = [f for f in files if _number(f.name) % one_in == 0]
    kept = [f for f in files if _number(f.name) % one_in]
    if not kept or not held_out:
        raise ValueError(
            f"--corpus_held_out_one_in={one_in} leaves {len(kept)} files for training and "
            f"{len(held_out)} for validation; both need one"
        )
    return kept, held_out


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def digest(files: Sequence[SourceFile]) -> str:
    """One hash for all of them: of lines of hash and name, as `sha256sum` prints them."""
    lines = "".join(f"{f.sha256}  {f.name}\n" for f in files)
    return hashlib.sha256(lines.encode()).hexdigest()
