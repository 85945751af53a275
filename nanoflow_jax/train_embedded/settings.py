"""Every knob of training the embedded model; its flag is derived from it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from nanoflow_jax import config
from nanoflow_jax.models import architecture

NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Which text is read and how it is cut."""

    PREFIX = "corpus_"

    root: str = config.knob("", "Folder of Python sources; the standard library where empty.")
    held_out_one_in: int = config.knob(25, "One file in this many is for validation.", low=2)
    vocab_size: int = config.knob(4096, "Tokens in the vocabulary.", low=300, high=65536)

    def __post_init__(self) -> None:
        config.check_bounds(self, self.PREFIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeSettings:
    """The model's sizes."""

    PREFIX = "shape_"

    num_layers: int = config.knob(4, "Transformer layers.", low=1)
    hidden_size: int = config.knob(256, "Width of the residual stream.", low=2)
    num_heads: int = config.knob(4, "Query heads.", low=1)
    num_kv_heads: int = config.knob(2, "Key and value heads.", low=1)
    head_dim: int = config.knob(64, "Width of one head.", low=2)
    intermediate_size: int = config.knob(512, "Width of the feed-forward.", low=1)
    context_len: int = config.knob(1024, "Tokens in one row, and the model's context.", low=2)

    def __post_init__(self) -> None:
        config.check_bounds(self, self.PREFIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The optimiser, and how long it runs."""

    PREFIX = "train_"

    num_steps: int = config.knob(3200, "Optimiser steps in total.", low=1)
    batch_rows: int = config.knob(1, "Rows of context_len tokens per step.", low=1)
    short_len: int = config.knob(256, "Early steps cut each row into windows of this.", low=2)
    short_fraction: float = config.knob(
        0.85, "Share of the steps that see short windows.", low=0, high=1
    )
    peak_rate: float = config.knob(3e-3, "Learning rate after warm-up.", low=0)
    warmup_steps: int = config.knob(50, "Steps of linear warm-up.", low=0)
    weight_decay: float = config.knob(0.1, "AdamW's decay of matrices.", low=0)
    max_gradient_norm: float = config.knob(1.0, "Gradients are clipped to this norm.", low=0)
    seed: int = config.knob(0, "Seed of first weights and row order.", low=0)
    save_every: int = config.knob(50, "Steps from one checkpoint to the next.", low=1)

    def __post_init__(self) -> None:
        config.check_bounds(self, self.PREFIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All of it."""

    corpus: CorpusSettings = dataclasses.field(default_factory=CorpusSettings)
    shape: ShapeSettings = dataclasses.field(default_factory=ShapeSettings)
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)

    def __post_init__(self) -> None:
        if self.shape.context_len % self.train.short_len:
            raise ValueError(
                f"--train_short_len={self.train.short_len} does not divide "
                f"--shape_context_len={self.shape.context_len}: rows are cut into equal windows"
            )

    def model_config(self) -> architecture.ModelConfig:
        """The Llama model of these sizes, with tied embeddings."""
        s = self.shape
        return architecture.ModelConfig(
            family="llama",
            num_layers=s.num_layers,
            hidden_size=s.hidden_size,
            num_heads=s.num_heads,
            num_kv_heads=s.num_kv_heads,
            head_dim=s.head_dim,
            intermediate_size=s.intermediate_size,
            vocab_size=self.corpus.vocab_size,
            max_context_len=s.context_len,
            norm_eps=NORM_EPS,
            rope=architecture.RopeConfig(),
            query_scale=s.head_dim**-0.5,
            windows=(None,) * s.num_layers,
            tied_embeddings=True,
        )

    def resumable_part(self) -> dict[str, object]:
        """What may not change between a checkpoint and the run that goes on from it."""
        free = {"corpus_root", "train_num_steps", "train_save_every"}
        return {name: value for name, value, _ in knob_values(self) if name not in free}


def from_flags(values: Mapping[str, Any]) -> Settings:
    """The settings that flags of these names describe; other names are left alone."""
    sections = {}
    for field in dataclasses.fields(Settings):
        kind: Any = config.section_type(field)
        names = [f.name for f in dataclasses.fields(kind)]
        sections[field.name] = kind(**{name: values[f"{kind.PREFIX}{name}"] for name in names})
    return Settings(**sections)


def knob_values(chosen: Settings) -> Iterator[tuple[str, Any, Any]]:
    """Flag name, value and default of every knob."""
    for section in (chosen.corpus, chosen.shape, chosen.train):
        for field in dataclasses.fields(section):
            name = f"{section.PREFIX}{field.name}"
            yield name, getattr(section, field.name), field.default
