"""What the operations of a layer are made of, and the plain ones, which XLA makes.

Layers name what they need and are handed an `Operations`; which implementation that holds is
decided in `engine.kernel_choice`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch import executor
from nanoflow_jax.parallel import collectives

_Tree = TypeVar("_Tree")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where one operation runs beside others.

    Attributes:
        num_ctas: Most SMs that a kernel of ours may use; None for as many as it was made for.
            What XLA makes cannot be held to it and takes what it gets.
        token: Read by nobody; the operation comes after the one that makes it.
        run_kernel: Who runs a kernel of ours and answers for it; None for the kernel itself.
    """

    num_ctas: int | None = None
    token: Array | None = None
    run_kernel: Callable[[Any], Any] | None = None

    @classmethod
    def of(cls, call: executor.Call) -> "Place":
        """Where a nano-operation runs."""
        return cls(num_ctas=call.num_ctas, token=call.token, run_kernel=call.run_kernel)


ANYWHERE = Place()


class Products(Protocol):
    """Products of a layer, with what is done to their results."""

    def product(
        self,
        x: Float[Array, "T D"],
        w: Float[Array, "F D"],
        *,
        bias: Float[Array, "F"] | None,
        residual: Float[Array, "T F"] | None,
        place: Place,
    ) -> Float[Array, "T F"]:
        """X times the transpose of w, plus bias, plus residual; float32 keeps full precision."""

    def gated_product(
        self,
        x: Float[Array, "T D"],
        gate_up: Float[Array, "2 F D"],
        *,
        bias: Float[Array, "2 F"] | None,
        activation: architecture.Activation,
        place: Place,
    ) -> Float[Array, "T F"]:
        """The activated product with the gate's weight, times that with the other."""


class Experts(Protocol):
    """Products of rows with the weights of their experts, and the way there and back."""

    def group(self, experts: Int[Array, "T A"], *, num_experts: int) -> Any:
        """Where the rows of each expert go: what the methods below call groups."""

    def spread(self, x: Float[Array, "T D"], groups: Any) -> Float[Array, "R D"]:
        """A row for each token's experts, in the order of experts."""

    def product(
        self, rows: Float[Array, "R D"], w: Float[Array, "E F D"], groups: Any, *, place: Place
    ) -> Float[Array, "R F"]:
        """Each row times the transpose of its expert's weight."""

    def gated_product(
        self,
        rows: Float[Array, "R D"],
        gate_up: Float[Array, "E F2 D"],
        groups: Any,
        *,
        activation: architecture.Activation,
        place: Place,
    ) -> Float[Array, "R F"]:
        """As `Products.gated_product`; an expert's gate lies above its other weight."""

    def combine(
        self, rows: Float[Array, "R D"], groups: Any, shares: Float[Array, "T A"]
    ) -> Float[Array, "T D"]:
        """Sum of each token's rows by share, in float32 and rounded once.

        A share of 0 leaves a row out, whatever it holds.
        """


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Operations:
    """What a layer is made of, and where it runs.

    Attributes:
        products: Of dense weights.
        experts: Of those of a mixture of experts.
        place: Of every product that is asked for.
        group: Devices that share the model, of which this is one.
        together: Runs kernels of nano-operations in one where a plan lets them; None runs each by
            itself.
        start_aside: For operations of the memory lane; see `nanobatch.executor.run`.
    """

    products: Products
    experts: Experts
    place: Place = ANYWHERE
    group: collectives.Group = collectives.ALONE
    together: executor.Together | None = None
    start_aside: executor.StartAside | None = None

    def at(self, place: Place) -> "Operations":
        """The same operations somewhere else."""
        return dataclasses.replace(self, place=place)

    def product(
        self,
        x: Float[Array, "T D"],
        w: Float[Array, "F D"],
        *,
        bias: Float[Array, "F"] | None = None,
        residual: Float[Array, "T F"] | None = None,
    ) -> Float[Array, "T F"]:
        """See `Products.product`."""
        return self.products.product(x, w, bias=bias, residual=residual, place=self.place)

    def summed_product(
        self,
        x: Float[Array, "T f"],
        w: Float[Array, "D f"],
        *,
        bias: Float[Array, "D"] | None = None,
        residual: Float[Array, "T D"] | None = None,
    ) -> Float[Array, "T D"]:
        """A product along an axis that the devices share; bias and residual are added once."""
        if self.group.num_devices == 1:
            return self.product(x, w, bias=bias, residual=residual)
        out = self.group.sum(self.product(x, w))
        if bias is not None:
            out = out + bias[None]
        return out if residual is None else residual + out

    def gated_product(
        self,
        x: Float[Array, "T D"],
        gate_up: Float[Array, "2 F D"],
        *,
        bias: Float[Array, "2 F"] | None,
        activation: architecture.Activation,
    ) -> Float[Array, "T F"]:
        """See `Products.gated_product`."""
        return self.products.gated_product(
            x, gate_up, bias=bias, activation=activation, place=self.place
        )

    def expert_product(
        self, rows: Float[Array, "R D"], w: Float[Array, "E F D"], groups: Any
    ) -> Float[Array, "R F"]:
        """See `Experts.product`."""
        return self.experts.product(rows, w, groups, place=self.place)

    def gated_expert_product(
        self,
        rows: Float[Array, "R D"],
        gate_up: Float[Array, "E F2 D"],
        groups: Any,
        *,
        activation: architecture.Activation,
    ) -> Float[Array, "R F"]:
        """See `Experts.gated_product`."""
        return self.experts.gated_product(
            rows, gate_up, groups, activation=activation, place=self.place
        )


