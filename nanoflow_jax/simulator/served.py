"""How a model is served by devices whose memory it fills."""

from nanoflow_jax.cost import serving
from nanoflow_jax.models import architecture
from nanoflow_jax.scheduler import buckets, scheduler
from nanoflow_jax.simulator.loop import Served


def fill_memory(
    config: architecture.ModelConfig,
    cluster: serving.Cluster,
    *,
    dense_batch: int,
    page_size: int = 16,
    fixed_batch: bool = False,
) -> Served:
    """One replica whose cache has all memory that the weights leave.

    Args:
        config: The model.
        cluster: Devices of the replica.
        dense_batch: Most tokens of a step.
        page_size: Tokens of a page.
        fixed_batch: Whether every step takes as long as a full one, as NanoFlow runs them, or by
            the smallest of the default buckets that holds it.

    Raises:
        ValueError: The weights leave no room.
    """
    sizes = serving.sizes(config)
    room = serving.cache_bytes(sizes, cluster)
    num_pages = int(room // (sizes.kv_bytes_per_token * page_size))
    if num_pages < 1:
        raise ValueError("the weights leave no room for a page; take more devices, or larger ones")
    shapes = buckets.default_buckets(max_requests=dense_batch, dense_batch=dense_batch)
    if fixed_batch:
        shapes = (
            buckets.Bucket(tokens=dense_batch, decode_rows=dense_batch, prefill_rows=dense_batch),
        )
    return Served(
        limits=scheduler.Limits(
            max_requests=dense_batch,
            dense_batch=dense_batch,
            page_size=page_size,
            penalty_requests=0,
        ),
        buckets=shapes,
        num_pages=num_pages,
    )
