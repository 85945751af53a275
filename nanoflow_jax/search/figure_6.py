"""The pipeline that NanoFlow's paper shows: LLaMA-2-70B on 8 A100s, 2048 tokens.

Source: NanoFlow (arXiv 2408.12757v2), Figure 6, with shares of the SMs as printed there.
"""

from collections.abc import Sequence

from nanoflow_jax.cost import nanoflow_figures
from nanoflow_jax.nanobatch import operations
from nanoflow_jax.nanobatch.operations import Resource
from nanoflow_jax.nanobatch.plan import NanoOperation, Plan, TokenRange, find_cells

_SHAPE = operations.LayerShape(num_devices=nanoflow_figures.DEVICES)
_A, _B = (0, 768), (768, 2048)
_QUARTERS = ((0, 384), (384, 768), (768, 1408), (1408, 2048))
_PERCENT = 100  # SMs of the plan: shares as printed


def _nano(
    operation: str,
    tokens: tuple[int, int],
    lane: Resource | None = None,
    share: float | None = None,
    after: Sequence[str] = (),
) -> NanoOperation:
    return NanoOperation(
        operation=operation,
        tokens=TokenRange(*tokens),
        lane=lane,
        num_ctas=None if share is None else round(_PERCENT * share),
        after=tuple(after),
    )


def _before_attention(tokens: tuple[int, int]) -> list[NanoOperation]:
    products = _nano("norm_kqv", tokens, Resource.COMPUTE, 0.4)
    return [products, _nano("rope", tokens), _nano("append", tokens)]


def plan() -> Plan:
    """The paper's own plan, with shares as printed there; nobody has checked that it is legal."""
    first, second, third, fourth = _QUARTERS
    order = [
        *_before_attention(first),
        _nano("decode_attention", first, Resource.MEMORY, 0.4),
        *_before_attention(second),
        _nano("decode_attention", second, Resource.MEMORY, 0.4),
        _nano("prefill_attention", _A, Resource.COMPUTE, 0.6),
        *_before_attention(third),
        _nano("decode_attention", third, Resource.MEMORY, 0.4),
        *_before_attention(fourth),
        _nano("decode_attention", fourth, Resource.MEMORY, 0.4),
        _nano("attention_gather", _A, Resource.NETWORK, 0.2),
        _nano("prefill_attention", _B, Resource.COMPUTE, 0.6),
        _nano("o_columns", _A, Resource.COMPUTE, 0.6),
        _nano("o_gather", _A, Resource.NETWORK, 0.2),
        _nano("o", _B, Resource.COMPUTE, 0.8),
        _nano("norm", _A),
        _nano("o_reduce", _B, Resource.NETWORK, 0.1, after=("o.0",)),
        _nano("up_gate", _A, Resource.COMPUTE, 0.9),
        _nano("down", _A, Resource.COMPUTE, 0.9),
        _nano("down_reduce", _A, Resource.NETWORK, 0.1),
        _nano("norm", _B),
        _nano("up_gate", _B, Resource.COMPUTE, 0.9),
        _nano("down", _B, Resource.COMPUTE, 0.9),
        _nano("down_reduce", third, Resource.NETWORK, 0.2),
        _nano("down_reduce", fourth, Resource.NETWORK, 0.2),
    ]
    cells = find_cells([nano.tokens for nano in order], num_tokens=nanoflow_figures.TOKENS)
    return Plan(
        name="paper",
        shape=_SHAPE,
        num_tokens=nanoflow_figures.TOKENS,
        num_sms=_PERCENT,
        decode_weights=tuple(cell.length for cell in cells),
        order=tuple(order),
    )
