"""The forward program of one step of a model, compiled for a GPU that need not be there."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nanoflow_jax import config as config_lib
from nanoflow_jax.deviceless import compiler
from nanoflow_jax.deviceless.devices import Device, find_device
from nanoflow_jax.deviceless.program import Program
from nanoflow_jax.engine import executors, implementations, kernel_choice, programs
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.models import architecture, layers, loading, transformer
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.parallel import placement as placement_lib
from nanoflow_jax.scheduler.buckets import Bucket

_DTYPE = np.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What is compiled; ValueError if the devices cannot share the model evenly.

    Attributes:
        model: The model; its number of layers is that of the program.
        bucket: Of the step.
        plan: How its layers run, of the bucket's tokens.
        executor: Who runs the plan.
        kernels: What operations are made of.
        device: A name in `deviceless.devices`.
        num_devices: That share the model.
        split_experts: Whole experts on each of them.
        page_size: Tokens in a page of the cache.
        num_pages: Pages.
        max_pages: Pages of one request.
    """

    model: architecture.ModelConfig
    bucket: Bucket
    plan: Plan
    executor: config_lib.Executor
    kernels: config_lib.KernelsSection
    device: str = "H200"
    num_devices: int = 1
    split_experts: bool = False
    page_size: int = 64
    num_pages: int = 4096
    max_pages: int = 32

    def __post_init__(self) -> None:
        loading.place_model(self.model, self.num_devices, split_experts=self.split_experts)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache of all layers on one device."""
        return self.model.num_layers * self.layer_cache_bytes

    @property
    def layer_cache_bytes(self) -> int:
        """Bytes of the cache of one layer on one device."""
        return _layout(self).shape.cache_bytes

    @property
    def placement(self) -> placement_lib.Placement:
        """How the model lies on the devices, which are absent."""
        return loading.place_model(self.model, self.num_devices, split_experts=self.split_experts)

    @property
    def share(self) -> architecture.ModelConfig:
        """What one device has of the model."""
        return loading.share_of_one_device(self.model, self.placement)


def compile_step(step: Step, *, cache: pathlib.Path | None = None) -> Program:
    """Compiles the step's forward program.

    Args:
        step: What to compile.
        cache: Folder that keeps what was compiled; None keeps nothing.

    Raises:
        ValueError: A kernel is asked for that cannot serve the model, or there is no such device.
        deviceless.compiler.CompilerMissingError: Wheels are missing.
        deviceless.compiler.CompilerFailedError: It did not compile.
    """
    device = find_device(step.device)
    placement, share = step.placement, step.share
    served = kernel_choice.Served(config=share, dtype=_DTYPE, page_size=step.page_size)
    choices = kernel_choice.choose(
        step.kernels,
        _machine(device),
        served,
        caps_products=executors.caps_products([step.plan]),
    )
    operations = executors.operations(step.executor, choices, served.config)
    kv_layout = _layout(step)
    sizes = programs.Sizes(
        max_requests=max(step.bucket.decode_rows + step.bucket.prefill_rows, 1),
        max_pages=step.max_pages,
        num_pages=step.num_pages,
        dense_batch=step.bucket.tokens,
        vocab_size=step.model.vocab_size,
        penalty_requests=1,
        num_devices=step.num_devices,
        plans={step.bucket: step.plan},
        attention=implementations.attention(
            choices,
            layout=kv_layout,
            group=share.group_size,
            windows=share.distinct_windows,
            tile_len=128,
        ),
    )
    graph, state = nnx.split(transformer.Transformer(_AbstractWeights(placement), step.model))
    weights, treedef = jax.tree.flatten(state)
    cache_spec = jax.tree.map(placement.spec, kv_layout.axes)
    everywhere = placement.sharding("")
    forward = programs.build_forward(
        graph,
        treedef,
        layout=kv_layout,
        sizes=sizes,
        bucket=step.bucket,
        operations=operations,
        shares=programs.Shares(
            placement=placement,
            caches=[cache_spec] * step.model.num_layers,
            weights=[weight.sharding.spec for weight in weights],
        ),
        keep_lanes=executors.keeps_lanes(step.executor),
    )
    size = programs.forward_packing(sizes, step.bucket).size
    arguments = (
        [jax.tree.map(placement.whole, jax.eval_shape(kv_layout.allocate), kv_layout.axes)]
        * step.model.num_layers,
        jax.ShapeDtypeStruct((sizes.max_requests,), jnp.int32, sharding=everywhere),
        weights,
        jax.ShapeDtypeStruct((size,), jnp.int32, sharding=everywhere),
    )
    if step.num_devices == 1:  # no kernel can be lowered with a mesh around, but inside shard_map
        arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    return compiler.compile_program(
        jax.jit(forward, donate_argnums=0, keep_unused=True),
        *arguments,
        device=step.device,
        num_devices=step.num_devices,
        options=executors.compiler_options(step.executor),
        cache=cache,
    )


def first_layers(model: architecture.ModelConfig, count: int) -> architecture.ModelConfig:
    """A model of which only the first layers are left."""
    moe = model.moe
    if moe is not None:
        moe = dataclasses.replace(moe, sparse_layers=moe.sparse_layers[:count])
    return dataclasses.replace(model, num_layers=count, windows=model.windows[:count], moe=moe)


class _AbstractWeights:
    """A `layers.Maker` of shapes as the devices hold them."""

    def __init__(self, placement: placement_lib.Placement) -> None:
        self._placement = placement

    def __call__(self, spec: layers.ParamSpec) -> jax.ShapeDtypeStruct:
        whole = jax.ShapeDtypeStruct(spec.shape, _DTYPE)
        held = jax.eval_shape(lambda weight: self._placement.lay_out(weight, spec.axes), whole)
        sharding = self._placement.sharding(spec.axes)
        return jax.ShapeDtypeStruct(held.shape, _DTYPE, sharding=sharding)


def _layout(step: Step) -> layout_lib.PageMajorLayout:
    """The share of the cache of one layer that one device has."""
    share = step.share
    return layout_lib.PageMajorLayout(
        shape=layout_lib.CacheShape(
            num_pages=step.num_pages,
            page_size=step.page_size,
            num_kv_heads=share.num_kv_heads,
            head_dim=share.head_dim,
            dtype=_DTYPE,
        )
    )


def _machine(device: Device) -> kernel_choice.Machine:
    return kernel_choice.Machine(
        name=device.kind,
        compute_capability=device.compute_capability,
        num_sms=device.num_sms,
        jax_version=jax.__version__,
        can_interpret=False,
        num_threads=1,
    )
