"""A model without pages, batches or steps: whole sequences through the same layers."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from checkpoints.folder import ModelFolder
from nanoflow_jax.kv_cache import attention
from nanoflow_jax.models import architecture, huggingface, loading, transformer


def load_whole(
    folder: ModelFolder, config: architecture.ModelConfig, **how: Any
) -> transformer.Transformer:
    """All layers of a folder's model as one; `how` is of `loading.load_spans`."""
    whole = [architecture.Span(0, config.num_layers)]
    [model] = loading.load_spans(folder, config, whole, **how)
    return model


class WholeAttention:
    """Attention of one request in one chunk; the cache is its keys and values, or None."""

    def append(self, k, v, cache, tokens):
        if cache is None:
            return k, v
        return tuple(jnp.concatenate([old, new]) for old, new in zip(cache, (k, v), strict=True))

    def attend_decode(self, q, cache, spec, call):
        return (None,)

    def attend_prefill(self, q, cache, spec, call):
        k, v = cache
        positions = jnp.arange(k.shape[0] - q.shape[0], k.shape[0], dtype=jnp.int32)
        return attention.attention_reference(
            q, k, v, positions, scale=spec.scale, window=spec.window, softcap=spec.softcap
        )

    def joined(self, decoded, prefilled, tokens):
        return prefilled


class PlainModel:
    """Logits of sequences of at most `length` tokens, in float32."""

    def __init__(self, path: pathlib.Path, *, length: int) -> None:
        folder = ModelFolder.open(path)
        config = huggingface.read_config(folder.config)
        self.model = load_whole(
            folder,
            config,
            dtype=np.dtype(np.float32),
            placement=loading.place_model(config, jax.devices()[:1]),
        )
        self._length = length
        self._run = jax.jit(self._forward)

    def _forward(self, tokens: jax.Array) -> jax.Array:
        x = self.model.embed(tokens)
        positions = jnp.arange(self._length, dtype=jnp.int32)
        caches = [None] * self.model.config.num_layers
        x, _ = self.model.run_layers(x, positions, caches, WholeAttention())
        return self.model.head(x)

    def logits(self, tokens: list[int]) -> Float[np.ndarray, "T V"]:
        """One row for each token; what is padded behind them is not seen."""
        padded = np.zeros(self._length, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._run(padded))[: len(tokens)]
