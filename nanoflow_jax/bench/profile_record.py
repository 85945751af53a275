"""Samples of a profile that is being measured; what was added survives kill -9."""

import collections
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

# How samples of one problem differ: SMs, and of those the product's in a pair.
Labels = tuple[int | None, int | None]


class Record:
    """A file of lines beside the profile: first what is measured, then samples as they come.

    Invariant: each sample that `add` has taken is a whole line of the file.

    Attributes:
        found: Samples that were there already.
        faults: What could not be measured, and why.
        ended: Names of problems that were measured to their end.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Begins, or goes on with what was cut off.

        Args:
            path: Of the profile.
            header: What is measured, by what; JSON gives it back unchanged.

        Raises:
            ValueError: The file cannot be written, or holds samples of something else.
        """
        self._path = path.with_name(f".{path.name}.part")
        self._samples: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
        self.faults: list[str] = []
        self.ended: set[str] = set()
        self._file: TextIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._whole_lines()
            if lines:
                self._check(json.loads(lines[0]), json.loads(json.dumps(header)))
            for line in lines[1:]:
                self._take(json.loads(line))
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"--output: {self._path} cannot be written: {error.strerror}"
            ) from error
        self.found = sum(map(len, self._samples.values()))
        if not lines:
            self._write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, sample: Mapping[str, Any]) -> None:
        """Keeps a sample of `kernel_timing.measure`; it is in the file once this returns."""
        self._write(sample)
        self._take(sample)

    def end_of(self, case: str) -> None:
        """Notes that a problem was measured to its end."""
        self._write({"ended": case})
        self.ended.add(case)

    def done(self, case: str) -> set[tuple[str, int]]:
        """Modes and rounds of a problem that were measured."""
        return set(self._samples.get(case, {}))

    def seconds(self, case: str) -> dict[Labels, list[float]]:
        """Samples of a problem by how they differ."""
        found: dict[Labels, list[float]] = collections.defaultdict(list)
        for sample in self._samples.get(case, {}).values():
            found[sample["num_ctas"], sample["split"]].append(sample["seconds"])
        return dict(found)

    def end(self) -> None:
        """Removes the file: all is in the profile."""
        self._path.unlink()

    def _whole_lines(self) -> list[str]:
        """Lines of the file, without one that a kill has cut."""
        if not self._path.exists():
            return []
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self._path, len(whole))
        return whole.decode().splitlines()

    def _check(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = [name for name in now if before.get(name) != now[name]]
        if differing:
            raise ValueError(
                f"{self._path} was begun with other {', '.join(differing)}; go on with those, or "
                "delete it to measure anew"
            )

    def _take(self, sample: Mapping[str, Any]) -> None:
        if "ended" in sample:
            self.ended.add(sample["ended"])
        elif "fault" in sample:
            self.faults.append(f"{sample['case']}, {sample['mode']}: {sample['fault']}")
        else:
            of_case = self._samples.setdefault(sample["case"], {})
            of_case[sample["mode"], sample["round"]] = dict(sample)

    def _write(self, fields: Mapping[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()
