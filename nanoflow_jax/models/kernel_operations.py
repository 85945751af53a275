"""Products by the kernels of `pallas_kernels`, and what they can do."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nanoflow_jax.models import architecture
from nanoflow_jax.models.operations import Place, activate, activated_product
from pallas_kernels import gemm as gemm_lib
from pallas_kernels import gemm_role, mosaic
from pallas_kernels import grouped_gemm as grouped_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelProducts:
    """`Products` by our kernel; it adds bias and residual, and gates by SiLU, before it rounds.

    Attributes:
        num_ctas: Most SMs to use.
        interpret: None on a GPU, or InterpretGPUParams.
    """

    num_ctas: int
    interpret: Any

    def product(
        self,
        x: Float[Array, "T D"],
        w: Float[Array, "F D"],
        *,
        bias: Float[Array, "F"] | None,
        residual: Float[Array, "T F"] | None,
        place: Place,
    ) -> Float[Array, "T F"]:
        return self._run(gemm_lib.prepare_gemm(x, w, bias=bias, residual=residual), place)

    def gated_product(
        self,
        x: Float[Array, "T D"],
        gate_up: Float[Array, "2 F D"],
        *,
        bias: Float[Array, "2 F"] | None,
        activation: architecture.Activation,
        place: Place,
    ) -> Float[Array, "T F"]:
        w = gate_up.reshape(-1, x.shape[1])
        if is_fused(activation, has_bias=bias is not None):
            return self._run(gemm_lib.prepare_gemm(x, w, gated=True), place)
        return activated_product(self._run(gemm_lib.prepare_gemm(x, w), place), bias, activation)

    def _run(self, kernel: mosaic.Kernel, place: Place) -> Float[Array, "T F"]:
        return _run(kernel, place, num_ctas=self.num_ctas, interpret=self.interpret)


def _run(kernel: mosaic.Kernel, place: Place, *, num_ctas: int, interpret: Any) -> Any:
    if place.run_kernel is not None:
        return place.run_kernel(kernel)
    return mosaic.run(
        kernel, num_ctas=place.num_ctas or num_ctas, token=place.token, interpret=interpret
    )


def is_fused(activation: architecture.Activation, *, has_bias: bool) -> bool:
    """Whether the kernel gates its product: it knows SiLU alone, and no bias of the second."""
    return activation == architecture.Activation.SILU and not has_bias


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelExperts:
    """`Experts` by our kernel, the rows of each expert filled up to whole tiles.

    Attributes:
        num_ctas: Most SMs to use.
        interpret: None on a GPU, or InterpretGPUParams.
    """

    num_ctas: int
    interpret: Any

    def group(self, experts: Int[Array, "T A"], *, num_experts: int) -> grouped_lib.Groups:
        return grouped_lib.plan_groups(experts, num_experts=num_experts)

    def spread(self, x: Float[Array, "T D"], groups: grouped_lib.Groups) -> Float[Array, "R D"]:
        return grouped_lib.permute(x, groups)

    def product(
        self,
        rows: Float[Array, "R D"],
        w: Float[Array, "E F D"],
        groups: grouped_lib.Groups,
        *,
        place: Place,
    ) -> Float[Array, "R F"]:
        return self._product(rows, w, groups, place, gated=False)

    def gated_product(
        self,
        rows: Float[Array, "R D"],
        gate_up: Float[Array, "E F2 D"],
        groups: grouped_lib.Groups,
        *,
        activation: architecture.Activation,
        place: Place,
    ) -> Float[Array, "R F"]:
        gated = is_fused(activation, has_bias=False)
        out = self._product(rows, gate_up, groups, place, gated=gated)
        if gated:
            return out
        gate, up = jnp.split(out, 2, axis=-1)
        return activate(gate, activation) * up

    def combine(
        self, rows: Float[Array, "R D"], groups: grouped_lib.Groups, shares: Float[Array, "T A"]
    ) -> Float[Array, "T D"]:
        return grouped_lib.combine(rows, groups, shares)

    def _product(
        self, rows: Any, w: Any, groups: grouped_lib.Groups, place: Place, *, gated: bool
    ) -> Float[Array, "R F"]:
        kernel = grouped_lib.prepare_grouped_gemm(rows, w, groups, gated=gated)
        return _run(kernel, place, num_ctas=self.num_ctas, interpret=self.interpret)


def check_products(
    config: architecture.ModelConfig,
    dtype: np.dtype[Any],
    *,
    num_devices: int = 1,
    by_columns: Collection[str] = (),
) -> None:
    """Raises ValueError where the kernel cannot make a model's dense products, and says why.

    Args:
        config: The share of the model that one device has.
        dtype: What it runs in.
        num_devices: Devices that share it.
        by_columns: Products, of `o` and `down`, that multiply what all of them have with some of
            the columns.
    """
    c = config

    def check_second(product: str, depth: int) -> None:
        share = num_devices if product in by_columns else 1
        _check_product(dtype, depth * share, c.hidden_size // share)

    heads = c.num_heads * c.head_dim
    _check_precision(dtype)
    _check_product(dtype, c.hidden_size, heads + 2 * c.num_kv_heads * c.head_dim)
    check_second("o", heads)
    if not all(c.is_sparse(layer) for layer in range(c.num_layers)):
        gated = is_fused(c.activation, has_bias=c.mlp_bias)
        _check_product(dtype, c.hidden_size, 2 * c.intermediate_size, gated=gated)
        check_second("down", c.intermediate_size)


def check_experts(config: architecture.ModelConfig, dtype: np.dtype[Any]) -> None:
    """Raises ValueError where the kernel cannot make the products of experts, and says why."""
    if config.moe is None:
        raise ValueError("the model has no experts")
    _check_precision(dtype)
    width, hidden = config.hidden_size, config.moe.intermediate_size
    gated = is_fused(config.activation, has_bias=False)
    num_experts = config.moe.num_experts
    _check_grouped(dtype, (num_experts, 2 * hidden, width), gated=gated)
    _check_grouped(dtype, (num_experts, width, hidden), gated=False)


def _check_precision(dtype: np.dtype[Any]) -> None:
    if dtype == jnp.float32:
        raise ValueError(
            "the kernel multiplies float32 as TF32, in which the plain path keeps full precision; "
            "use --dtype=bfloat16"
        )


def _check_product(dtype: Any, depth: int, num_columns: int, *, gated: bool = False) -> None:
    w = jax.ShapeDtypeStruct((num_columns, depth), dtype)
    x = jax.ShapeDtypeStruct((1, depth), dtype)

    def prepare(x: Array, w: Array) -> Array:
        return gemm_lib.prepare_gemm(x, w, gated=gated).operands[1]

    _check_uncopied(w.shape, jax.eval_shape(prepare, x, w).shape)


def _check_grouped(dtype: Any, shape: tuple[int, int, int], *, gated: bool) -> None:
    num_experts, weight_rows, depth = shape
    w = jax.ShapeDtypeStruct(shape, dtype)
    x = jax.ShapeDtypeStruct((1, depth), dtype)

    def prepare(x: Array, w: Array) -> Array:
        groups = grouped_lib.plan_groups(jnp.zeros((1, 1), jnp.int32), num_experts=num_experts)
        rows = grouped_lib.permute(x, groups)
        return grouped_lib.prepare_grouped_gemm(rows, w, groups, gated=gated).operands[1]

    wanted = (num_experts * weight_rows, depth)
    _check_uncopied(wanted, jax.eval_shape(prepare, x, w).shape)


def _check_uncopied(wanted: tuple[int, ...], given: tuple[int, ...]) -> None:
    if wanted != given:
        raise ValueError(
            f"a weight {list(wanted)} would be copied into {list(given)} in every step; the kernel "
            f"wants rows in multiples of {gemm_role.default_tile(jnp.bfloat16, 1).depth} elements"
        )
