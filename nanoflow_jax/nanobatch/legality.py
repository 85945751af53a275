"""Whether a plan can be run, and if not, why."""

from collections.abc import Sequence

from nanoflow_jax.nanobatch import dependencies, operations, pipeline
from nanoflow_jax.nanobatch.plan import Plan, TokenRange

# Layers beyond those under way at once. A pair of nano-operations may run at once at a distance of
# k > max_shift + 1 layers only if it also may at k - 1: else the later layer's, one layer back,
# would have to come before the other, and it is issued after it.
_MORE_LAYERS = 3
# Many more than any pipeline has use for, and few enough for what is found here to be found soon.
_MOST_SHIFT = 16


def check(plan: Plan) -> None:
    """Makes sure that a plan can be run.

    In a legal plan each token of each operation is covered once, nothing is issued before what it
    waits for, and what may run at once asks for no more SMs than there are.

    Raises:
        ValueError: It cannot; the message says what was wanted, what came and what to change.
    """
    try:
        for part in (
            _check_sizes,
            _check_nano_operations,
            _check_coverage,
            _check_groups,
            _check_weights,
            _check_after,
            _check_order,
            _check_caps,
        ):
            part(plan)
    except ValueError as error:
        raise ValueError(f"plan {plan.name!r}: {error}") from None


def _check_sizes(plan: Plan) -> None:
    for name in ("num_tokens", "granule", "num_sms"):
        if getattr(plan, name) < 1:
            raise ValueError(f"{name}={getattr(plan, name)} is not positive; give it at least 1")
    if not plan.order:
        raise ValueError("order is empty; list the nano-operations of every operation")


def _check_nano_operations(plan: Plan) -> None:
    for nano in plan.order:
        where = f"{nano.operation} {nano.tokens}"
        if nano.operation not in plan.graph.by_name:
            raise ValueError(
                f"{where}: a layer of {plan.shape} has no such operation; it has "
                f"{', '.join(plan.graph.by_name)}"
            )
        if not 0 <= nano.tokens.start < nano.tokens.stop <= plan.num_tokens:
            raise ValueError(
                f"{where}: not a range of tokens within [0, {plan.num_tokens}); change its tokens"
            )
        for border in nano.tokens:
            if border % plan.granule and border != plan.num_tokens:
                raise ValueError(
                    f"{where}: {border} is not a multiple of the granule {plan.granule}; move the "
                    "border or lower the granule"
                )
        if nano.num_ctas is not None and not 1 <= nano.num_ctas <= plan.num_sms:
            raise ValueError(
                f"{where}: num_ctas={nano.num_ctas} is outside [1, {plan.num_sms}], the SMs of the "
                "device; change it, or leave it out for all SMs"
            )
        if nano.num_ctas is not None and nano.lane is None:
            raise ValueError(
                f"{where}: num_ctas={nano.num_ctas} caps nothing outside a lane; give it a lane or "
                "leave num_ctas out"
            )
        if nano.shift < 0:
            raise ValueError(f"{where}: shift={nano.shift} is negative; raise all shifts alike")
        if nano.shift > _MOST_SHIFT:
            raise ValueError(
                f"{where}: shift={nano.shift} is above {_MOST_SHIFT}, the most layers that a plan "
                "may be ahead; lower it"
            )
    if min(nano.shift for nano in plan.order):
        raise ValueError("no nano-operation has shift 0; lower all shifts alike")


def _check_coverage(plan: Plan) -> None:
    choices = plan.graph.choices
    for op in plan.graph.operations:
        if op.choice is None:
            _check_cover(plan, op.name, _ranges(plan, op.name))
    for product, ways in choices.items():
        taken: list[TokenRange] = []
        for way, ops in ways.items():
            cells = {op.name: _covered(plan, op.name) for op in ops}
            first, *rest = cells
            for name in rest:
                if cells[name] != cells[first]:
                    raise ValueError(
                        f"{first} and {name} together are the way {way!r} of {product} and cover "
                        "different tokens; give both the same"
                    )
            # One by one, so that a token which is covered twice is found.
            taken += _ranges(plan, first)
        _check_cover(plan, f"{product} (ways {' and '.join(ways)})", taken)
        for ops in ways.values():
            for op in ops:
                _check_cover(plan, op.name, _ranges(plan, op.name), is_whole=False)


