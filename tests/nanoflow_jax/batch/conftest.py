"""What tests of jobs in this process share: a tiny model, and a folder."""

import pathlib
from collections.abc import Iterator

import batch_runs
import pytest

from nanoflow_jax import llm


@pytest.fixture(scope="module")
def model() -> Iterator[llm.LLM]:
    with llm.LLM(str(batch_runs.FOLDER), **batch_runs.KNOBS) as made:
        yield made


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path
