"""What each operation of a layer has to compute and to move, and the least time for that.

Names of operations are those of `nanobatch.operations`. Numbers are bfloat16: 2 bytes.

Source: counted from the operations themselves; the bound of time is the roofline (Williams et al.,
Communications of the ACM 52(4), 2009).
"""

import dataclasses

from nanoflow_jax.cost.datasheets import Datasheet
from nanoflow_jax.models import architecture

_BYTES = 2
# An SM takes up to 64 bytes a cycle from L2 (at 1.7 GHz some 110 GB/s), so that 44 of an H200's 132
# SMs are as many as its memory can feed.
SHARE_THAT_FILLS_MEMORY = 1 / 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What an operation does.

    Attributes:
        flops: Multiplications and additions.
        num_bytes: Read from and written to the device's memory, each array once.
    """

    flops: float
    num_bytes: float

    def seconds(self, sheet: Datasheet, *, share: float = 1.0) -> float:
        """The least time on a share of a GPU's SMs, by its datasheet."""
        bandwidth = sheet.memory_bytes_per_s * min(1.0, share / SHARE_THAT_FILLS_MEMORY)
        return max(self.flops / (sheet.bf16_flops * share), self.num_bytes / bandwidth)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What tokens an operation runs over.

    Attributes:
        tokens: All of them.
        decode_rows: Those of requests with one token to do.
        context_len: Cached tokens that each of those sees, on average.
        prefix_len: Cached tokens that each other token sees, on average.
    """

    tokens: int
    decode_rows: int
    context_len: float
    prefix_len: float


def work(config: architecture.ModelConfig, operation: str, load: Load) -> Work:
    """The work of an operation of a dense layer over some tokens.

    Args:
        config: The model.
        operation: Its name.
        load: The tokens.

    Raises:
        ValueError: Nothing is known of an operation of that name.
    """
    c, tokens = config, load.tokens
    width, heads, kv, head = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
    hidden = c.intermediate_size

    def product(columns: int, depth: int, written: int) -> Work:
        weight = columns * depth
        moved = weight + tokens * (depth + written)
        return Work(flops=2.0 * tokens * weight, num_bytes=_BYTES * moved)

    def moved(per_token: int) -> Work:
        return Work(flops=0.0, num_bytes=_BYTES * tokens * per_token)

    def attention(queries: float, seen: float, read: float) -> Work:
        moved = 2 * queries * heads * head + read * 2 * kv * head
        return Work(flops=4.0 * queries * seen * heads * head, num_bytes=_BYTES * moved)

    match operation:
        case "norm_kqv":
            columns = (heads + 2 * kv) * head
            return product(columns, width, columns)
        case "rope":
            return moved(2 * (heads + kv) * head)
        case "append":
            return moved(2 * 2 * kv * head)
        case "decode_attention":
            rows = load.decode_rows
            return attention(rows, load.context_len, rows * load.context_len)
        case "prefill_attention":
            queries = tokens - load.decode_rows
            return attention(queries, load.prefix_len, queries)
        case "o":
            return product(width, heads * head, 2 * width)
        case "norm":
            return moved(2 * width)
        case "up_gate":
            return product(2 * hidden, width, hidden)
        case "down":
            return product(width, hidden, 2 * width)
    raise ValueError(f"nothing is known of what {operation} costs")
