"""The offline door of batch jobs: the model of a command line, lines through grain."""

import contextlib
from collections.abc import Iterator

import grain

from nanoflow_jax import config as config_lib
from nanoflow_jax.batch import fingerprint, resume, source
from nanoflow_jax.engine import model_source


@contextlib.contextmanager
def open_job(options: resume.Options, section: config_lib.ModelSection) -> Iterator[resume.Job]:
    """Begins a job, or goes on with one, before any weight is read.

    Args:
        options: What to read and write.
        section: The model's knobs.

    Raises:
        ValueError: The job cannot begin or go on; the message says what to change.
    """
    with resume.open_job(
        options,
        identify=lambda: fingerprint.of_model(section, model_source.open_model(section)),
        shard_of=_grain_shard,
    ) as opened:
        yield opened


def _grain_shard(lines: source.JsonlSource, k: int, n: int) -> resume.Lines:
    """Sharded by grain, read by random access without workers."""
    shard: resume.Lines = grain.MapDataset.source(lines)[k::n]
    return shard
