"""Random access to the lines of a JSONL file of any size."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from nanoflow_jax.openai.errors import ApiError

_CHUNK_BYTES = 1 << 20
_NEWLINE = ord("\n")
MAX_ROW_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"


class JsonlSource:
    """The lines of a file by number, for grain: it has `__len__` and `__getitem__`.

    Invariant: `[_starts[i], _starts[i + 1])` is line i with its newline. 8 bytes of memory a line.

    Attributes:
        path: The file.
        num_bytes: Its size.
        sha256: Hash of all of it, taken in the same pass as the offsets.
    """

    def __init__(self, path: Path | str) -> None:
        """Opens a file and finds its lines.

        Raises:
            ValueError: There is no such file, or it is not a plain file.
        """
        self.path = Path(path)
        check_plain_file(self.path)
        self._file = os.open(self.path, os.O_RDONLY)
        try:
            self._starts, self.sha256 = self._scan()
        except BaseException:
            os.close(self._file)
            raise
        self.num_bytes = int(self._starts[-1])

    def _scan(self) -> tuple[Int64[np.ndarray, "lines_and_end"], str]:
        digest = hashlib.sha256()
        found = [np.zeros(1, np.int64)]
        end = 0
        ends_with_newline = True
        while chunk := os.pread(self._file, _CHUNK_BYTES, end):
            digest.update(chunk)
            newlines = np.flatnonzero(np.frombuffer(chunk, np.uint8) == _NEWLINE)
            found.append(newlines + np.int64(end + 1))
            ends_with_newline = chunk.endswith(b"\n")
            end += len(chunk)
        if not ends_with_newline:
            found.append(np.array([end], np.int64))
        return np.concatenate(found), digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, line: int) -> tuple[int, bytes]:
        """Number and bytes of a line.

        Returns:
            The line without its newline, cut after MAX_ROW_BYTES + 1 bytes.

        Raises:
            OSError: The file is no longer what it was.
        """
        start, stop = int(self._starts[line]), int(self._starts[line + 1])
        wanted = min(stop - start, MAX_ROW_BYTES + 1)
        data = os.pread(self._file, wanted, start)
        is_last = line == len(self) - 1
        if len(data) < wanted or (wanted == stop - start and data[-1:] != b"\n" and not is_last):
            raise OSError(f"{self.path} changed while it was read; start the job again")
        if line == 0:
            data = data.removeprefix(_BOM)
        return line, data.rstrip(b"\r\n")

    def blank_lines(self) -> Bool[np.ndarray, "lines"]:
        """Which lines are empty: they are no rows, but they count where lines are numbered."""
        blank = np.zeros(len(self), bool)
        for line in np.flatnonzero(np.diff(self._starts) <= len("\r\n")).tolist():
            blank[line] = not self[line][1]
        return blank

    def __repr__(self) -> str:
        return f"JsonlSource({str(self.path)!r})"

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def check_plain_file(path: Path) -> None:
    """Refuses an input that is not there, or whose lines have no places.

    Raises:
        ValueError: There is no such file, or it is not a plain file.
    """
    if not path.exists():
        raise ValueError(f"--input={path}: there is no such file")
    if not path.is_file():
        raise ValueError(
            f"--input={path} is not a plain file; rows are read by their place in it, so save "
            "what a pipe or a folder gives as one file first"
        )


def parse_object(data: bytes, *, line: int) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        data: Its bytes.
        line: Its number from 0, for messages, which count from 1.

    Raises:
        ApiError: It is no JSON object, or too long.
    """
    place = f"line {line + 1}"
    if len(data) > MAX_ROW_BYTES:
        raise ApiError(f"{place} is longer than {MAX_ROW_BYTES} bytes", code="row_too_long")
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ApiError(f"{place} nests JSON too deeply", code="invalid_json") from error
    except ValueError as error:
        raise ApiError(f"{place} is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(
            f"{place} is not a JSON object, but {type(value).__name__}", code="invalid_json"
        )
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def repeated_ids(source: JsonlSource) -> dict[int, int]:
    """Lines whose custom_id stood in an earlier line, with the number of the first.

    Holds 16 bytes a line while it runs; two passes over the lines that repeat a hash.
    """
    hashes = np.zeros(len(source), np.uint64)
    for line in range(len(source)):
        custom_id = _custom_id(source, line)
        if custom_id is not None:
            digest = hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=8)
            hashes[line] = int.from_bytes(digest.digest(), "little") | 1
    first: dict[str, int] = {}
    repeated = {}
    for line in _lines_that_share(hashes):
        custom_id = _custom_id(source, line)
        assert custom_id is not None, "only lines with a custom_id have a hash"
        if first.setdefault(custom_id, line) != line:
            repeated[line] = first[custom_id]
    return repeated


def _lines_that_share(hashes: UInt64[np.ndarray, "lines"]) -> list[int]:
    """Lines, in order, whose hash is not 0 and is that of another line too."""
    order = np.argsort(hashes, kind="stable")
    same = hashes[order][1:] == hashes[order][:-1]
    shares = np.zeros(len(hashes), bool)
    shares[order[1:][same]] = True
    shares[order[:-1][same]] = True
    lines: list[int] = np.flatnonzero(shares & (hashes != 0)).tolist()
    return lines


def _custom_id(source: JsonlSource, line: int) -> str | None:
    data = source[line][1]
    # Most of the time of a scan is JSON: short rows have no custom_id and need none of it.
    if b'"custom_id"' not in data and b"\\u" not in data:
        return None
    try:
        value = parse_object(data, line=line).get("custom_id")
    except ApiError:
        return None
    return value if isinstance(value, str) else None