def product(x: Float[Array, "T D"], w: Float[Array, "F D"]) -> Float[Array, "T F"]:
    """X times the transpose of w, accumulated in float32; float32 inputs keep full precision.

    Both are matrices: given more axes, XLA:CPU transposes the weight again in every step.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    out = jnp.einsum("TD,FD->TF", x, w, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(x.dtype)


def activate(x: Float[Array, "*T F"], kind: architecture.Activation) -> Float[Array, "*T F"]:
    """The gate's non-linearity."""
    if kind == architecture.Activation.SILU:
        return x * jax.lax.logistic(x)
    return nnx.gelu(x, approximate=True)


def activated_product(
    both: Float[Array, "T F2"],
    bias: Float[Array, "2 F"] | None,
    activation: architecture.Activation,
) -> Float[Array, "T F"]:
    """From the product with both weights of a gated layer, one beside the other, to its result."""
    pair = both.reshape(both.shape[0], 2, -1)
    if bias is not None:
        pair = pair + bias[None]
    return activate(pair[:, 0], activation) * pair[:, 1]


def after(x: _Tree, token: Array | None) -> _Tree:
    """X, once there is the token: XLA keeps the order of what it makes of both."""
    return x if token is None else jax.lax.optimization_barrier((x, token))[0]


@dataclasses.dataclass(frozen=True)
class PlainProducts:
    """`Products` by XLA."""

    def product(
        self,
        x: Float[Array, "T D"],
        w: Float[Array, "F D"],
        *,
        bias: Float[Array, "F"] | None,
        residual: Float[Array, "T F"] | None,
        place: Place,
    ) -> Float[Array, "T F"]:
        out = product(after(x, place.token), w)
        if bias is not None:
            out = out + bias[None]
        return out if residual is None else residual + out

    def gated_product(
        self,
        x: Float[Array, "T D"],
        gate_up: Float[Array, "2 F D"],
        *,
        bias: Float[Array, "2 F"] | None,
        activation: architecture.Activation,
        place: Place,
    ) -> Float[Array, "T F"]:
        both = product(after(x, place.token), gate_up.reshape(-1, x.shape[1]))
        return activated_product(both, bias, activation)


class SortedRows(NamedTuple):
    """Groups of `PlainExperts`: row r is choice order[r] of all tokens' choices."""

    order: Int[Array, "R"]
    sizes: Int[Array, "E"]
    num_active: int


@dataclasses.dataclass(frozen=True)
class PlainExperts:
    """`Experts` by XLA: rows sorted by expert, each product one ragged product."""

    def group(self, experts: Int[Array, "T A"], *, num_experts: int) -> SortedRows:
        flat = experts.reshape(-1)  # [T A]
        order = jnp.argsort(flat)
        sizes = jnp.bincount(flat, length=num_experts).astype(jnp.int32)
        return SortedRows(order=order, sizes=sizes, num_active=experts.shape[1])

    def spread(self, x: Float[Array, "T D"], groups: SortedRows) -> Float[Array, "R D"]:
        return x[groups.order // groups.num_active]

    def product(
        self,
        rows: Float[Array, "R D"],
        w: Float[Array, "E F D"],
        groups: SortedRows,
        *,
        place: Place,
    ) -> Float[Array, "R F"]:
        dims = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((1,), (2,)), ((), ())),
            lhs_ragged_dimensions=[0],
            rhs_group_dimensions=[0],
        )
        precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
        return jax.lax.ragged_dot_general(
            after(rows, place.token),
            w,
            groups.sizes,
            dims,
            precision=precision,
            preferred_element_type=jnp.float32,
        ).astype(rows.dtype)

    def gated_product(
        self,
        rows: Float[Array, "R D"],
        gate_up: Float[Array, "E F2 D"],
        groups: SortedRows,
        *,
        activation: architecture.Activation,
        place: Place,
    ) -> Float[Array, "R F"]:
        gate, up = jnp.split(self.product(rows, gate_up, groups, place=place), 2, axis=-1)
        return activate(gate, activation) * up

    def combine(
        self, rows: Float[Array, "R D"], groups: SortedRows, shares: Float[Array, "T A"]
    ) -> Float[Array, "T D"]:
        out = jnp.zeros_like(rows).at[groups.order].set(rows)
        out = out.reshape(*shares.shape, -1)
        share = shares[:, :, None]
        weighted = jnp.where(share == 0, 0.0, out.astype(jnp.float32) * share)
        return weighted.sum(axis=1).astype(rows.dtype)


PLAIN = Operations(products=PlainProducts(), experts=PlainExperts())
