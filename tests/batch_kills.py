"""Kills a server's batches at every write, and checks what the next start makes of it.

Run as a program: it forks for each trial, which a process with jax in it must not.
"""

import asyncio
import collections
import os
import pathlib
import random
import sys
import traceback
from typing import Any

import served_batches

from nanoflow_jax.openai.requests import Endpoint
from nanoflow_jax.serve.batch_record import Status

NUM_ROWS = 6
_KILLED = 77
_WRITES = ("os.rename", "os.remove", "os.truncate")


def lines() -> list[Any]:
    """Good rows and bad ones, so that both result files are made."""
    made: list[Any] = served_batches.rows(NUM_ROWS)
    made[1]["url"] = str(Endpoint.CHAT)
    made[3] = "not json"
    made[4]["body"]["prompt"] = [served_batches.REFUSED]
    return made


def work(folder: pathlib.Path) -> None:
    """A client that goes on where it was, and a server until nothing is left to do."""

    async def serve() -> None:
        with served_batches.open_store(folder) as store:
            known = [info.id for info in store.files.all() if info.purpose == "batch"]
            file_id = known[0] if known else served_batches.put(store, lines())
            async with served_batches.running(store, served_batches.Adder(), lookahead=2):
                made = store.all() or [store.create(Endpoint.COMPLETIONS, file_id, {"k": "v"})]
                await served_batches.ended(store, *(batch.id for batch in made))

    asyncio.run(serve())


def check(folder: pathlib.Path) -> None:
    """Raises unless every row is in the results exactly once and nothing else is left."""
    with served_batches.open_store(folder) as store:
        (batch,) = store.all()
        assert batch.status is Status.COMPLETED, batch
        assert (batch.total, batch.completed, batch.failed) == (NUM_ROWS, 3, 3), batch
        good = served_batches.read(store, batch.output_file_id)
        bad = served_batches.read(store, batch.error_file_id)
        assert [row["custom_id"] for row in good] == ["id-0", "id-2", "id-5"], good
        assert [row["custom_id"] for row in bad] == ["id-1", "row-3", "id-4"], bad
        texts = [row["response"]["body"]["choices"][0]["text"] for row in good]
        assert texts == ["1 1", "3 3", "6 6"], texts
        assert all(row["error"] is not None for row in bad)
        ids = [batch.input_file_id, batch.output_file_id, batch.error_file_id]
        left = sorted(path.name for path in folder.rglob("*") if path.is_file())
        wanted = [f"{name}{end}" for name in ids for end in ("", ".json")]
        assert left == sorted([*wanted, ".lock", f"{batch.id}.json"]), left


def kill_at(place: int, folder: pathlib.Path, *, is_torn: bool) -> None:
    """Has this process die at its n-th change of a file, for good half-way through a write."""
    root = str(folder)
    left = place
    real_write, real_fsync = os.write, os.fsync

    def count() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            is_write = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            is_write = event in _WRITES
        if is_write and str(args[0]).startswith(root) and count():
            os._exit(_KILLED)

    def write(descriptor: int, data: Any) -> int:
        if len(data) > 1 and _is_ours(descriptor, root) and count():
            if is_torn:
                real_write(descriptor, data[: len(data) // 2])
            os._exit(_KILLED)
        return real_write(descriptor, data)

    def fsync(descriptor: int) -> None:
        if count():
            os._exit(_KILLED)
        real_fsync(descriptor)

    os.write, os.fsync = write, fsync  # type: ignore[assignment]
    sys.addaudithook(on_event)


def _is_ours(descriptor: int, root: str) -> bool:
    return os.readlink(f"/proc/self/fd/{descriptor}").startswith(root)


def in_fork(call: Any) -> int:
    """Runs something in a forked process; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def trial(folder: pathlib.Path, places: list[int], *, is_torn: bool) -> int:
    """Kills at each place in turn, then lets it finish; how many kills took place."""
    folder.mkdir()
    num_kills = 0
    for place in places:

        def killed(place: int = place) -> None:
            kill_at(place, folder, is_torn=is_torn)
            work(folder)

        code = in_fork(killed)
        assert code in (0, _KILLED), f"place {place}: exit code {code}"
        num_kills += code == _KILLED
    for call in (work, check):
        assert in_fork(lambda call=call: call(folder)) == 0, f"{folder.name}: {call.__name__}"
    return num_kills


def main(folder: pathlib.Path) -> None:
    """Kills once at every place, then three times at random ones."""
    counts: collections.Counter[bool] = collections.Counter()
    for is_torn in (False, True):
        while trial(folder / f"{is_torn}-{counts[is_torn]}", [counts[is_torn]], is_torn=is_torn):
            counts[is_torn] += 1
    drawn = random.Random(0)
    for i in range(15):
        places = [drawn.randrange(25) for _ in range(3)]
        trial(folder / f"thrice-{i}", places, is_torn=True)
    print(f"{counts[False]} places, {counts[True]} with torn writes")  # noqa: T201


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
