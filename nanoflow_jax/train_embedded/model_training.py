"""Training steps: the served model's own forward pass under optax, saved with Orbax.

Weights are a plain dict by `ParamSpec` name. The module tree is built from them inside each
traced function, so a checkpoint and an export need no knowledge of flax's state.
"""

import dataclasses
import functools
import pathlib
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Int, Int32

from nanoflow_jax.models import architecture, layers, transformer
from nanoflow_jax.nanobatch import executor, plan
from nanoflow_jax.train_embedded import settings

Weights = dict[str, Array]
State = dict[str, Any]
Cache = tuple[Float[Array, "T K H"], Float[Array, "T K H"]]

_FINAL_RATE_FRACTION = 0.05
_BETA2 = 0.95
_KEPT_CHECKPOINTS = 2


def first_weights(config: architecture.ModelConfig, *, seed: int) -> Weights:
    """Random weights; what writes to the residual stream starts smaller the deeper the model is.

    Source: scaling by 1 / sqrt(2 L) as in GPT-2 (Radford et al. 2019, section 2.3).
    """
    specs = transformer.parameter_specs(config)
    keys = jax.random.split(jax.random.key(seed), len(specs))
    return {spec.name: _draw(spec, key, config) for spec, key in zip(specs, keys, strict=True)}


def _draw(spec: layers.ParamSpec, key: Array, config: architecture.ModelConfig) -> Array:
    to_residual = spec.name.endswith((".o", ".down"))
    std = spec.std / (2 * config.num_layers) ** 0.5 if to_residual else spec.std
    noise = jax.random.normal(key, spec.shape, jnp.float32)
    return jnp.float32(spec.mean) + jnp.float32(std) * noise


