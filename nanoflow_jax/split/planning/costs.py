"""Seconds that a node takes on a machine, and what of them one request is charged.

Where a node was measured its coefficients are taken, else the roofline of the machine's hardware:
the longer of computing and of reading memory, and an overhead (`cost.node_work` counts both).
"""

import dataclasses
import enum
import functools

from nanoflow_jax.cost import node_work
from nanoflow_jax.cost.node_work import Node, NodeWork
from nanoflow_jax.models import architecture
from nanoflow_jax.split.planning.profiles import DeviceProfile, Hardware, NodeTimes


class Accounting(enum.StrEnum):
    """What a request is charged for time of the server.

    marginal: What it adds to steps that run anyway: its rows, not the weights that all share.
    average: Its equal share of each step, weights included.
    priced: Marginal time and the memory of its cached tokens while it lasts, each at its price.
    """

    MARGINAL = "marginal"
    AVERAGE = "average"
    PRICED = "priced"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model whose nodes are placed.

    Attributes:
        name: What profiles that measured it call it.
        config: Its shape.
    """

    name: str
    config: architecture.ModelConfig

    @functools.cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, in the order in which a token meets them."""
        return node_work.nodes(self.config)

    @functools.cached_property
    def first_alike(self) -> tuple[int, ...]:
        """For each layer the first that does the same work."""
        first: dict[tuple[int | None, bool], int] = {}
        kinds = [
            (window, self.config.is_sparse(layer))
            for layer, window in enumerate(self.config.windows)
        ]
        return tuple(first.setdefault(kind, layer) for layer, kind in enumerate(kinds))


class NodeCosts:
    """Costs of the nodes of one model on one machine; work that nodes share is counted once."""

    def __init__(self, model: Model, device: DeviceProfile) -> None:
        if device.times and device.model != model.name:
            raise ValueError(
                f"profile {device.name} has times of {device.model}, not of {model.name}; "
                "measure this model"
            )
        self._model = model
        self.device = device
        self._counted: dict[tuple[object, ...], NodeWork] = {}

    def weight_bytes(self, node: Node) -> float:
        return node.parameters * self.device.weight_bits / 8

    def kv_bytes(self, node: Node, context_len: float) -> float:
        """Of one request's cached tokens."""
        return node.kv_tokens(context_len) * node.kv_width * self.device.kv_bits / 8

    def prefill_s(self, node: Node, prompt_len: int) -> float:
        """A whole prompt."""
        times = self._times(node)
        if times is not None:
            a, b, c = times.prefill_s
            return a + b * prompt_len + c * prompt_len**2
        return self._bound_s(self._prefill_work(node, prompt_len))

    def decode_s(self, node: Node, context_len: float) -> float:
        """One step of the machine's batch, which each of its requests waits for."""
        times = self._times(node)
        if times is not None:
            base, slope = times.decode_s
            return base + slope * context_len
        return self._bound_s(self._decode_work(node, self.device.batch, context_len))

    def prefill_charge_s(self, node: Node, prompt_len: int, accounting: Accounting) -> float:
        """What a prompt is charged; `priced` as marginal."""
        if accounting is Accounting.AVERAGE:
            return self.prefill_s(node, prompt_len)
        times = self._times(node)
        if times is not None:
            _, b, c = times.prefill_s
            return b * prompt_len + c * prompt_len**2
        return self._added_s(self._prefill_work(node, prompt_len))

    def decode_charge_s(self, node: Node, context_len: float, accounting: Accounting) -> float:
        """What a token is charged; `priced` as marginal.

        Raises:
            ValueError: Marginal time is asked for and was not measured.
        """
        if accounting is Accounting.AVERAGE:
            return self.decode_s(node, context_len) / self.device.batch
        times = self._times(node)
        if times is None:
            return self._added_s(self._decode_work(node, 1, context_len))
        if times.row_s is None:
            raise ValueError(
                f"profile {self.device.name} has no row_us of {node.name}, which {accounting} "
                "accounting needs; measure two batches, or charge the average"
            )
        return times.row_s + times.decode_s[1] * context_len / self.device.batch

    def _times(self, node: Node) -> NodeTimes | None:
        return self.device.times.get(node.name) or self.device.times.get(str(node.kind))

    def _hardware(self, kind: str) -> Hardware:
        if self.device.hardware is None:
            raise ValueError(
                f"profile {self.device.name} has neither times of {kind} nor hardware; add one"
            )
        return self.device.hardware

    def _prefill_work(self, node: Node, prompt_len: int) -> tuple[str, NodeWork]:
        key = (node.kind, self._alike(node), prompt_len)
        if key not in self._counted:
            self._counted[key] = node_work.prefill_work(
                self._model.config, node, prompt_len=prompt_len
            )
        return node.kind, self._counted[key]

    def _decode_work(self, node: Node, rows: int, context_len: float) -> tuple[str, NodeWork]:
        key = (node.kind, self._alike(node), rows, context_len)
        if key not in self._counted:
            self._counted[key] = node_work.decode_work(
                self._model.config, node, rows=rows, context_len=context_len
            )
        return node.kind, self._counted[key]

    def _alike(self, node: Node) -> int | None:
        return None if node.layer is None else self._model.first_alike[node.layer]

    def _bound_s(self, kind_work: tuple[str, NodeWork]) -> float:
        """The roofline of a whole step."""
        kind, work = kind_work
        hardware, device = self._hardware(kind), self.device
        read = (work.weights * device.weight_bits + work.kv_numbers * device.kv_bits) / 8
        memory_s = (read + work.moved_bytes) / hardware.memory_bytes_per_s
        return max(work.flops / hardware.flops_per_s, memory_s) + hardware.overhead_s

    def _added_s(self, kind_work: tuple[str, NodeWork]) -> float:
        """The same without weights and overhead, which are there without this request."""
        kind, work = kind_work
        hardware = self._hardware(kind)
        read = work.kv_numbers * self.device.kv_bits / 8 + work.moved_bytes
        return max(work.flops / hardware.flops_per_s, read / hardware.memory_bytes_per_s)
