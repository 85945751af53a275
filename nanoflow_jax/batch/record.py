"""What a job is: OUT.jsonl.job, written once when it begins and compared on every later start."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints import files

_FORMAT = 1
# In the words of the command line, in the order in which changes are reported.
_MEANINGS = {
    "input": "the input file",
    "model": "the model's config or weights",
    "tokenizer": "the model's tokenizer, chat template or generation_config.json",
    "dtype": "--dtype, or the kind of device that --dtype=auto goes by",
    "max_context_len": "--max_context_len",
    "sampling": "the sampling defaults",
    "seed": "--seed",
    "shard": "--process_index or --process_count",
}


class JobChangedError(ValueError):
    """A job that was begun and would now give other answers.

    Attributes:
        changes: What changed, in words.
    """

    def __init__(self, message: str, *, changes: str) -> None:
        super().__init__(message)
        self.changes = changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """What a job must know of a model; see `fingerprint.of_model`, which makes it.

    Attributes:
        name: What answers call it.
        model: As in `Identity`, like the rest.
        tokenizer: Likewise.
        dtype: Likewise.
        max_context_len: Likewise.
    """

    name: str
    model: str
    tokenizer: str
    dtype: str
    max_context_len: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """All that the answers depend on. Batch and page sizes are not among it.

    Attributes:
        input: Hash and size of the input.
        model: Fingerprint of config and weight headers, and bytes of weights.
        tokenizer: Hash of the text files beside the weights.
        dtype: Number format, as asked for.
        max_context_len: Tokens, as asked for.
        sampling: Defaults of rows that do not say.
        seed: Of the job.
        shard: `K of N` processes.
    """

    input: str
    model: str
    tokenizer: str
    dtype: str
    max_context_len: int
    sampling: Mapping[str, Any]
    seed: int
    shard: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job that was begun.

    Attributes:
        identity: What must not change.
        job: Name in the ids of its rows. The processes of one job share it.
        created: When it began, seconds since 1970.
        model_name: What answers call the model.
    """

    identity: Identity
    job: str
    created: int
    model_name: str

    @classmethod
    def begin(cls, identity: Identity, *, created: int, model_name: str) -> "JobRecord":
        """The record of a job that begins now."""
        shared = {k: v for k, v in dataclasses.asdict(identity).items() if k != "shard"}
        digest = hashlib.sha256(json.dumps(shared, sort_keys=True).encode())
        return cls(
            identity=identity,
            job=digest.hexdigest()[:16],
            created=created,
            model_name=model_name,
        )

    def write(self, path: Path) -> None:
        """Writes the record, whole or not at all."""
        value = {"format": _FORMAT, **dataclasses.asdict(self)}
        files.write_atomic(path, json.dumps(value, indent=1).encode() + b"\n")

    def check_same(self, identity: Identity, output: Path) -> None:
        """Refuses to go on with a job that would now give other answers.

        Raises:
            JobChangedError: Something changed; the message says what.
        """
        then, now = dataclasses.asdict(self.identity), dataclasses.asdict(identity)
        for name, meaning in _MEANINGS.items():
            if then[name] != now[name]:
                changes = f"{meaning} changed ({_differences(then[name], now[name])})"
                raise JobChangedError(
                    f"{output} was begun with other settings: {changes}. Go back to what it was, "
                    "give another --output, or delete what is there and begin again with --restart",
                    changes=changes,
                )


def try_read(path: Path) -> JobRecord | None:
    """The record of the job that was begun here, None if there is none.

    Raises:
        ValueError: The file is not such a record.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
        if value.pop("format") != _FORMAT:
            raise ValueError("it is of another version")
        return JobRecord(**{**value, "identity": Identity(**value["identity"])})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not the record of a job ({error}); if the output beside it is not needed, "
            "delete both; otherwise give another --output"
        ) from error


def _differences(then: Any, now: Any) -> str:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = sorted(k for k in {*then, *now} if then.get(k) != now.get(k))
        return ", ".join(f"{k}: {then.get(k)} then, {now.get(k)} now" for k in names)
    return f"{then} then, {now} now"
