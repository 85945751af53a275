"""All kinds of results."""

from nanoflow_jax.results import ablation, invariance, kernels, split, throughput
from nanoflow_jax.results.kind import Kind

KINDS = {
    kind.name: kind
    for kind in (throughput.KIND, invariance.KIND, kernels.KIND, ablation.KIND, split.KIND)
}


def find(name: str) -> Kind:
    """The kind of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in KINDS:
        raise ValueError(f"there is no kind {name!r} of results; there are {', '.join(KINDS)}")
    return KINDS[name]
