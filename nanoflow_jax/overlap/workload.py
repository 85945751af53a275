"""The dense batch that a step is compiled for, and the caches that its tokens see."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from nanoflow_jax.cost import serving
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.cost.timeline import Contexts
from nanoflow_jax.deviceless.devices import Device
from nanoflow_jax.models import architecture, loading
from nanoflow_jax.scheduler.buckets import Bucket

_DTYPE = np.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are all alike, in batches of one size.

    Attributes:
        mix: The requests.
        num_tokens: Of the dense batch.
        decode_rows: Of them; None for as many as there are in the long run.
    """

    mix: Mix
    num_tokens: int
    decode_rows: int | None = None

    @property
    def bucket(self) -> Bucket:
        """The batch.

        Raises:
            ValueError: There are more decode rows than tokens.
        """
        rows = self.decode_rows
        if rows is None:
            rows = self.mix.decode_rows(self.num_tokens)
        if rows > self.num_tokens:
            raise ValueError(f"--decode_rows={rows} are more than --tokens={self.num_tokens}")
        chunks = self.mix.chunks(self.num_tokens - rows)
        return Bucket(tokens=self.num_tokens, decode_rows=rows, prefill_rows=chunks)

    @property
    def contexts(self) -> Contexts:
        """Cached tokens that its tokens see."""
        return Contexts(decode_len=self.mix.decode_context, prefix_len=self.mix.prefix)

    def describe(self, model: architecture.ModelConfig, device: Device, *, num_devices: int) -> str:
        """What it is, and whether its cache fits beside the weights, in a line for people."""
        bucket = self.bucket
        token_bytes = serving.sizes(model).kv_bytes_per_token
        chunk_tokens = bucket.tokens - bucket.decode_rows
        cache = token_bytes * (bucket.decode_rows * self.mix.decode_context + chunk_tokens)
        weights, room = loading.model_bytes(model, _DTYPE), num_devices * device.memory_bytes
        fits = "fit into" if cache + weights <= room else "do NOT fit into"
        return (
            f"requests of {self.mix}: {bucket.decode_rows} decode rows that see "
            f"{self.mix.decode_context:.0f} tokens each, {chunk_tokens} tokens of prompts; a cache "
            f"of {cache / 1e9:.0f} GB and weights of {weights / 1e9:.0f} GB {fits} "
            f"{room / 1e9:.0f} GB"
        )
