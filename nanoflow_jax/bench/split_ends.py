"""The ends of a measured link: models, engines that count their time, and clients made slower."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import model_source
from nanoflow_jax.models import huggingface
from nanoflow_jax.split import interface, settings

EMBEDDED, MODEL_S = "embedded", "S"
MODELS = (EMBEDDED, MODEL_S)
# 15.7 M parameters: large enough that layers, and not the host, take most of a step.
_SHAPE_OF_S = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "max_position_embeddings": 2048,
    "num_attention_heads": 6,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 4096,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndConfig:
    """What an end is built from; plain values, for it may be told to another process.

    Attributes:
        model: One of MODELS.
        grid: Layers before which requests enter and leave.
        knobs: Of the engine.
        patience_s: Of the gateway; see `settings.GatewaySection`.
    """

    model: str
    grid: tuple[int, ...]
    knobs: dict[str, Any]
    patience_s: float = settings.GatewaySection().patience_s

    def engine_config(self) -> config_lib.EngineConfig:
        """The knobs, in float32, in which all ways of running give the same tokens."""
        knobs = {"dtype": "float32", "penalty_requests": 1, **self.knobs}
        return config_lib.EngineConfig.from_knobs(random_weights=self.model == MODEL_S, **knobs)


def source_of(model: str) -> model_source.ModelSource:
    """A model by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if model == EMBEDDED:
        return model_source.open_model(config_lib.ModelSection())
    if model != MODEL_S:
        raise ValueError(f"--split_models: {model} is none of {', '.join(MODELS)}")
    return model_source.ModelSource(
        config=huggingface.read_config(_SHAPE_OF_S),
        folder=None,
        eos_ids=frozenset(),
        stored_dtype="float32",
    )


class MeteredEngine:
    """An engine of pieces that counts the time of its steps, and can take longer for them.

    Invariant: `busy_s` is what the engine's own steps took, without what they were made longer by.

    Attributes:
        busy_s: Time in steps.
        slowness: So many times as long as the engine takes, each step takes here; 1 for as it is.
            The time that is added is slept, so that nobody else on the machine is kept waiting.
    """

    def __init__(self, engine: interface.PieceEngine) -> None:
        self._engine = engine
        self.busy_s = 0.0
        self.slowness = 1.0

    @property
    def has_work(self) -> bool:
        """See `interface.PieceEngine.has_work`."""
        return self._engine.has_work

    def open(self, piece: interface.Piece) -> None:
        """See `interface.PieceEngine.open`."""
        self._engine.open(piece)

    def feed(
        self,
        piece_id: str,
        position: int,
        *,
        token_ids: Sequence[int] | None = None,
        hidden: Float[np.ndarray, "n D"] | None = None,
    ) -> None:
        """See `interface.PieceEngine.feed`."""
        self._engine.feed(piece_id, position, token_ids=token_ids, hidden=hidden)

    def truncate(self, piece_id: str, position: int) -> None:
        """See `interface.PieceEngine.truncate`."""
        self._engine.truncate(piece_id, position)

    def close_piece(self, piece_id: str) -> None:
        """See `interface.PieceEngine.close_piece`."""
        self._engine.close_piece(piece_id)

    def step(self) -> list[interface.PieceOutput]:
        """See `interface.PieceEngine.step`."""
        begun_s = time.perf_counter()
        outputs = self._engine.step()
        took_s = time.perf_counter() - begun_s
        self.busy_s += took_s
        if self.slowness > 1:
            time.sleep((self.slowness - 1) * took_s)
        return outputs
