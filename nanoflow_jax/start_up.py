"""What programs say while an engine starts: loading, the settings chosen, compiling."""

import time
from collections.abc import Callable, Mapping

from nanoflow_jax.engine import build, compiler
from nanoflow_jax.meter import bytes_text
from nanoflow_jax.models import loading

_EVERY_S = 2.0


def reports(
    say: Callable[[str], None],
    *,
    also_settings: Callable[[build.Settings], None] = lambda settings: None,
    clock: Callable[[], float] = time.monotonic,
) -> build.Reports:
    """Reports that say each thing in a line.

    Args:
        say: Shows a line.
        also_settings: Called with the settings, for programs that need one of them.
        clock: Seconds.
    """
    shown_at = clock()
    num_compiled = 0

    def weights(progress: loading.Progress) -> None:
        nonlocal shown_at
        is_last = progress.done_bytes >= progress.total_bytes
        if is_last or clock() - shown_at >= _EVERY_S:
            shown_at = clock()
            done, total = bytes_text(progress.done_bytes), bytes_text(progress.total_bytes)
            say(f"loading: {done} of {total}, {progress.seconds:.1f} s")

    def settings(chosen: build.Settings) -> None:
        say(describe(chosen))
        also_settings(chosen)

    def program(compiled: compiler.Compiled, total: int) -> None:
        nonlocal num_compiled
        num_compiled = num_compiled % total + 1  # each replica has programs of its own
        say(f"compiled {num_compiled} of {total}: {compiled.name}, {compiled.seconds:.1f} s")

    return build.Reports(weights=weights, settings=settings, program=program)


def describe(chosen: build.Settings) -> str:
    """The settings of an engine in a few lines."""
    reason = f" ({chosen.max_requests_reason})" if chosen.max_requests_reason else ""
    return "\n".join(
        [
            f"device: {chosen.device}; model: {chosen.dtype}, {bytes_text(chosen.model_bytes)}",
            f"cache: {chosen.num_pages} pages of {chosen.page_size} tokens, "
            f"{bytes_text(chosen.cache_bytes)}; context: {chosen.max_context_len} tokens",
            f"dense batch: {chosen.dense_batch} tokens of at most {chosen.max_requests} "
            f"requests{reason}; buckets: {', '.join(chosen.plans)}"
            + ("; batch invariant" if chosen.batch_invariant else ""),
            f"plan: {_plans(chosen.plans)}; executor: {chosen.executor}",
            f"kernels: {chosen.kernels}",
        ]
    )


def _plans(by_bucket: Mapping[str, str]) -> str:
    """Which buckets run by which plan; the plan alone if all run by one."""
    names = [*dict.fromkeys(by_bucket.values())]
    if len(names) == 1:
        return names[0]
    buckets = {name: [b for b, plan in by_bucket.items() if plan == name] for name in names}
    return ", ".join(f"{name} ({' '.join(found)})" for name, found in buckets.items())
