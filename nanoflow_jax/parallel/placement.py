"""How the weights and the cache of one model lie on a tensor-parallel group of devices.

Each axis of an array has a letter of ARCHITECTURE.md. Kv heads K (with their queries), the
feed-forward width F, the experts E and the vocabulary V are split over the devices, one of them in
an array; the rest is on every device. Where there are more devices than kv heads, a kv head is
kept by several devices, each of which has some of its queries:

    one device     K0: q0 q1 q2 q3 k v              K1: q0 q1 q2 q3 k v
    four devices   K0: q0 q1 k v    K1: q2 q3 k v   K2: q0 q1 k v    K3: q2 q3 k v

To the model that is an ordinary one with more kv heads and smaller groups.

O and down multiply what is split, and so are split along the axis that is summed, unless a plan
gathers what they read: then their weight is split by its columns, those of the width D.

Source: Megatron-LM (Shoeybi et al., arXiv 1909.08053, section 3) for what is split by row and by
column; its section 3 also splits the vocabulary.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelWidths:
    """The sizes of a model that are split, and what its messages call them.

    Attributes:
        num_heads: N.
        num_kv_heads: K.
        intermediate_size: F of dense layers; 0 if there are none.
        expert_size: F of one expert; 0 without experts.
        num_experts: E; 0 without experts.
    """

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    expert_size: int = 0
    num_experts: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """One group of devices that holds a model.

    Attributes:
        mesh: The devices, or a mesh of absent ones for programs that are only compiled.
        kv_copies: Devices that keep the same kv head.
        split_experts: Whole experts on each device, rather than a part of each.
        adds_in_order: See `collectives.Group`.
        by_columns: Products, of `o` and `down`, whose weight is split by columns.
    """

    mesh: mesh_lib.AnyMesh
    kv_copies: int = 1
    split_experts: bool = False
    adds_in_order: bool = False
    by_columns: frozenset[str] = frozenset()

    @property
    def num_devices(self) -> int:
        return int(self.mesh.size)

    @property
    def group(self) -> collectives.Group:
        """These devices, from within one of them."""
        return collectives.Group(num_devices=self.num_devices, adds_in_order=self.adds_in_order)

    def with_columns(self, products: Collection[str], *, hidden_size: int) -> "Placement":
        """The same group, with the weights of some products split by columns.

        Args:
            products: Of `o` and `down`.
            hidden_size: D, their number of columns.

        Raises:
            ValueError: They cannot be split evenly.
        """
        if products and hidden_size % self.num_devices:
            raise ValueError(
                f"--tensor_parallel={self.num_devices}: hidden_size={hidden_size} cannot be shared "
                f"out evenly, as a plan wants for {' and '.join(sorted(products))}; take its way "
                "'reduce'"
            )
        return dataclasses.replace(self, by_columns=frozenset(products))

    def spec(self, axes: str, product: str | None = None) -> jax.sharding.PartitionSpec:
        """Which axis of an array is split.

        Args:
            axes: Its letters, none of them twice.
            product: `o` or `down`, if it is the weight of one of these.
        """
        # A router [E, D] is on every device: each token's choice is among all experts.
        whole_experts = self.split_experts and {"E", "F"} <= set(axes)
        letters = "KV" + ("E" if whole_experts else "F")
        if product in self.by_columns:
            letters = "D"
        parts = [mesh_lib.AXIS if letter in letters else None for letter in axes]
        assert parts.count(mesh_lib.AXIS) <= 1, f"axes {axes} would be split twice"
        return jax.sharding.PartitionSpec(*parts)

    def sharding(self, axes: str, product: str | None = None) -> jax.sharding.NamedSharding:
        """How an array with these axis letters lies on the mesh; see `spec`."""
        return jax.sharding.NamedSharding(self.mesh, self.spec(axes, product))

    def whole(self, share: jax.ShapeDtypeStruct, axes: str) -> jax.ShapeDtypeStruct:
        """What an array is of which each device has a share of this shape."""
        sizes = [
            size * (self.num_devices if part else 1)
            for size, part in zip(share.shape, self.spec(axes), strict=True)
        ]
        return jax.ShapeDtypeStruct(sizes, share.dtype, sharding=self.sharding(axes))

    def zeros(self, share: jax.ShapeDtypeStruct, axes: str) -> Shaped[jax.Array, "..."]:
        """An array of zeros of which each device has a share of this shape."""
        whole = self.whole(share, axes)
        return jnp.zeros(whole.shape, whole.dtype, device=whole.sharding)

    def lay_out(self, whole: Shaped[Any, "..."], axes: str) -> Shaped[Any, "..."]:
        """A weight as the devices hold it: kv heads repeated, vocabulary padded with zeros.

        Args:
            whole: As a checkpoint has it; numpy and jax arrays give their own kind.
            axes: Its letters; J, what belongs to a kv head, are G queries, key and value.
        """
        xp = np if isinstance(whole, np.ndarray) else jnp
        if "V" in axes:
            axis = axes.index("V")
            missing = -whole.shape[axis] % self.num_devices
            whole = xp.pad(whole, [(0, missing if i == axis else 0) for i in range(whole.ndim)])
        if self.kv_copies > 1 and "J" in axes:
            queries = self._regrouped(whole[:, :-2], axes.index("K"))
            own = xp.repeat(whole[:, -2:], self.kv_copies, axis=axes.index("K"))
            return xp.concatenate([queries, own], axis=axes.index("J"))
        if self.kv_copies > 1 and "K" in axes:
            return self._regrouped(whole, axes.index("K"))
        return whole

    def _regrouped(self, queries: Shaped[Any, "..."], axis: int) -> Shaped[Any, "..."]:
        """Queries [..., K, G, ...] as those of more kv heads with fewer queries each."""
        heads, group = queries.shape[axis : axis + 2]
        sizes = (heads * self.kv_copies, group // self.kv_copies)
        return queries.reshape(*queries.shape[:axis], *sizes, *queries.shape[axis + 2 :])


def place(
    widths: ModelWidths, devices: Sequence[jax.Device] | int, *, split_experts: bool = False
) -> Placement:
    """Lays a model out on devices.

    Args:
        widths: The sizes that are split.
        devices: One group, each of which holds its share of every layer; or how many absent ones.
        split_experts: Whole experts on each device (expert parallel) rather than parts of all.

    Raises:
        ValueError: A size cannot be split evenly.
    """
    mesh: mesh_lib.AnyMesh
    if isinstance(devices, int):
        count, mesh = devices, mesh_lib.absent_mesh(devices)
    else:
        count, mesh = len(devices), mesh_lib.build_mesh(devices)
    reason = _why_not(widths, count, split_experts)
    if reason is not None:
        fitting = [n for n in range(1, count) if _why_not(widths, n, split_experts) is None]
        raise ValueError(
            f"--tensor_parallel={count}: {reason}; fewer devices that would do: "
            f"{', '.join(map(str, fitting))}"
        )
    return Placement(
        mesh=mesh,
        kv_copies=max(1, count // widths.num_kv_heads),
        split_experts=split_experts,
    )


def _why_not(widths: ModelWidths, count: int, split_experts: bool) -> str | None:
    """Why a model cannot be split over so many devices; None if it can."""
    kv_heads, group = widths.num_kv_heads, widths.num_heads // widths.num_kv_heads
    copies, left = divmod(count, kv_heads)
    if kv_heads % count and (left or group % copies):
        return f"{kv_heads} kv heads of {group} queries each cannot be shared out evenly"
    experts = ("num_experts", widths.num_experts)
    if not split_experts:
        experts = ("intermediate_size of an expert", widths.expert_size)
    for name, size in (("intermediate_size", widths.intermediate_size), experts):
        if size % count:
            return f"{name}={size} cannot be shared out evenly"
    return None