def _ranges(plan: Plan, name: str) -> list[TokenRange]:
    return [plan.order[i].tokens for i in plan.by_operation.get(name, ())]


def _covered(plan: Plan, name: str) -> set[TokenRange]:
    ranges = _ranges(plan, name)
    return {cell for cell in plan.cells if any(cell.overlaps(tokens) for tokens in ranges)}


def _check_cover(
    plan: Plan, name: str, ranges: Sequence[TokenRange], *, is_whole: bool = True
) -> None:
    """Ranges lie beside each other; if `is_whole`, they are the dense batch."""
    at = 0
    for tokens in sorted(ranges):
        if tokens.start < at:
            raise ValueError(
                f"{name}: tokens from {tokens.start} on are covered twice; cut {tokens}"
            )
        if is_whole and tokens.start > at:
            raise ValueError(f"{name}: nothing covers tokens [{at}, {tokens.start}); add a range")
        at = tokens.stop
    if is_whole and at < plan.num_tokens:
        raise ValueError(f"{name}: nothing covers tokens [{at}, {plan.num_tokens}); add a range")


def _check_groups(plan: Plan) -> None:
    for op in plan.graph.operations:
        for value in op.reads:
            if value.rows is not operations.Rows.GROUPED:
                continue
            for writer in plan.graph.writers(value):
                if _ranges(plan, writer.name) != _ranges(plan, op.name):
                    raise ValueError(
                        f"{op.name} reads rows that {writer.name} has sorted by expert, and is "
                        "split at other tokens; split both alike"
                    )


def _check_weights(plan: Plan) -> None:
    cells, weights = plan.cells, plan.decode_weights
    if len(weights) != len(cells):
        raise ValueError(
            f"decode_weights has {len(weights)} entries and the ranges make {len(cells)} cells "
            f"({', '.join(map(str, cells))}); give one for each cell"
        )
    if min(weights) < 0 or not any(weights):
        raise ValueError(
            f"decode_weights={list(weights)} must not be negative, nor all 0; decode rows are "
            "dealt in these proportions"
        )


def _check_after(plan: Plan) -> None:
    for nano, own in zip(plan.order, plan.keys, strict=True):
        for key in nano.after:
            if key not in plan.keys:
                raise ValueError(
                    f"{own} is to run after {key!r}, which is none of {', '.join(plan.keys)}"
                )


def _layers(plan: Plan) -> list[operations.LayerGraph]:
    return [plan.graph] * (plan.max_shift + _MORE_LAYERS)


def _check_order(plan: Plan) -> None:
    layers = _layers(plan)
    number = {node: i for i, node in enumerate(pipeline.issue_order(plan, layers))}
    for writer, reader in dependencies.value_dependencies(plan, layers):
        if number[writer] > number[reader]:
            keys = plan.keys[reader.place], plan.keys[writer.place]
            distance = reader.layer - writer.layer
            layer = "its layer" if not distance else "the layer before"
            raise ValueError(
                f"{keys[0]} is issued before {keys[1]} of {layer}, which it reads; move it back "
                "in order or change its shift"
            )


def _check_caps(plan: Plan) -> None:
    width, nodes = dependencies.Dependencies(plan, _layers(plan)).widest_cut()
    if width > plan.num_sms:
        asked = ", ".join(f"{plan.keys[n.place]} ({plan.num_ctas(n.place)})" for n in nodes)
        raise ValueError(
            f"{asked} may run at once and ask for {width} CTAs of {plan.num_sms} SMs; lower "
            "num_ctas, or order them by a lane or by after"
        )
