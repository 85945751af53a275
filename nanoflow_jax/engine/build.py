"""From knobs to a running engine: model folder, dtype, cache, buckets, compiled programs."""

import dataclasses
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import folder as checkpoint_folder
from nanoflow_jax import config as config_lib
from nanoflow_jax.engine import (
    collective_caps,
    compiler,
    engine,
    executors,
    implementations,
    inputs,
    interface,
    invariance,
    kernel_choice,
    lockstep,
    plan_choice,
    programs,
    replicas,
    runner,
    step_trace,
)
from nanoflow_jax.grammar import grammars
from nanoflow_jax.kv_cache import layout as layout_lib
from nanoflow_jax.kv_cache import pages
from nanoflow_jax.models import architecture, huggingface, loading, presets, transformer
from nanoflow_jax.nanobatch.plan import Plan
from nanoflow_jax.parallel import peers
from nanoflow_jax.parallel import placement as placement_lib
from nanoflow_jax.scheduler import buckets as bucket_lib
from nanoflow_jax.scheduler import scheduler

_LOG = logging.getLogger(__name__)
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PRESET = "preset:"
# Of the host's memory, for a cache whose size nobody chose: others live there too.
_HOST_SHARE = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaults:
    """What measured best on a kind of device; docs/decisions.md has the measurements."""

    page_size: int
    tile_len: int
    max_requests: int
    dense_batch: int


_CPU = Defaults(page_size=64, tile_len=32, max_requests=64, dense_batch=512)
_GPU = Defaults(page_size=64, tile_len=128, max_requests=256, dense_batch=2048)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSource:
    """An opened model, weights not read yet.

    Attributes:
        config: Its shape.
        folder: Where it came from; None for a preset.
        eos_ids: End-of-text tokens of both config files.
        stored_dtype: Number format of the checkpoint.
    """

    config: architecture.ModelConfig
    folder: checkpoint_folder.ModelFolder | None
    eos_ids: frozenset[int]
    stored_dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a build chose, for people to read; of each replica, where there are several."""

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
    buckets: tuple[str, ...]
    kernels: kernel_choice.Choices
    batch_invariant: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reports:
    """Called while a build goes on."""

    weights: Callable[[loading.Progress], None] = lambda progress: None
    settings: Callable[[Settings], None] = lambda settings: None
    program: Callable[[compiler.Compiled, int], None] = lambda compiled, total: None


def embedded_folder() -> pathlib.Path:
    """The small model that comes with the package."""
    return pathlib.Path(str(resources.files("checkpoints"))) / "embedded"


def _download_advice(name: str) -> str:
    if _HUB_NAME.fullmatch(name) is None:
        return "; give the path of a model folder, or a name as on Hugging Face: OWNER/MODEL"
    folder = name.split("/")[-1]
    return (
        ". To download a model from Hugging Face:\n"
        f"  pip install huggingface_hub && hf download {name} --local-dir {folder}\n"
        f"then use --model={folder}"
    )


def open_model(section: config_lib.ModelSection) -> ModelSource:
    """Finds and checks the model that the knobs name, without reading weights.

    Raises:
        ValueError: It is no folder, not supported, damaged, or a preset without random weights.
    """
    name = section.model
    if name.startswith(_PRESET):
        if not section.random_weights:
            raise ValueError(
                f"--model={name} is a shape without weights; add --random_weights, or name a folder"
            )
        raw = presets.load(name.removeprefix(_PRESET))
        return ModelSource(
            config=huggingface.read_config(raw),
            folder=None,
            eos_ids=frozenset(),
            stored_dtype=_stored_dtype(raw),
        )
    path = pathlib.Path(name) if name else embedded_folder()
    if not path.is_dir():
        raise ValueError(f"--model={name} is no folder{_download_advice(name)}")
    folder = checkpoint_folder.ModelFolder.open(path)
    config = huggingface.read_config(folder.config)
    return ModelSource(
        config=config,
        folder=folder,
        eos_ids=_eos_ids(folder, config.vocab_size),
        stored_dtype=_stored_dtype(folder.config),
    )


def _eos_ids(folder: checkpoint_folder.ModelFolder, vocab_size: int) -> frozenset[int]:
    named = loading.eos_ids(folder.config, folder.generation_config)
    found = frozenset(token for token in named if token < vocab_size)
    if len(found) < len(named):
        _LOG.warning(
            "end-of-text ids %s of %s are outside the vocabulary of %d and are left out",
            sorted(set(named) - found),
            folder.path,
            vocab_size,
        )
    if len(found) > programs.MAX_EOS_IDS:
        raise ValueError(
            f"{folder.path} names {len(found)} end-of-text ids, more than {programs.MAX_EOS_IDS}; "
            "name fewer in generation_config.json and config.json"
        )
    return found


def _stored_dtype(raw: Mapping[str, Any]) -> str:
    return str(raw.get("dtype") or raw.get("torch_dtype") or "float32")


def run_dtype(choice: config_lib.Dtype, stored: str, platform: str) -> np.dtype[Any]:
    """The number format to run in.

    CPUs without bfloat16 products emulate them at a tenth of the speed, so auto means float32
    there; float16 checkpoints run as bfloat16, which has the range that float16 lacks.
    """
    if choice == config_lib.Dtype.AUTO:
        wide = platform == "cpu" or stored == "float32"
        choice = config_lib.Dtype.FLOAT32 if wide else config_lib.Dtype.BFLOAT16
    return np.dtype(jnp.float32 if choice == config_lib.Dtype.FLOAT32 else jnp.bfloat16)


def build_engine(
    config: config_lib.EngineConfig,
    source: ModelSource,
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
        lockstep.announce(group, config, _fingerprint(config.model, source))
        return _engine(_build_parts(config, source, reports, _shared_devices(config), group), group)
    if config.processes.num_processes > 1:
        raise ValueError(
            f"--num_processes={config.processes.num_processes}: of the programs only "
            "python -m nanoflow_jax.generate runs in several processes; leave it out"
        )
    groups = _device_groups(config.parallel)
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
    source = open_model(own.model)
    if _fingerprint(own.model, source) != wanted.fingerprint:
        raise ValueError(
            f"--model={own.model.model} is not the model of process 0, or other files of it; give "
            "all processes copies of one folder"
        )
    use_compile_cache(own.compile.cache_dir)
    parts = _build_parts(own, source, reports or Reports(), _shared_devices(own), group)
    lockstep.follow(parts.step_runner, group)
    parts.step_runner.close()


def _fingerprint(section: config_lib.ModelSection, source: ModelSource) -> str:
    if section.random_weights or source.folder is None:
        return hashlib.sha256(repr(source.config).encode()).hexdigest()
    return source.folder.fingerprint()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Parts:
    """A runner, and what the host side of an engine must know of it."""

    source: ModelSource
    config: config_lib.EngineConfig
    step_runner: runner.Runner
    sizes: programs.Sizes
    buckets: Sequence[bucket_lib.Bucket]
    page_size: int
    context_len: int


def defaults_of(device: jax.Device) -> Defaults:
    """What measured best on a device's kind."""
    return _CPU if device.platform == "cpu" else _GPU


