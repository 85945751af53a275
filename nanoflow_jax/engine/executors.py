"""How the nano-operations of a plan are run at once, or not at all.

`graph` asks XLA for CUDA graphs whose nodes wait only for what they read (and for tokens, which
hold lanes together), and keeps XLA from merging what a plan has split. `sequential` leaves XLA's
own order: one after another.
"""

import enum
from collections.abc import Mapping

# Facts about the options, and what each silently undoes otherwise: docs/decisions.md, Overlap.
_GRAPH_OPTIONS: Mapping[str, bool | int | str] = {
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
}


class Executor(enum.StrEnum):
    """Who decides what runs beside what."""

    SEQUENTIAL = "sequential"
    GRAPH = "graph"

    @property
    def compiler_options(self) -> Mapping[str, bool | int | str]:
        """What XLA is told, for each program."""
        return _GRAPH_OPTIONS if self is Executor.GRAPH else {}

    @property
    def keeps_lanes(self) -> bool:
        """Whether kernels get tokens; see `nanobatch.executor.run`."""
        return self is Executor.GRAPH
