"""From knobs to a running engine: its model, cache, buckets and compiled programs."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import (
    cache_memory,
    compiler,
    engine,
    implementations,
    inputs,
    interface,
    invariance,
    kernel_choice,
    lockstep,
    model_source,
    plan_swap,
    programs,
    replicas,
    request_limit,
    runner,
    segment_inputs,
    segment_runner,
    step_choice,
    step_trace,
)
from nanoflow_jax.engine import devices as devices_lib
from nanoflow_jax.grammar import grammars
from nanoflow_jax.kv_cache import pages
from nanoflow_jax.models import architecture, loading
from nanoflow_jax.parallel import peers
from nanoflow_jax.scheduler import buckets as bucket_lib
from nanoflow_jax.scheduler import scheduler

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What measured best on a kind of device; docs/decisions.md has the measurements.

    Attributes:
        max_requests: None if it depends on the model.
    """

    page_size: int
    tile_len: int
    max_requests: int | None
    dense_batch: int


_CPU = Defaults(page_size=64, tile_len=32, max_requests=64, dense_batch=512)
_GPU = Defaults(page_size=64, tile_len=128, max_requests=None, dense_batch=2048)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a build chose, for people to read; of each replica, where there are several.

    Attributes:
        plans: Name of the plan by name of the bucket.
    """

    num_replicas: int
    device: str
    dtype: str
    model_bytes: int
    cache_bytes: int
    num_pages: int
    page_size: int
    max_requests: int
    dense_batch: int
    max_context_len: int
    plans: Mapping[str, str]
    executor: config_lib.Executor
    kernels: kernel_choice.Choices
    batch_invariant: bool = False
    max_requests_reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reports:
    """Called while a build goes on."""

    weights: Callable[[loading.Progress], None] = lambda progress: None
    settings: Callable[[Settings], None] = lambda settings: None
    program: Callable[[compiler.Compiled, int], None] = lambda compiled, total: None


def build_engine(
    config: config_lib.EngineConfig,
    source: model_source.ModelSource,
    reports: Reports | None = None,
    group: peers.Group | None = None,
) -> interface.TokenEngine:
    """Loads the model, makes the cache and compiles every program, for each replica.

    Args:
        config: The knobs.
        source: The opened model.
        reports: Called while it goes on; of the settings, which are those of each replica, once.
        group: The processes that share the model, if there are several; this is process 0, and
            the others `follow`.

    Raises:
        ValueError: The knobs do not fit each other, the model or the memory.
    """
    reports = reports or Reports()
    use_compile_cache(config.compile.cache_dir)
    if group is not None:
        lockstep.announce(group, config, model_source.fingerprint(config.model, source))
        return _engine(
            _build_parts(config, source, reports, devices_lib.shared(config), group), group
        )
    if config.processes.num_processes > 1:
        raise ValueError(
            f"--num_processes={config.processes.num_processes}: of the programs only "
            "python -m nanoflow_jax.generate runs in several processes; leave it out"
        )
    groups = devices_lib.replicas_of(config.parallel)
    first = _engine(_build_parts(config, source, reports, groups[0]))
    if len(groups) == 1:
        return first
    engines: list[interface.TokenEngine] = [first]
    quiet = dataclasses.replace(reports, settings=lambda settings: None)
    untraced = dataclasses.replace(config, profile=config_lib.ProfileSection())
    try:
        for devices in groups[1:]:
            engines.append(_engine(_build_parts(untraced, source, quiet, devices)))
    except BaseException:
        for one in engines:
            one.close()
        raise
    return replicas.Replicas(engines)


def build_in_segments(
    config: config_lib.EngineConfig,
    source: model_source.ModelSource,
    spans: Sequence[architecture.Span],
    reports: Reports | None = None,
) -> tuple[engine.Engine, np.dtype[Any]]:
    """An engine whose requests may enter and leave between segments of the model.

    Args:
        config: The knobs.
        source: The opened model.
        spans: The segments that it holds, in order; only these layers are loaded.
        reports: Called while it goes on.

    Returns:
        The engine, and the dtype of its hidden states.

    Raises:
        ValueError: As `build_engine`, or a knob is for engines that run whole models.
    """
    whole = {
        "--data_parallel": config.parallel.data_parallel > 1,
        "--num_processes": config.processes.num_processes > 1,
        "--batch_invariant": config.batch.batch_invariant,
        "--plan_watch": config.plans.plan_watch,
    }
    for name, is_set in whole.items():
        if is_set:
            raise ValueError(f"{name} is for engines that run whole models; leave it out here")
    use_compile_cache(config.compile.cache_dir)
    [devices] = devices_lib.replicas_of(config.parallel)
    parts = _build_parts(config, source, reports or Reports(), devices, spans=spans)
    return _engine(parts), parts.dtype


def follow(
    config: config_lib.EngineConfig, group: peers.Group, reports: Reports | None = None
) -> None:
    """Has its share of what process 0 builds, and runs what that runs, until its farewell.

    Args:
        config: The knobs of this process; what they say of the engine is what process 0 says.
        group: The processes; this is not process 0.
        reports: Called while the model is built.

    Raises:
        ValueError: This process has another model, or the knobs do not fit.
        JaxRuntimeError: A device of this process failed.
    """
    wanted = lockstep.awaited(group)
    if wanted is None:
        return
    own = dataclasses.replace(
        wanted.config,
        model=dataclasses.replace(wanted.config.model, model=config.model.model),
        processes=config.processes,
        compile=config.compile,
    )
    source = model_source.open_model(own.model)
    if model_source.fingerprint(own.model, source) != wanted.fingerprint:
        raise ValueError(
            f"--model={own.model.model} is not the model of process 0, or other files of it; give "
            "all processes copies of one folder"
        )
    use_compile_cache(own.compile.cache_dir)
    parts = _build_parts(own, source, reports or Reports(), devices_lib.shared(own), group)
    lockstep.follow(parts.step_runner, group)
    parts.step_runner.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """A runner, and what the host side of an engine must know of it."""

    source: model_source.ModelSource
    config: config_lib.EngineConfig
    step_runner: runner.Runner | segment_runner.SegmentRunner
    dtype: np.dtype[Any]
    spans: Sequence[architecture.Span] | None
    sizes: programs.Sizes
    buckets: Sequence[bucket_lib.Bucket]
    page_size: int
    context_len: int
    plans: plan_swap.PlanSwap | None


def defaults_of(device: jax.Device) -> Defaults:
    """What measured best on a device's kind."""
    return _CPU if device.platform == "cpu" else _GPU


