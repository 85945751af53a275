"""Makes a model's weights: from a folder, or seeded random ones, straight into their shardings."""

import dataclasses
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import folder as checkpoint_folder
from checkpoints import loader
from nanoflow_jax.models import architecture, huggingface, layers, transformer, weight_map
from nanoflow_jax.parallel import placement as placement_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far loading is."""

    done_bytes: int
    total_bytes: int
    seconds: float


ProgressCall = Callable[[Progress], None]


def place_model(
    config: architecture.ModelConfig,
    devices: Sequence[jax.Device] | int,
    *,
    split_experts: bool = False,
) -> placement_lib.Placement:
    """How a model lies on devices; see `placement.place`, whose errors it raises."""
    dense = not all(config.is_sparse(layer) for layer in range(config.num_layers))
    moe = config.moe
    widths = placement_lib.ModelWidths(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        intermediate_size=config.intermediate_size if dense else 0,
        expert_size=moe.intermediate_size if moe else 0,
        num_experts=moe.num_experts if moe else 0,
    )
    return placement_lib.place(widths, devices, split_experts=split_experts)


def share_of_one_device(
    config: architecture.ModelConfig, placement: placement_lib.Placement
) -> architecture.ModelConfig:
    """A model as a layer on one of its devices sees it; whole experts are all still counted."""
    count, moe = placement.num_devices, config.moe
    if moe is not None and not placement.split_experts:
        moe = dataclasses.replace(moe, intermediate_size=moe.intermediate_size // count)
    return dataclasses.replace(
        config,
        num_heads=config.num_heads // count,
        num_kv_heads=config.num_kv_heads * placement.kv_copies // count,
        intermediate_size=config.intermediate_size // count,
        moe=moe,
    )


def load_spans(
    source: checkpoint_folder.ModelFolder,
    config: architecture.ModelConfig,
    spans: Sequence[architecture.Span],
    *,
    dtype: np.dtype[Any],
    placement: placement_lib.Placement,
    progress: ProgressCall | None = None,
) -> list[transformer.Transformer]:
    """Layers of a model with the weights of a folder, read one at a time; no others are read.

    Args:
        source: The opened folder.
        config: What its config.json describes.
        spans: Which layers; one model is made of each, and they share an embedding.
        dtype: What the model runs in; stored weights are cast while they are read.
        placement: Where it lies.
        progress: Called after each weight.

    Raises:
        ValueError: The folder does not hold exactly this model's weights; those of other layers
            may be missing.
    """
    weights = huggingface.weights_of(config)
    specs = _specs(config, spans)
    shapes = {name: tuple(info.shape) for name, info in source.tensors.items()}
    weight_map.check_complete(
        shapes,
        {name: weights[name] for name in specs},
        known=weights,
        tied_embeddings=config.tied_embeddings,
    )
    meter = _Meter(specs, dtype, progress)

    def make(spec: layers.ParamSpec) -> jax.Array:
        entry = weights[spec.name]
        tensors = [source.read(name) for name in entry.shapes]
        whole = entry.assemble(tensors)
        assert whole.shape == spec.shape, f"{spec.name}: {whole.shape} is not {spec.shape}"
        whole = placement.lay_out(whole, spec.axes)
        sharding = placement.sharding(spec.axes, spec.product)
        array = loader.place(whole.shape, dtype, sharding, lambda index: whole[index])
        meter.add(spec)
        return array

    return _make_spans(make, config, spans)


def random_spans(
    config: architecture.ModelConfig,
    spans: Sequence[architecture.Span],
    *,
    seed: int,
    dtype: np.dtype[Any],
    placement: placement_lib.Placement,
    progress: ProgressCall | None = None,
) -> list[transformer.Transformer]:
    """Layers of a model with seeded random weights, made on the devices that hold them.

    Each weight's key is folded from its name, so it does not depend on the other weights, nor on
    which layers are made. See `load_spans`.
    """
    meter = _Meter(_specs(config, spans), dtype, progress)
    programs: dict[Any, Any] = {}

    def make(spec: layers.ParamSpec) -> jax.Array:
        shape_key = (spec.shape, spec.axes, spec.product, spec.std, spec.mean)
        if shape_key not in programs:
            programs[shape_key] = _random_program(spec, dtype, placement)
        name_key = np.uint32(zlib.crc32(f"{seed}/{spec.name}".encode()))
        array = programs[shape_key](name_key)
        meter.add(spec)
        return array

    return _make_spans(make, config, spans)


def _specs(
    config: architecture.ModelConfig, spans: Sequence[architecture.Span]
) -> dict[str, layers.ParamSpec]:
    """Every weight of some spans, once."""
    return {spec.name: spec for span in spans for spec in transformer.parameter_specs(config, span)}


def _make_spans(
    make: layers.Maker, config: architecture.ModelConfig, spans: Sequence[architecture.Span]
) -> list[transformer.Transformer]:
    made: dict[str, Any] = {}

    def make_once(spec: layers.ParamSpec) -> Any:
        if spec.name not in made:
            made[spec.name] = make(spec)
        return made[spec.name]

    return [transformer.Transformer(make_once, config, span) for span in spans]


def _random_program(
    spec: layers.ParamSpec, dtype: np.dtype[Any], placement: placement_lib.Placement
) -> Any:
    def draw(seed: jax.Array) -> jax.Array:
        noise = jax.random.normal(jax.random.key(seed), spec.shape, jnp.float32)
        whole = (spec.mean + spec.std * noise).astype(dtype)
        return placement.lay_out(whole, spec.axes)

    return jax.jit(draw, out_shardings=placement.sharding(spec.axes, spec.product))


class _Meter:
    """Counts the bytes made and reports them."""

    def __init__(
        self,
        specs: Mapping[str, layers.ParamSpec],
        dtype: np.dtype[Any],
        progress: ProgressCall | None,
    ) -> None:
        self._itemsize = np.dtype(dtype).itemsize
        self._total = sum(map(self._size, specs.values()))
        self._done = 0
        self._start = time.monotonic()
        self._progress = progress

    def _size(self, spec: layers.ParamSpec) -> int:
        return math.prod(spec.shape) * self._itemsize

    def add(self, spec: layers.ParamSpec) -> None:
        self._done += self._size(spec)
        if self._progress is not None:
            self._progress(
                Progress(
                    done_bytes=self._done,
                    total_bytes=self._total,
                    seconds=time.monotonic() - self._start,
                )
            )


def model_bytes(
    config: architecture.ModelConfig,
    dtype: np.dtype[Any],
    spans: Sequence[architecture.Span] | None = None,
) -> int:
    """Bytes of all weights in this dtype, or of those of some layers."""
    specs = _specs(config, spans or [architecture.Span(0, config.num_layers)])
    return sum(math.prod(spec.shape) for spec in specs.values()) * np.dtype(dtype).itemsize


def eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None) -> set[int]:
    """End-of-text ids from both files; either may have one id, a list, or none.

    Raises:
        ValueError: An entry is no token id.
    """
    found: set[int] = set()
    for name, values in (("config.json", config), ("generation_config.json", generation_config)):
        ids = (values or {}).get("eos_token_id")
        if ids is None:
            continue
        for token in ids if isinstance(ids, list) else [ids]:
            if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                raise ValueError(
                    f"{name}: eos_token_id={ids!r} is not a token id or a list of them"
                )
            found.add(token)
    return found