@dataclasses.dataclass(frozen=True)
class WholeRows:
    """Causal attention among the tokens of each row of a flat batch; caches one step's alone."""

    row_len: int

    def append(
        self,
        k: Float[Array, "T K H"],
        v: Float[Array, "T K H"],
        cache: None,
        tokens: plan.TokenRange,
    ) -> Cache:
        """See `transformer.AttentionPath`, as the rest."""
        return k, v

    def attend_decode(
        self,
        q: Float[Array, "T N H"],
        cache: Cache,
        spec: transformer.AttentionSpec,
        call: executor.Call,
    ) -> tuple[None]:
        return (None,)

    def attend_prefill(
        self,
        q: Float[Array, "T N H"],
        cache: Cache,
        spec: transformer.AttentionSpec,
        call: executor.Call,
    ) -> Float[Array, "T N H"]:
        assert spec.window is None
        assert spec.softcap is None
        (k, v), row_len = cache, self.row_len
        num_tokens, num_heads, head_dim = q.shape
        rows, kv = num_tokens // row_len, k.shape[1]
        grouped = q.reshape(rows, row_len, kv, num_heads // kv, head_dim) * spec.scale
        k, v = (x.reshape(rows, row_len, kv, head_dim) for x in (k, v))
        scores = jnp.einsum("BQKGH,BSKH->BKGQS", grouped, k)
        seen = jnp.tril(jnp.ones((row_len, row_len), bool))
        seen = jnp.broadcast_to(seen[None, None, None], scores.shape)
        shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("BKGQS,BSKH->BQKGH", shares, v).reshape(q.shape)

    def joined(
        self,
        decoded: tuple[Float[Array, "R N H"] | None, ...],
        prefilled: Float[Array, "T N H"] | None,
        tokens: plan.TokenRange,
    ) -> Float[Array, "T N H"]:
        assert prefilled is not None
        return prefilled


def logits(
    weights: Weights,
    token_ids: Int[Array, "T"],
    *,
    config: architecture.ModelConfig,
    row_len: int,
) -> Float[Array, "T V"]:
    """The model's logits for every token of T / row_len rows laid end to end."""
    model = transformer.Transformer(lambda spec: weights[spec.name], config)
    positions = jnp.tile(jnp.arange(row_len), token_ids.shape[0] // row_len)
    caches = [None] * config.num_layers
    x, _ = model.run_layers(model.embed(token_ids), positions, caches, WholeRows(row_len))
    return model.head(x)


def mean_loss(
    weights: Weights,
    rows: Int[Array, "B C1"],
    *,
    config: architecture.ModelConfig,
    row_len: int,
) -> Float[Array, ""]:
    """Mean cross-entropy in nats per token; rows are cut into windows of `row_len` tokens."""
    found = logits(weights, rows[:, :-1].reshape(-1), config=config, row_len=row_len)
    losses = optax.softmax_cross_entropy_with_integer_labels(found, rows[:, 1:].reshape(-1))
    return losses.mean()


def learning_rate(train: settings.TrainSettings) -> optax.Schedule:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=train.peak_rate,
        warmup_steps=min(train.warmup_steps, train.num_steps - 1),
        decay_steps=train.num_steps,
        end_value=train.peak_rate * _FINAL_RATE_FRACTION,
    )


def optimiser(train: settings.TrainSettings) -> optax.GradientTransformation:
    """AdamW on clipped gradients; norms are not decayed."""

    def is_matrix(weights: Weights) -> dict[str, bool]:
        return {name: w.ndim > 1 for name, w in weights.items()}

    return optax.chain(
        optax.clip_by_global_norm(train.max_gradient_norm),
        optax.adamw(
            learning_rate(train), b2=_BETA2, weight_decay=train.weight_decay, mask=is_matrix
        ),
    )


class Trainer:
    """Weights and optimiser state, moved on one batch at a time.

    Invariant: `num_done` steps, which took `busy_s` seconds, have been applied to `state`.
    `schedules` says from which step on the rate followed a schedule of how many steps.
    """

    def __init__(self, chosen: settings.Settings) -> None:
        self.config = chosen.model_config()
        self.num_done = 0
        self.busy_s = 0.0
        self.schedules = [(0, chosen.train.num_steps)]
        self._settings = chosen
        self._optimiser = optimiser(chosen.train)
        weights = first_weights(self.config, seed=chosen.train.seed)
        self.state: State = {"weights": weights, "optimiser": self._optimiser.init(weights)}
        self._jitted = jax.jit(self._update, static_argnames="row_len", donate_argnames="state")
        self._loss = jax.jit(
            functools.partial(mean_loss, config=self.config, row_len=chosen.shape.context_len)
        )

    @property
    def weights(self) -> Weights:
        return self.state["weights"]

    @property
    def row_len(self) -> int:
        """Tokens in one window of the next step."""
        t = self._settings.train
        short = self.num_done < t.short_fraction * t.num_steps
        return t.short_len if short else self._settings.shape.context_len

    def step(self, rows: Int32[np.ndarray, "B C1"]) -> float:
        """Learns from one batch.

        Returns:
            The batch's mean loss before the update, in nats per token.
        """
        start = time.monotonic()
        self.state, loss = self._jitted(self.state, rows, row_len=self.row_len)
        found = float(loss)
        self.num_done += 1
        self.busy_s += time.monotonic() - start
        return found

    def resume_schedules(self, before: list[tuple[int, int]]) -> None:
        """Takes over an earlier run's schedules, and adds its own if that is another one."""
        num_steps = self._settings.train.num_steps
        same = before[-1][1] == num_steps
        self.schedules = before if same else [*before, (self.num_done, num_steps)]

    def _update(
        self, state: State, rows: Int[Array, "B C1"], *, row_len: int
    ) -> tuple[State, Float[Array, ""]]:
        weights = state["weights"]
        of_weights = functools.partial(mean_loss, config=self.config, row_len=row_len)
        loss, gradients = jax.value_and_grad(of_weights)(weights, rows)
        # optax raises float decays to integer step counts, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, moments = self._optimiser.update(gradients, state["optimiser"], weights)
            weights = optax.apply_updates(weights, updates)
        return {"weights": weights, "optimiser": moments}, loss

    def validate(self, rows: Int32[np.ndarray, "B C1"]) -> float:
        """Mean loss over held-out rows, one at a time, in nats per token."""
        return float(np.mean([float(self._loss(self.weights, row[None])) for row in rows]))


class Checkpoints:
    """A run's saved states: weights, optimiser, place in the data, and the settings used."""

    def __init__(self, folder: pathlib.Path) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT_CHECKPOINTS, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def close(self) -> None:
        self._manager.close()

    def save(
        self, trainer: Trainer, data: grain.DatasetIterator, *, fingerprint: dict[str, Any]
    ) -> None:
        """Saves everything that the next steps depend on."""
        if self._manager.latest_step() == trainer.num_done:
            return
        about = {
            "busy_s": trainer.busy_s,
            "data": data.get_state(),
            "fingerprint": fingerprint,
            "schedules": trainer.schedules,
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(trainer.state), about=ocp.args.JsonSave(about)
        )
        self._manager.save(trainer.num_done, args=items)

    def restore(
        self, trainer: Trainer, data: grain.DatasetIterator, *, fingerprint: dict[str, Any]
    ) -> bool:
        """Goes back to the last saved state.

        Returns:
            False where nothing was saved yet.

        Raises:
            ValueError: The saved run had other settings or other text.
        """
        step = self._manager.latest_step()
        if step is None:
            return False
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))[
            "about"
        ]
        _check_same(about["fingerprint"], fingerprint)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, trainer.state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        trainer.state = self._manager.restore(step, args=items)["state"]
        trainer.num_done, trainer.busy_s = step, about["busy_s"]
        trainer.resume_schedules([tuple(pair) for pair in about["schedules"]])
        data.set_state(about["data"])
        return True


def _check_same(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [name for name in wanted if saved.get(name) != wanted[name]]
    if changed:
        listed = ", ".join(f"{n}: {saved.get(n)!r} then, {wanted[n]!r} now" for n in changed)
        raise ValueError(
            f"the checkpoint in --work_dir was made with other settings ({listed}); "
            "set them back or choose another --work_dir"
        )