def _build_parts(
    config: config_lib.EngineConfig,
    source: model_source.ModelSource,
    reports: Reports,
    devices: Sequence[jax.Device],
    group: peers.Group | None = None,
    spans: Sequence[architecture.Span] | None = None,
) -> _Parts:
    device = next(one for one in devices if one.process_index == jax.process_index())
    defaults = defaults_of(device)
    dtype = model_source.run_dtype(config.model.dtype, source.stored_dtype, device.platform)
    context = model_source.context_len(config.model, source.config)
    is_invariant = config.batch.batch_invariant
    placement = dataclasses.replace(
        loading.place_model(source.config, devices, split_experts=config.parallel.expert_parallel),
        adds_in_order=is_invariant,
    )
    page_size = min(config.cache.page_size or defaults.page_size, context)
    served = kernel_choice.Served(
        config=loading.share_of_one_device(source.config, placement),
        dtype=dtype,
        page_size=page_size,
        num_devices=placement.num_devices,
    )
    held = spans or [architecture.Span(0, source.config.num_layers)]
    num_layers = sum(stop - start for start, stop in held)
    limit = request_limit.choose(
        config.batch,
        usual=defaults.max_requests,
        dense_batch=config.batch.dense_batch or defaults.dense_batch,
        context_len=context,
        cached_tokens=lambda: cache_memory.tokens_beside_weights(
            device,
            config.cache,
            served,
            weight_bytes=loading.model_bytes(source.config, dtype, held) // placement.num_devices,
            num_layers=num_layers,
        ),
    )
    max_requests = limit.max_requests if group is None else group.least(limit.max_requests)
    dense_batch = config.batch.dense_batch or max(defaults.dense_batch, max_requests)
    if dense_batch < max_requests:
        raise ValueError(
            f"--dense_batch={dense_batch} is less than --max_requests={max_requests}: each "
            "running request needs a token of room"
        )
    bucket_list = _buckets(config.batch, max_requests, dense_batch)
    machine = kernel_choice.machine_of(device)
    shape = dataclasses.replace(source.config.layer_shape, num_devices=placement.num_devices)
    on_gpu = device.platform != "cpu"
    choose = functools.partial(
        step_choice.choose, config, bucket_list, shape, machine, served, on_gpu=on_gpu
    )
    plan_source = plan_swap.watched(config)
    chosen = choose()
    choices = chosen.kernels
    placement = placement.with_columns(chosen.by_columns, hidden_size=source.config.hidden_size)
    models = model_source.load_spans(config.model, source, dtype, placement, reports.weights, held)
    max_pages = -(-context // page_size)
    kv_layout = cache_memory.make_layout(
        placement,
        config.cache,
        served,
        most_pages=max_requests * max_pages,
        page_major=on_gpu or implementations.wants_page_major(choices),
        num_layers=num_layers,
        num_replicas=config.parallel.data_parallel,
    )
    if group is not None:  # the machine with the least memory decides
        agreed = group.least(kv_layout.shape.num_pages)
        shape_here = dataclasses.replace(kv_layout.shape, num_pages=agreed)
        kv_layout = dataclasses.replace(kv_layout, shape=shape_here)
    sizes = programs.Sizes(
        max_requests=max_requests,
        max_pages=max_pages,
        num_pages=kv_layout.shape.num_pages,
        dense_batch=dense_batch,
        vocab_size=source.config.vocab_size,
        penalty_requests=min(config.batch.penalty_requests, max_requests),
        num_devices=placement.num_devices,
        attention=implementations.attention(
            choices,
            layout=kv_layout,
            group=served.config.group_size,
            windows=served.config.distinct_windows,
            tile_len=min(defaults.tile_len, dense_batch),
            fixed_split=invariance.fixed_split(
                num_tokens=kv_layout.shape.num_pages * page_size, context_len=context
            )
            if is_invariant
            else None,
        ),
        plans=chosen.plans,
    )
    if is_invariant:
        sizes = dataclasses.replace(sizes, samplers=invariance.SAMPLERS)
    reports.settings(
        Settings(
            num_replicas=config.parallel.data_parallel,
            device=devices_lib.name(device.device_kind, config),
            dtype=dtype.name,
            model_bytes=loading.model_bytes(source.config, dtype, held),
            cache_bytes=kv_layout.shape.cache_bytes * num_layers * placement.num_devices,
            num_pages=sizes.num_pages,
            page_size=page_size,
            max_requests=max_requests,
            max_requests_reason=limit.reason,
            dense_batch=dense_batch,
            max_context_len=context,
            plans={str(bucket): plan.name for bucket, plan in chosen.plans.items()},
            executor=chosen.executor,
            kernels=choices,
            batch_invariant=is_invariant,
        )
    )
    with step_trace.programs_that_traces_know(config.profile.steps > 0):
        make = (
            functools.partial(runner.Runner, models[0])
            if spans is None
            else functools.partial(segment_runner.SegmentRunner, models)
        )
        step_runner: runner.Runner | segment_runner.SegmentRunner = make(
            kv_layout=kv_layout,
            sizes=sizes,
            bucket_list=bucket_list,
            max_context_len=context,
            placement=placement,
            threads=config.compile.threads,
            ways=chosen.ways,
            watch=compiler.CompileWatch(expects_some=choices.any_interpreted),
            progress=reports.program,
        )
    swap = None
    if plan_source is not None:
        assert isinstance(step_runner, runner.Runner), "segments keep their plans"
        swap = plan_swap.PlanSwap(
            plan_source,
            step_runner,
            choose=functools.partial(_choose_again, chosen, choose),
        )
    return _Parts(
        source=source,
        config=config,
        step_runner=step_runner,
        dtype=dtype,
        spans=spans,
        sizes=sizes,
        buckets=bucket_list,
        page_size=page_size,
        context_len=context,
        plans=swap,
    )


def _choose_again(
    running: step_choice.Chosen, choose: Callable[[], step_choice.Chosen]
) -> step_choice.Chosen:
    """What the knobs choose by now.

    Raises:
        ValueError: Nothing, or what an engine cannot change as it runs.
    """
    wanted = choose()
    step_choice.check_swap(running, wanted)
    return wanted


def _engine(parts: _Parts, group: peers.Group | None = None) -> engine.Engine:
    """The host side, over the runner of this process or those of all."""
    sizes, source = parts.sizes, parts.source
    limits = scheduler.Limits(
        max_requests=sizes.max_requests,
        dense_batch=sizes.dense_batch,
        page_size=parts.page_size,
        penalty_requests=sizes.penalty_requests,
        fixed_ways=parts.config.batch.batch_invariant,
    )
    own: runner.StepRunner = parts.step_runner
    if group is not None:
        assert isinstance(own, runner.Runner), "processes share whole models"
        own = lockstep.LeadRunner(own, group)
    return engine.Engine(
        own,
        scheduler.Scheduler(limits, parts.buckets, pages.PageAllocator(sizes.num_pages)),
        _builder(parts),
        engine.Limits(
            vocab_size=source.config.vocab_size,
            max_context_len=parts.context_len,
            eos_ids=source.eos_ids,
        ),
        grammars=_grammars(source),
        run_ahead=parts.config.batch.async_scheduling,
        trace=step_trace.StepTrace(parts.config.profile),
        plans=parts.plans,
    )


def _builder(parts: _Parts) -> inputs.StepBuilder:
    whole = inputs.InputBuilder(
        parts.sizes, page_size=parts.page_size, max_context_len=parts.context_len
    )
    if parts.spans is None:
        return whole
    return segment_inputs.SegmentInputBuilder(
        whole,
        parts.spans,
        num_layers=parts.source.config.num_layers,
        bucket_list=parts.buckets,
        hidden_size=parts.source.config.hidden_size,
        dtype=parts.dtype,
    )


def _grammars(source: model_source.ModelSource) -> grammars.Grammars | None:
    if source.folder is None or not (source.folder.path / "tokenizer.json").is_file():
        return None
    return grammars.Grammars(
        source.folder.path, vocab_size=source.config.vocab_size, eos_ids=source.eos_ids
    )


def _buckets(
    section: config_lib.BatchSection, max_requests: int, dense_batch: int
) -> tuple[bucket_lib.Bucket, ...]:
    found = (
        bucket_lib.parse_buckets(section.buckets)
        if section.buckets
        else bucket_lib.default_buckets(max_requests=max_requests, dense_batch=dense_batch)
    )
    if section.batch_invariant:
        found = invariance.one_bucket(found, asked=section.buckets)
    return bucket_lib.check_buckets(found, max_requests=max_requests, dense_batch=dense_batch)


def cache_folder(kind: str) -> pathlib.Path:
    """Where things of a kind are kept that may be deleted at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "nanoflow_jax" / kind


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs between runs, unless somebody has already set where."""
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is not None or not folder:
        return
    if folder == "auto":
        folder = str(cache_folder("programs"))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        _LOG.warning("no compilation cache in %s (%s); every start will compile", folder, error)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
