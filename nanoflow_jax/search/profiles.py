"""How long operations take alone on a device, as far as it is known without one."""

import dataclasses
from typing import Protocol

from nanoflow_jax.cost import iteration, layer_work, nanoflow_figures
from nanoflow_jax.cost.datasheets import Datasheet
from nanoflow_jax.models import architecture

_BYTES = 2
# Passes over the activations, of which a device sends (n - 1) / n.
_PASSES = {
    "attention_gather": 1,
    "o_gather": 1,
    "hidden_gather": 1,
    "down_gather": 1,
    "o_reduce": 2,
    "down_reduce": 2,
}


class Profile(Protocol):
    """Times of operations."""

    @property
    def source(self) -> str:
        """Where they come from, for people."""

    def seconds(self, operation: str, tokens: int) -> float:
        """Of an operation over some tokens, alone on the device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least time by a datasheet: nothing was measured.

    Attributes:
        config: The model.
        num_devices: That share a layer.
        sheet: Of each device.
        load: Of a whole step; tokens of a part have their share of its decode rows.
    """

    config: architecture.ModelConfig
    num_devices: int
    sheet: Datasheet
    load: layer_work.Load

    @property
    def source(self) -> str:
        return f"the roofline of {self.sheet.source}; nothing was measured"

    def seconds(self, operation: str, tokens: int) -> float:
        """See `Profile`.

        Raises:
            ValueError: Nothing is known of the operation.
        """
        if operation in _PASSES:
            width = self.config.hidden_size * _PASSES[operation]
            if operation == "hidden_gather":
                width = self.config.intermediate_size
            away = (self.num_devices - 1) / self.num_devices
            return tokens * width * _BYTES * away / self.sheet.link_bytes_per_s
        load = dataclasses.replace(
            self.load,
            tokens=tokens,
            decode_rows=round(self.load.decode_rows * tokens / self.load.tokens),
        )
        name = operation.removesuffix("_columns")
        moe = self.config.moe
        if moe is not None and name in ("route", "up_gate", "down"):
            return self._sparse(name, moe, tokens).seconds(self.sheet)
        return layer_work.work(self._own_part, name, load).seconds(self.sheet)

    def _sparse(self, operation: str, moe: architecture.MoeConfig, tokens: int) -> layer_work.Work:
        """Of a mixture of experts: products with all experts that some token is sent to."""
        width, hidden = self.config.hidden_size, -(-moe.intermediate_size // self.num_devices)
        if operation == "route":
            rows, experts, depth, columns = float(tokens), 1.0, width, moe.num_experts
        else:
            rows = float(tokens * moe.num_active)
            experts = iteration.touched_experts(moe, tokens)
            depth, columns = (width, 2 * hidden) if operation == "up_gate" else (hidden, width)
        moved = experts * depth * columns + rows * (depth + columns)
        return layer_work.Work(flops=2.0 * rows * depth * columns, num_bytes=_BYTES * moved)

    @property
    def _own_part(self) -> architecture.ModelConfig:
        """What one device has of each layer."""
        c, n = self.config, self.num_devices
        heads = -(-c.num_heads // n)
        kv = max(1, c.num_kv_heads // n)
        return dataclasses.replace(
            c,
            num_heads=-(-heads // kv) * kv,
            num_kv_heads=kv,
            intermediate_size=-(-c.intermediate_size // n),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of whole operations that somebody measured, scaled to parts.

    A part of n of N tokens takes `fixed + (1 - fixed) * n / N` of the whole: splitting an operation
    into k parts costs (k - 1) * fixed of it.

    Attributes:
        whole_s: Of each operation over all tokens.
        tokens: Of the whole.
        fixed: See above.
        source: Who measured them.
    """

    whole_s: dict[str, float]
    tokens: int
    fixed: float
    source: str

    def seconds(self, operation: str, tokens: int) -> float:
        """See `Profile`; operations that were not measured take no time."""
        whole = self.whole_s.get(operation.removesuffix("_columns"), 0.0)
        return whole * (self.fixed + (1 - self.fixed) * tokens / self.tokens)


# Of all collectives of a layer: two gathers move what one all-reduce moves, and a layer has two
# such pairs.
COLLECTIVE_SHARES = {
    "attention_gather": 1 / 4,
    "o_gather": 1 / 4,
    "o_reduce": 1 / 2,
    "hidden_gather": 1 / 4,
    "down_gather": 1 / 4,
    "down_reduce": 1 / 2,
}


def _measured_ms() -> dict[str, float]:
    """Table 2 by the names of `nanobatch.operations`."""
    found = {name: times.measured for name, times in nanoflow_figures.TABLE_2.items()}
    found["norm_kqv"] = found.pop("kqv")
    collectives = found.pop("collectives")
    return found | {name: collectives * share for name, share in COLLECTIVE_SHARES.items()}


# The fixed part is such that the paper's split runs 1106 / 982 times as long as nothing split, one
# after another, as its Figure 9 says of 512/512.
PAPER_70B = Measured(
    whole_s={name: ms * 1e-3 / nanoflow_figures.LAYERS for name, ms in _measured_ms().items()},
    tokens=nanoflow_figures.TOKENS,
    fixed=0.0806,
    source="NanoFlow (arXiv 2408.12757v2), Table 2, measured on 8 A100; what splitting costs from "
    "its Figure 9",
)
