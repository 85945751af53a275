"""Kernels of several nano-operations in one, and how much each of them has to do."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch import executor, operations
from nanoflow_jax.nanobatch.plan import TokenRange
from pallas_kernels import mosaic
from pallas_kernels.side_by_side import side_by_side


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelGroups:
    """`nanobatch.executor.Together` of Mosaic kernels.

    Attributes:
        config: The model, or the share of it that one device has.
        products: Whether products of dense weights are kernels.
        expert_products: Whether those of experts are.
        decode_attention: Whether attention of decode rows is one.
        prefill_attention: Whether that of chunks is.
        interpret: None on a GPU, or InterpretGPUParams.
    """

    config: architecture.ModelConfig
    products: bool
    expert_products: bool
    decode_attention: bool
    prefill_attention: bool
    interpret: Any

    def work(self, operation: operations.Operation, tokens: TokenRange) -> float | None:
        """Multiplications with weights; 0 of an attention, whose contexts nobody knows here."""
        name = operation.name
        if name in ("decode_attention", "prefill_attention"):
            return 0.0 if getattr(self, name) else None
        is_sparse = any(value.rows is operations.Rows.GROUPED for value in operation.reads)
        if not (self.expert_products if is_sparse else self.products):
            return None
        size = self._weights_of_a_token(name, is_sparse=is_sparse)
        return None if size is None else float(size * tokens.length)

    def _weights_of_a_token(self, name: str, *, is_sparse: bool) -> int | None:
        c = self.config
        hidden = c.intermediate_size
        if is_sparse:
            assert c.moe is not None
            hidden = c.moe.num_active * c.moe.intermediate_size
        heads = {"norm_kqv": c.num_heads + 2 * c.num_kv_heads, "o": c.num_heads}
        widths = {name: count * c.head_dim for name, count in heads.items()}
        widths |= {"up_gate": 2 * hidden, "down": hidden}
        widths |= {"o_columns": widths["o"], "down_columns": hidden}
        return c.hidden_size * widths[name] if name in widths else None

    def run(
        self, members: Sequence[executor.Member], run_operation: executor.RunOperation
    ) -> list[Any]:
        """What each writes.

        Operations run twice, and of the first time nothing is left in the program: it finds the
        kernel of each and what that reads. All kernels then run as one, and the second time each
        operation is handed what its kernel gave. One that has nothing to do leaves the SMs to the
        others.
        """
        kernels = [_kernel_of(member, run_operation) for member in members]
        pairs = [(k, m.call) for k, m in zip(kernels, members, strict=True) if k is not None]
        num_ctas = sum(member.call.num_ctas or 0 for member in members)
        found = iter(self._run_kernels(pairs, num_ctas))
        results = [None if kernel is None else next(found) for kernel in kernels]
        return [
            _perform(member, run_operation, _finish_with(own))
            for member, own in zip(members, results, strict=True)
        ]

    def _run_kernels(
        self, pairs: Sequence[tuple[mosaic.Kernel, executor.Call]], num_ctas: int
    ) -> Sequence[Any]:
        """Results of kernels as they are; what is made of them belongs to each operation."""
        if not pairs:
            return ()
        bare = [dataclasses.replace(kernel, finish=lambda *results: results) for kernel, _ in pairs]
        *shares, _ = [call.num_ctas for _, call in pairs]
        how: dict[str, Any] = {"num_ctas": num_ctas, "token": None, "interpret": self.interpret}
        with contextlib.ExitStack() as scopes:
            for _, call in pairs:
                scopes.enter_context(executor.scope(call))
            if not shares:
                return (mosaic.run(bare[0], **how),)
            return side_by_side(bare, [share or 0 for share in shares], **how)


def _perform(
    member: executor.Member,
    run_operation: executor.RunOperation,
    run_kernel: Callable[[mosaic.Kernel], Any],
) -> Any:
    call = dataclasses.replace(member.call, run_kernel=run_kernel)
    with executor.scope(call):
        return run_operation(call, *member.reads)


def _finish_with(results: Any) -> Callable[[mosaic.Kernel], Any]:
    return lambda kernel: kernel.finish(*results)


def _kernel_of(
    member: executor.Member, run_operation: executor.RunOperation
) -> mosaic.Kernel | None:
    """The kernel that an operation would run; None if it has nothing to do."""
    found: list[mosaic.Kernel] = []

    def note(kernel: mosaic.Kernel) -> Any:
        found.append(kernel)
        made = jax.eval_shape(kernel.finish, *kernel.results)
        return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), made)

    _perform(member, run_operation, note)
    assert len(found) < 2, f"{member.call.operation} is {len(found)} kernels"
    return found[0] if found else None
