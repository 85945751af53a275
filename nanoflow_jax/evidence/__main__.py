"""Verifies result folders, lists them, and writes the README's figures from them.

`python -m nanoflow_jax.evidence verify --all`, or `verify FOLDER...`
`python -m nanoflow_jax.evidence list [--figures]`: all results, failed and stale ones too
`python -m nanoflow_jax.evidence readme [--check]`: writes the README's figures, or compares them
`python -m nanoflow_jax.evidence close FOLDER`: makes a failed result of a run that was cut off

Needs no GPU. Exit codes: 0 done, 1 a result or the README is not as it should be, 2 wrong flags or
folders, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from checkpoints import files
from nanoflow_jax import console
from nanoflow_jax import flags as knob_flags
from nanoflow_jax.evidence import readme, tables
from nanoflow_jax.results import verify, writer
from nanoflow_jax.results.provenance import RESULTS
from nanoflow_jax.results.verify import Verdict


def _define(values: flags.FlagValues) -> None:
    common: dict[str, Any] = {"flag_values": values, "module_name": knob_flags.main_module()}
    flags.DEFINE_string("results", RESULTS, "Folder of all results.", **common)
    flags.DEFINE_boolean("all", False, "Verify all of them.", **common)
    flags.DEFINE_boolean("figures", False, "List every figure.", **common)
    flags.DEFINE_string("readme", "README.md", "File whose figures are written.", **common)
    flags.DEFINE_boolean("check", False, "Only compare what it has with the results.", **common)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _verify(values: flags.FlagValues, names: Sequence[str]) -> int:
    if values.all == bool(names):
        raise ValueError("give folders of results to verify, or --all")
    if values.all:
        chosen = among = verify.verify_all(Path(values.results))
    else:
        chosen, among = [], []
        for name in names:
            path = Path(os.path.abspath(_folder(name)))  # even if it is "."
            if path == path.parent:
                raise ValueError(f"{name}: it is no folder of a result")
            near = [verify.verify(one) for one in sorted(path.parent.iterdir()) if one.is_dir()]
            chosen += [verdict for verdict in near if verdict.path.name == path.name]
            among += near
    for verdict in chosen:
        _show(verdict, among)
    refused = sum(bool(verdict.complaints) for verdict in chosen)
    print(f"results: {len(chosen)}, refused: {refused}")
    return console.FAILED if refused else 0


def _show(verdict: Verdict, among: Sequence[Verdict]) -> None:
    level = tables.level(verdict, among)
    print(f"{verdict.word}: {verdict.path}" + (f": {level}" if level else ""))
    for complaint in verdict.complaints:
        print(f"  {complaint}")
    for path in verdict.changed if not verdict.complaints else ():
        print(f"  {path} has changed since")
    if not verdict.complaints and verdict.result and verdict.result.manifest.message:
        print(f"  {verdict.result.manifest.message}")


def _list(values: flags.FlagValues, names: Sequence[str]) -> int:
    _none(names)
    verdicts = verify.verify_all(Path(values.results))
    print((tables.figures if values.figures else tables.results)(verdicts))
    return 0


def _readme(values: flags.FlagValues, names: Sequence[str]) -> int:
    _none(names)
    path = Path(values.readme)
    text = path.read_text(encoding="utf-8")
    by_hand = readme.by_hand(text)
    for said in by_hand:
        _say(f"error: {path}: {said}: figures of speed are written by this program, from results")
    try:
        wanted = readme.written(text, verify.verify_all(Path(values.results)))
    except ValueError as error:
        raise console.RunError(f"{path}: {error}") from error
    if wanted != text and values.check:
        _say(
            f"error: {path}: its figures are not those of the results; write them with `python -m "
            "nanoflow_jax.evidence readme`"
        )
    elif wanted != text:
        files.write_atomic(path, wanted.encode())
        print(f"wrote the figures of {path}")
    else:
        print(f"the figures of {path} are those of the results")
    return console.FAILED if by_hand or (values.check and wanted != text) else 0


def _close(values: flags.FlagValues, names: Sequence[str]) -> int:
    if len(names) != 1:
        raise ValueError("give the folder of one run that was cut off")
    found = writer.close(_folder(names[0]))
    print(f"a failed run of {found.num_samples} samples: {found.message}")
    return 0


def _folder(name: str) -> Path:
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"{name}: there is no such folder")
    return path


def _none(names: Sequence[str]) -> None:
    if names:
        raise ValueError(f"unknown argument {names[0]!r}; flags begin with --")


_COMMANDS = {"verify": _verify, "list": _list, "readme": _readme, "close": _close}


def _run(values: flags.FlagValues, arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in _COMMANDS:
        raise ValueError(f"name what to do: {', '.join(_COMMANDS)}")
    return _COMMANDS[arguments[0]](values, arguments[1:])


def main(argv: list[str]) -> int:
    """Runs the command named on the command line; returns the exit code."""
    return console.run(lambda: _run(flags.FLAGS, argv[1:]), say=_say, debug=False)


if __name__ == "__main__":
    _define(flags.FLAGS)
    console.start(main)
