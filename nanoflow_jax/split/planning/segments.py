"""From measured times of ranges of layers to those of nodes.

Engines run whole layers, and are timed over ranges of them. All layers are taken to be alike:

    prefill of a range with P tokens: m (a + b P + c P^2) + [has the embedding] (d + e P) + [head] f
    a step that sees n tokens:        m (a + b n)         + [has the embedding] d         + [head] f

for m layers, by least squares of relative errors with no coefficient below zero. What grows with
what is cached is attention's; the rest of a layer is divided by parameters, which no plan that cuts
between layers can tell.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from nanoflow_jax.cost.node_work import NodeKind
from nanoflow_jax.split.planning import fit
from nanoflow_jax.split.planning.costs import Model
from nanoflow_jax.split.planning.profiles import NodeTimes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """Times of layers [start, stop) with one length of prompt.

    Attributes:
        start: First layer; with layer 0 goes the embedding.
        stop: The layer after the last; with the model's last goes the head.
        prompt_len: Tokens.
        prefill_s: Of the prompt.
        context_len: That the timed steps saw, on average.
        step_s: Of each.
    """

    start: int
    stop: int
    prompt_len: int
    prefill_s: float
    context_len: float
    step_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """Times of nodes, and how far measured ranges are from them.

    Attributes:
        times: By a node's kind.
        prefill_error: Root of the mean square of relative errors of prefill.
        step_error: The same of steps.
    """

    times: dict[str, NodeTimes]
    prefill_error: float
    step_error: float


def fit_nodes(model: Model, timed: Sequence[Timed]) -> Fitted:
    """Times of the nodes of a model.

    Args:
        model: Whose layers.
        timed: Ranges of them, with at least three lengths of prompt.

    Raises:
        ValueError: There are fewer lengths, or a time is none.
    """
    lengths = {one.prompt_len for one in timed}
    if len(lengths) < 3:
        raise ValueError(
            f"{len(lengths)} lengths of prompts do not tell three coefficients; measure with three"
        )
    for one in timed:
        if not (0 < one.prefill_s < np.inf and 0 < one.step_s < np.inf):
            raise ValueError(
                f"layers {one.start}:{one.stop} took {one.prefill_s:g} s and {one.step_s:g} s with "
                f"{one.prompt_len} tokens, which is no measurement; measure again"
            )
    num_layers = model.config.num_layers
    prefill, prefill_error = _relative(
        [_prefill_row(one, num_layers) for one in timed], [one.prefill_s for one in timed]
    )
    step, step_error = _relative(
        [_step_row(one, num_layers) for one in timed], [one.step_s for one in timed]
    )
    a, b, c, embed, embed_token, head = prefill
    base, slope, step_embed, step_head = step
    share = _attention_share(model)
    times = {
        NodeKind.EMBEDDING: NodeTimes(
            prefill_s=(embed, embed_token, 0.0), decode_s=(step_embed, 0.0)
        ),
        NodeKind.ATTENTION: NodeTimes(
            prefill_s=(a * share, b * share, c), decode_s=(base * share, slope)
        ),
        NodeKind.MLP: NodeTimes(
            prefill_s=(a * (1 - share), b * (1 - share), 0.0), decode_s=(base * (1 - share), 0.0)
        ),
        NodeKind.HEAD: NodeTimes(prefill_s=(head, 0.0, 0.0), decode_s=(step_head, 0.0)),
    }
    return Fitted(
        times={str(kind): one for kind, one in times.items()},
        prefill_error=prefill_error,
        step_error=step_error,
    )


def _prefill_row(one: Timed, num_layers: int) -> list[float]:
    m, p = one.stop - one.start, one.prompt_len
    embeds, heads = float(one.start == 0), float(one.stop == num_layers)
    return [m, m * p, m * p**2, embeds, embeds * p, heads]


def _step_row(one: Timed, num_layers: int) -> list[float]:
    m = one.stop - one.start
    return [m, m * one.context_len, float(one.start == 0), float(one.stop == num_layers)]


def _relative(rows: list[list[float]], seconds: list[float]) -> tuple[list[float], float]:
    """The fit of relative errors, and the root of their mean square."""
    wanted = np.array(seconds)
    matrix = np.array(rows) / wanted[:, None]
    found = fit.least_squares(matrix, np.ones(len(wanted)))
    errors = matrix @ np.array(found) - 1
    return found, float(np.sqrt(np.mean(errors**2)))


def _attention_share(model: Model) -> float:
    """Of a layer's parameters, over all layers."""
    of = dict.fromkeys((NodeKind.ATTENTION, NodeKind.MLP), 0)
    for node in model.nodes:
        if node.kind in of:
            of[node.kind] += node.parameters
    return of[NodeKind.ATTENTION] / sum(of.values())
