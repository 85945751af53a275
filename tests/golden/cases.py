"""Reads the golden cases that `make.py` wrote. Needs numpy only."""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

CASES: tuple[str, ...] = (
    "llama",
    "llama3",
    "llama_bias",
    "mistral",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "mixtral",
    "qwen3_moe",
    "qwen3_moe_unnormalised",
    "gemma2",
)

_HERE = pathlib.Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """A tiny model folder and what transformers answers for it.

    Attributes:
        path: The Hugging Face folder.
        prompts: Token ids of each prompt; lengths differ.
        tokens: Greedy tokens, 48 a prompt, end-of-text ignored.
        margins: Distance of the top two logits at each of these tokens.
        logits: By prompt index, logits at every position of that prompt.
        chat: Conversations with `messages`, `add_generation_prompt`, perhaps `tools`, `kwargs`
            (further template variables) and `now` (ISO time that strftime_now sees), and either
            `rendered` and `token_ids`, or the `error` that the template raises.
        texts: Rows of `text`, `token_ids` (with special tokens), `decoded` (without them) and
            `decoded_with_special`.
    """

    path: pathlib.Path
    prompts: list[list[int]]
    tokens: Int32[np.ndarray, "R 48"]
    margins: Float32[np.ndarray, "R 48"]
    logits: dict[int, Float32[np.ndarray, "T V"]]
    chat: list[dict[str, Any]]
    texts: list[dict[str, Any]]


def load(case: str) -> GoldenCase:
    """Read one case.

    Raises:
        ValueError: There is no case of that name.
    """
    if case not in CASES:
        raise ValueError(f"no golden case {case!r}; there are {', '.join(CASES)}")
    path = _HERE / case
    with np.load(path / "golden.npz", allow_pickle=False) as archive:
        arrays = dict(archive)
    flat, offsets = arrays["prompt_tokens"].tolist(), arrays["prompt_offsets"].tolist()
    prefix = "logits_"
    return GoldenCase(
        path=path,
        prompts=[flat[a:b] for a, b in itertools.pairwise(offsets)],
        tokens=arrays["tokens"],
        margins=arrays["margins"],
        logits={
            int(name.removeprefix(prefix)): values
            for name, values in arrays.items()
            if name.startswith(prefix)
        },
        chat=_read(path / "chat.json"),
        texts=_read(path / "texts.json"),
    )


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows
