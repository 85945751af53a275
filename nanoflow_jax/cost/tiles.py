"""Products as a device computes them: in square tiles, as many at once as it has SMs.

A product of few more tiles than SMs takes as long as one of twice as many. That is what a product
over fewer rows loses, and so most of what it costs to cut a batch.
"""

import dataclasses
import math

from nanoflow_jax.cost import iteration
from nanoflow_jax.models import architecture

_BYTES = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """What one device has of a product, in each of some layers.

    Attributes:
        name: As in `iteration.operation_costs`.
        depth: Numbers that are added up.
        columns: Of the weights.
        num_layers: That have it.
        moe: Whose experts have such weights each; None: one has.
    """

    name: str
    depth: int
    columns: int
    num_layers: int
    moe: architecture.MoeConfig | None = None


def products(config: architecture.ModelConfig, num_devices: int) -> tuple[Product, ...]:
    """Products of all layers, on one of the devices that share them.

    The output of attention is gathered before it is multiplied, if there is anything to gather.
    """
    c, n = config, num_devices
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    num_sparse = sum(c.is_sparse(layer) for layer in range(c.num_layers))

    def one(
        name: str,
        depth: int,
        columns: int,
        num_layers: int = c.num_layers,
        moe: architecture.MoeConfig | None = None,
    ) -> Product:
        return Product(name=name, depth=depth, columns=columns, num_layers=num_layers, moe=moe)

    found = [one("kqv", c.hidden_size, -(-(heads + 2 * kv) // n))]
    found.append(one("o", heads, -(-c.hidden_size // n)))
    for moe, layers in ((None, c.num_layers - num_sparse), (c.moe, num_sparse)):
        if layers:
            inner = -(-(c.intermediate_size if moe is None else moe.intermediate_size) // n)
            found.append(one("up_gate", c.hidden_size, 2 * inner, layers, moe))
            found.append(one("down", inner, c.hidden_size, layers, moe))
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProductTime:
    """What a product takes.

    Attributes:
        seconds: In all of its layers.
        idle_s: Of them, those that SMs have nothing to do, as if all had none at once.
    """

    seconds: float
    idle_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """A device.

    Attributes:
        num_sms: Each computes one tile at a time.
        side: Rows and columns of a tile.
        sm_flops: Operations a second of an SM that has a tile.
    """

    num_sms: int
    side: int
    sm_flops: float

    def time(self, product: Product, rows: int, memory_bytes_per_s: float) -> ProductTime:
        """Of a product over some rows; no less than it takes to read and write what it needs.

        Args:
            product: The product.
            rows: Tokens.
            memory_bytes_per_s: Of the device.
        """
        if not rows:
            return ProductTime(seconds=0.0, idle_s=0.0)
        experts, each = 1.0, float(rows)
        if product.moe is not None:
            experts = iteration.touched_experts(product.moe, rows)
            each = rows * product.moe.num_active / experts
        depth, columns = product.depth, product.columns
        tiles = experts * math.ceil(each / self.side) * math.ceil(columns / self.side)
        tile_s = 2 * self.side**2 * depth / self.sm_flops
        moved = _BYTES * experts * (depth * columns + each * (depth + columns))
        memory_s = moved / memory_bytes_per_s
        waves_s, full_s = math.ceil(tiles / self.num_sms) * tile_s, tiles / self.num_sms * tile_s
        seconds = max(waves_s, memory_s)
        return ProductTime(
            seconds=product.num_layers * seconds,
            idle_s=product.num_layers * (seconds - max(full_s, memory_s)),
        )