def _build_parts(
    config: config_lib.EngineConfig,
    source: ModelSource,
    reports: Reports,
    devices: Sequence[jax.Device],
    group: peers.Group | None = None,
) -> _Parts:
    device = next(one for one in devices if one.process_index == jax.process_index())
    defaults = defaults_of(device)
    dtype = run_dtype(config.model.dtype, source.stored_dtype, device.platform)
    context = context_len(config.model, source.config)
    asked = config.batch.dense_batch
    max_requests = config.batch.max_requests or min(
        defaults.max_requests, asked or defaults.max_requests
    )
    dense_batch = asked or max(defaults.dense_batch, max_requests)
    if dense_batch < max_requests:
        raise ValueError(
            f"--dense_batch={dense_batch} is less than --max_requests={max_requests}: each "
            "running request needs a token of room"
        )
    is_invariant = config.batch.batch_invariant
    bucket_list = _buckets(config.batch, max_requests, dense_batch)
    placement = dataclasses.replace(
        loading.place_model(source.config, devices, split_experts=config.parallel.expert_parallel),
        adds_in_order=is_invariant,
    )
    page_size = min(config.cache.page_size or defaults.page_size, context)
    served = kernel_choice.Served(
        config=loading.share_of_one_device(source.config, placement),
        dtype=dtype,
        page_size=page_size,
    )
    machine = kernel_choice.machine_of(device)
    shape = dataclasses.replace(source.config.layer_shape, num_devices=placement.num_devices)
    plans = plan_choice.choose(
        config.plans, bucket_list, shape, num_sms=kernel_choice.num_ctas(machine)
    )
    if is_invariant:
        invariance.check_plans(plans)
    placement = placement.with_columns(
        plan_choice.by_columns(plans.values()), hidden_size=source.config.hidden_size
    )
    served = dataclasses.replace(
        served, num_devices=placement.num_devices, by_columns=placement.by_columns
    )
    executor = executors.choose(
        config.plans.executor,
        plans.values(),
        on_gpu=device.platform != "cpu",
        interprets=config.kernels.gemm == config_lib.KernelUse.INTERPRET,
    )
    choices = kernel_choice.choose(
        config.kernels,
        machine,
        served,
        caps_products=executors.caps_products(plans.values()),
    )
    operations = executors.operations(executor, choices, served.config)
    model = load_weights(config.model, source, dtype, placement, reports)
    max_pages = -(-context // page_size)
    kv_layout = make_layout(
        placement,
        config.cache,
        served,
        most_pages=max_requests * max_pages,
        page_major=device.platform != "cpu" or implementations.wants_page_major(choices),
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
        plans=plans,
    )
    if is_invariant:
        sizes = dataclasses.replace(sizes, samplers=invariance.SAMPLERS)
    reports.settings(
        Settings(
            num_replicas=config.parallel.data_parallel,
            device=_device_name(device.device_kind, config),
            dtype=dtype.name,
            model_bytes=loading.model_bytes(source.config, dtype),
            cache_bytes=kv_layout.shape.cache_bytes
            * source.config.num_layers
            * placement.num_devices,
            num_pages=sizes.num_pages,
            page_size=page_size,
            max_requests=max_requests,
            dense_batch=dense_batch,
            max_context_len=context,
            buckets=tuple(str(b) for b in bucket_list),
            kernels=choices,
            batch_invariant=is_invariant,
        )
    )
    with step_trace.programs_that_traces_know(config.profile):
        step_runner = runner.Runner(
            model,
            kv_layout=kv_layout,
            sizes=sizes,
            bucket_list=bucket_list,
            max_context_len=context,
            placement=placement,
            threads=config.compile.threads,
            executor=executor,
            options=_options(plans, is_invariant=is_invariant, on_gpu=device.platform != "cpu"),
            operations=operations,
            watch=compiler.CompileWatch(expects_some=choices.any_interpreted),
            progress=reports.program,
        )
    return _Parts(
        source=source,
        config=config,
        step_runner=step_runner,
        sizes=sizes,
        buckets=bucket_list,
        page_size=page_size,
        context_len=context,
    )


def _options(
    plans: Mapping[bucket_lib.Bucket, Plan], *, is_invariant: bool, on_gpu: bool
) -> dict[bucket_lib.Bucket, Mapping[str, Any]]:
    """What XLA is told of each bucket's forward, whoever runs its plan."""
    common = invariance.compiler_options(plans.values()) if is_invariant else {}
    is_capped = collective_caps.can_cap(plans.values(), on_gpu=on_gpu)
    return {
        bucket: {**common, **(collective_caps.compiler_options(plan) if is_capped else {})}
        for bucket, plan in plans.items()
    }


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
    own = parts.step_runner
    return engine.Engine(
        own if group is None else lockstep.LeadRunner(own, group),
        scheduler.Scheduler(limits, parts.buckets, pages.PageAllocator(sizes.num_pages)),
        inputs.InputBuilder(sizes, page_size=parts.page_size, max_context_len=parts.context_len),
        engine.Limits(
            vocab_size=source.config.vocab_size,
            max_context_len=parts.context_len,
            eos_ids=source.eos_ids,
        ),
        grammars=_grammars(source),
        run_ahead=parts.config.batch.async_scheduling,
        trace=step_trace.StepTrace(parts.config.profile),
    )


def _grammars(source: ModelSource) -> grammars.Grammars | None:
    if source.folder is None or not (source.folder.path / "tokenizer.json").is_file():
        return None
    return grammars.Grammars(
        source.folder.path, vocab_size=source.config.vocab_size, eos_ids=source.eos_ids
    )


def context_len(section: config_lib.ModelSection, config: architecture.ModelConfig) -> int:
    """Most tokens of one request, prompt included.

    Raises:
        ValueError: More is asked for than the model has.
    """
    asked = section.max_context_len
    if asked > config.max_context_len:
        raise ValueError(
            f"--max_context_len={asked} is more than the model's {config.max_context_len}"
        )
    return asked or config.max_context_len


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


def load_weights(
    section: config_lib.ModelSection,
    source: ModelSource,
    dtype: np.dtype[Any],
    placement: placement_lib.Placement,
    reports: Reports,
) -> transformer.Transformer:
    """The model with its weights on its devices, random ones where they are asked for."""
    if section.random_weights or source.folder is None:
        return loading.random_model(
            source.config,
            seed=section.weight_seed,
            dtype=dtype,
            placement=placement,
            progress=reports.weights,
        )
    return loading.load_model(
        source.folder, source.config, dtype=dtype, placement=placement, progress=reports.weights
    )


def _device_groups(section: config_lib.ParallelSection) -> list[list[jax.Device]]:
    """The devices of each replica."""
    found, size = jax.devices(), section.tensor_parallel
    wanted = size * section.data_parallel
    if wanted > len(found):
        raise ValueError(
            f"--tensor_parallel={size} and --data_parallel={section.data_parallel} need {wanted} "
            f"devices and there are {len(found)}; on a CPU "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes as many"
        )
    return [found[i : i + size] for i in range(0, wanted, size)]


def _shared_devices(config: config_lib.EngineConfig) -> list[jax.Device]:
    """As many devices of each process, in their order."""
    size, count = config.parallel.tensor_parallel, config.processes.num_processes
    if config.parallel.data_parallel > 1:
        raise ValueError(
            f"--data_parallel={config.parallel.data_parallel} and --num_processes={count}: "
            "replicas are of one process; start a job for each, which --process_count can share out"
        )
    if size % count:
        raise ValueError(
            f"--tensor_parallel={size} cannot be shared out evenly over --num_processes={count}"
        )
    found: list[jax.Device] = []
    for i in range(count):
        own = [device for device in jax.devices() if device.process_index == i]
        if len(own) < size // count:
            raise ValueError(
                f"--tensor_parallel={size} needs {size // count} devices of each of "
                f"--num_processes={count}, and process {i} has {len(own)}"
            )
        found += own[: size // count]
    return found


def _device_name(kind: str, config: config_lib.EngineConfig) -> str:
    section, count = config.parallel, config.processes.num_processes
    name = kind if section.tensor_parallel == 1 else f"{section.tensor_parallel} x {kind}"
    name += "" if count == 1 else f" in {count} processes"
    replicas_of = "" if section.data_parallel == 1 else f"{section.data_parallel} replicas, each "
    return replicas_of + name


def make_layout(
    placement: placement_lib.Placement,
    section: config_lib.CacheSection,
    served: kernel_choice.Served,
    *,
    most_pages: int,
    page_major: bool,
    num_replicas: int,
) -> layout_lib.PageMajorLayout | layout_lib.TokenMinorLayout:
    """The cache of one layer: as many pages as memory allows and all requests could use.

    Each device has some kv heads of every page.
    """
    local = placement.mesh.local_devices
    device = local[0]
    kind = layout_lib.PageMajorLayout if page_major else layout_lib.TokenMinorLayout
    shape = layout_lib.CacheShape(
        num_pages=1,
        page_size=served.page_size,
        num_kv_heads=served.config.num_kv_heads,
        head_dim=served.config.head_dim,
        dtype=served.dtype,
    )
    num_pages, page_bytes = section.num_pages, shape.page_bytes * served.config.num_layers
    # The host's memory is one, however many devices it plays.
    sharers = len(local) * num_replicas if device.platform == "cpu" else 1
    free = _free_bytes(device) // sharers
    if not num_pages:
        share = _HOST_SHARE if device.platform == "cpu" else 1.0
        room = int(free * share * section.memory_fraction)
        num_pages = min(most_pages, room // page_bytes)
    if num_pages * page_bytes > free:
        raise ValueError(
            f"--cache_num_pages={num_pages} needs {num_pages * page_bytes} bytes and {free} are "
            f"free; ask for at most {free // page_bytes}, or leave it out for as many as fit"
        )
    if num_pages < 1:
        raise ValueError(
            "no memory for a single page of the KV cache; use a smaller model, "
            "--dtype=bfloat16, or raise --cache_memory_fraction"
        )
    return kind(shape=dataclasses.replace(shape, num_pages=num_pages))


def _free_bytes(device: jax.Device) -> int:
    """What is free on a GPU; the host's memory on CPU."""
    stats = device.memory_stats()
    if stats is not None and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs between runs, unless somebody has already set where."""
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is not None or not folder:
        return
    if folder == "auto":
        base = os.environ.get("XDG_CACHE_HOME") or str(pathlib.Path.home() / ".cache")
        folder = os.path.join(base, "nanoflow_jax", "programs")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        _LOG.warning("no compilation cache in %s (%s); every start will compile", folder, error)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
