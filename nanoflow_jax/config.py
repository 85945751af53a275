"""Every knob of engine and server, written once; `flags` derives the command line from it."""

import dataclasses
import enum
from typing import Any, TypeVar

_Names = TypeVar("_Names", bound=enum.StrEnum)


class Dtype(enum.StrEnum):
    """Number format that the model runs in."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class KernelUse(enum.StrEnum):
    """What an operation is made of; `engine.kernel_choice` decides."""

    AUTO = "auto"
    PLAIN = "plain"
    PALLAS = "pallas"
    INTERPRET = "interpret"
    TRITON = "triton"
    INTERPRET_TRITON = "interpret_triton"


class Executor(enum.StrEnum):
    """Who decides what of a plan runs beside what; `engine.executors` says how."""

    AUTO = "auto"
    SEQUENTIAL = "sequential"
    GRAPH = "graph"
    STREAMS = "streams"
    FUSED = "fused"


def knob(
    default: Any, help_text: str, *, low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field with a help text and inclusive bounds."""
    metadata = {"help": help_text, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and value == value and not isinstance(value, bool)
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


def check_bounds(section: Any, prefix: str) -> None:
    """Raises for a knob of another kind or outside its bounds, naming its flag."""
    for field in dataclasses.fields(section):
        value, kind = getattr(section, field.name), type(field.default)
        if kind in _KINDS and not _is_a(value, kind):
            raise ValueError(f"--{prefix}{field.name}={value!r} is not {_KINDS[kind]}")
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if (low is not None and value < low) or (high is not None and value > high):
            bound = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
            raise ValueError(f"--{prefix}{field.name}={value} is not {bound}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which model, and how it is held."""

    PREFIX = ""

    model: str = knob(
        "",
        "Model folder (Hugging Face safetensors, or converted by nanoflow_jax.convert), or "
        "preset:NAME with --random_weights. Empty: the small embedded model.",
    )
    dtype: Dtype = knob(
        Dtype.AUTO,
        "Number format to run in. auto: the checkpoint's own on GPU, float32 on CPU.",
    )
    random_weights: bool = knob(
        False, "Seeded random weights of the model's shape; prompts must be token ids."
    )
    weight_seed: int = knob(0, "Seed of --random_weights.", low=0)
    max_context_len: int = knob(
        0, "Most tokens of one request, prompt included. 0: the model's own limit.", low=0
    )

    tool_format: str = knob(
        "",
        "How the model writes calls of tools: hermes (Qwen too), llama3, mistral or mistral_args. "
        "Empty: as its chat template does.",
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSection:
    """Paged KV cache."""

    PREFIX = "cache_"

    page_size: int = knob(0, "Tokens in one page. 0: what measured best on the device.", low=0)
    num_pages: int = knob(0, "Pages in the pool. 0: from --cache_memory_fraction.", low=0)
    memory_fraction: float = knob(
        0.9,
        "Share of the free device memory that the page pool takes; on CPU, of a quarter of the "
        "host's memory. Never more than all requests at full context need.",
        low=0.01,
        high=1.0,
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSection:
    """The dense batch of one step."""

    PREFIX = ""

    max_requests: int = knob(
        0,
        "Most requests in one step. 0: 64 on CPU; on GPU as many as decode at once in a dense "
        "batch of requests of 512/512 tokens, if memory holds them.",
        low=0,
    )
    dense_batch: int = knob(
        0, "Tokens in a full step, decode rows and chunks together. 0: by device.", low=0
    )
    buckets: str = knob(
        "",
        "Compiled step shapes as TOKENS:DECODE_ROWS:PREFILL_ROWS, comma separated. "
        "Empty: a list made from --dense_batch and --max_requests.",
    )
    penalty_requests: int = knob(
        16, "Most requests in one step that use penalties; others wait.", low=1
    )
    async_scheduling: bool = knob(
        True, "Plan step i + 1 while the device runs step i. Off: one step at a time."
    )
    batch_invariant: bool = knob(
        False,
        "Tokens and logprobs of a request are the same to the last bit alone and beside any "
        "others: every step is a full dense batch, contexts are cut at fixed places, devices add "
        "in one order, and what is computed again is computed in the same way.",
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)


_KERNEL_USES = (
    "auto: the kernel where it runs, the plain path elsewhere; plain: what XLA makes of it; "
    "pallas: the kernel, or an error; interpret: the kernel, interpreted on a CPU, very slowly."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsSection:
    """What each operation of a step is made of."""

    PREFIX = "kernel_"

    gemm: KernelUse = knob(
        KernelUse.AUTO,
        "Products of the layers. auto: XLA's own everywhere. Otherwise as --kernel_grouped_gemm.",
    )
    grouped_gemm: KernelUse = knob(KernelUse.AUTO, f"Products of experts. {_KERNEL_USES}")
    decode_attention: KernelUse = knob(
        KernelUse.AUTO,
        "Attention of decode rows; as --kernel_grouped_gemm. triton: the kernel for Ampere and "
        "Ada, on Hopper too; interpret_triton: that one, interpreted on a CPU.",
    )
    prefill_attention: KernelUse = knob(
        KernelUse.AUTO, "Attention of prompt chunks; as --kernel_decode_attention."
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Devices that share the work."""

    PREFIX = ""

    tensor_parallel: int = knob(
        1, "Devices that share each layer: kv heads, feed-forward width and vocabulary.", low=1
    )
    data_parallel: int = knob(
        1,
        "Replicas of the model, each on devices of its own; requests go to the least busy.",
        low=1,
    )
    expert_parallel: bool = knob(
        False, "Whole experts on each of these devices, instead of a part of every expert."
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)


def host_and_port(flag: str, text: str, *, example: str) -> tuple[str, int]:
    """The address that a flag gives as HOST:PORT.

    Raises:
        ValueError: It is none; the message has the example.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"--{flag}={text} is not HOST:PORT, such as {example}")
    return host.strip("[]"), int(port)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesSection:
    """Processes, for good on several machines, that share one model."""

    PREFIX = ""

    coordinator: str = knob(
        "",
        "HOST:PORT at which process 0 listens for the others: an address of its machine, given to "
        "all of them alike. Whoever can reach it can join: use a network of your own.",
    )
    num_processes: int = knob(
        1,
        "Processes that share the devices of --tensor_parallel, as many of each. All are started "
        "with the same flags but --process_id; process 0 reads and writes.",
        low=1,
    )
    process_id: int = knob(0, "Which of --num_processes this is, from 0.", low=0)

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)
        if self.process_id >= self.num_processes:
            raise ValueError(
                f"--process_id={self.process_id} is none of --num_processes={self.num_processes}; "
                f"give each process a number of its own, from 0 to {self.num_processes - 1}"
            )
        if (self.num_processes > 1) != bool(self.coordinator):
            raise ValueError(
                f"--coordinator={self.coordinator} and --num_processes={self.num_processes}: "
                "several processes need the address at which process 0 listens, and one needs none"
            )
        if self.coordinator:
            self.address  # noqa: B018 (raises for what is none)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator.

        Raises:
            ValueError: It is none.
        """
        return host_and_port("coordinator", self.coordinator, example="10.0.0.1:7000")


# Plans that need no file.
NAMED_PLANS = ("one", "halves")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSection:
    """How the layers of a step are cut into nano-batches and ordered."""

    PREFIX = ""

    plan: str = knob(
        "one",
        "How layers run. one: the whole dense batch, one operation after another; halves: "
        "attention and collectives of one half beside products of the other; or a JSON file of "
        "plans, one for each size of bucket, other buckets running as with one.",
    )
    plan_watch: bool = knob(
        False,
        "Read the file of plans again when it changes: its plans are compiled while steps go on, "
        "and run from the next step after that.",
    )
    plan_min_tokens: int = knob(
        0,
        "Smallest bucket that --plan=halves cuts; bench ablation finds from where on it pays. 0: "
        "any that has tokens enough.",
        low=0,
    )
    plan_granule: int = knob(
        128, "Tokens of which nano-batches of --plan=halves are multiples.", low=1
    )

    executor: Executor = knob(
        Executor.AUTO,
        "Who runs a plan. graph: CUDA graphs whose parts wait only for what they read; "
        "streams: attention on a stream of its own; fused: one kernel for attention and the "
        "product that the plan has beside it, the rest one after another; sequential: XLA's own "
        "order, one after another. auto: graph on a GPU where a plan cuts, else sequential.",
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileSection:
    """Compilation before the first request."""

    PREFIX = "compile_"

    cache_dir: str = knob(
        "auto",
        "Folder that keeps compiled programs between runs. auto: nanoflow_jax under the user's "
        "cache folder; empty: keep none.",
    )
    threads: int = knob(0, "Programs compiled at once. 0: one per core, at most 8.", low=0)

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileSection:
    """Traces of steps for xprof."""

    PREFIX = "profile_"

    steps: int = knob(0, "Steps to record into --profile_dir, once. 0: none.", low=0)
    after: int = knob(16, "Steps before those of --profile_steps, to warm up.", low=0)
    dir: str = knob(
        "",
        "Folder of xprof traces. Empty: a server has no /start_profile and /stop_profile.",
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)
        if self.steps and not self.dir:
            raise ValueError(
                f"--profile_steps={self.steps} has no place for its trace; give --profile_dir"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """All of an engine's knobs."""

    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    cache: CacheSection = dataclasses.field(default_factory=CacheSection)
    batch: BatchSection = dataclasses.field(default_factory=BatchSection)
    kernels: KernelsSection = dataclasses.field(default_factory=KernelsSection)
    parallel: ParallelSection = dataclasses.field(default_factory=ParallelSection)
    processes: ProcessesSection = dataclasses.field(default_factory=ProcessesSection)
    plans: PlanSection = dataclasses.field(default_factory=PlanSection)
    compile: CompileSection = dataclasses.field(default_factory=CompileSection)
    profile: ProfileSection = dataclasses.field(default_factory=ProfileSection)

    def __post_init__(self) -> None:
        size, count = self.parallel.tensor_parallel, self.processes.num_processes
        if count == 1 or self.processes.process_id:  # what process 0 says is what counts
            return
        if self.parallel.data_parallel > 1:
            raise ValueError(
                f"--data_parallel={self.parallel.data_parallel} and --num_processes={count}: "
                "replicas are of one process; start a job for each, which --process_count can "
                "share out"
            )
        if size % count:
            raise ValueError(
                f"--tensor_parallel={size} cannot be shared out evenly over --num_processes={count}"
            )

    @classmethod
    def from_knobs(cls, **knobs: Any) -> "EngineConfig":
        """An engine configuration from flat names; see `from_knobs`."""
        made: EngineConfig = from_knobs(cls, **knobs)
        return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSection:
    """The HTTP server."""

    PREFIX = ""

    host: str = knob(
        "127.0.0.1",
        "Address to listen on. Everything but this machine is shut out unless it is changed; then "
        "use --api_key_file, and a proxy with TLS in front.",
    )
    port: int = knob(8000, "Port to listen on. 0: any free one.", low=0, high=65535)
    model_name: str = knob("", "Name under which clients ask for the model. Empty: the folder's.")
    api_key_file: str = knob(
        "",
        "File of API keys, one in a line; every route but /health then needs one. The environment "
        "variable NANOFLOW_API_KEY does the same for one key.",
    )
    allowed_hosts: str = knob(
        "",
        "Further host names, comma separated, by which clients may call the server. This machine's "
        "own names and plain addresses always may.",
    )
    data_dir: str = knob(
        "auto",
        "Folder of uploaded files and batches. auto: nanoflow_jax under the user's state folder; "
        "empty: no /v1/files and /v1/batches.",
    )
    max_file_bytes: int = knob(512 << 20, "Largest uploaded file.", low=1)
    max_queue: int = knob(
        1024, "Choices that are served or wait; one more is answered with 429.", low=1
    )
    max_body_bytes: int = knob(4 << 20, "Largest body of a request.", low=1024)
    max_connections: int = knob(
        4096,
        "Open connections. One more takes the place of that which has been idle for longest, or "
        "is closed at once where none is idle.",
        low=1,
    )
    read_timeout_s: float = knob(
        20.0, "A request whose head or body is not there after so long is refused.", low=0.1
    )
    write_timeout_s: float = knob(
        60.0, "A client that takes nothing of its answer for so long is dropped.", low=0.1
    )
    request_timeout_s: float = knob(
        3600.0, "Longest time from a request's arrival to its last token.", low=0.1
    )
    drain_seconds: float = knob(
        30.0, "After SIGTERM, requests in work have so long to finish.", low=0.0
    )
    max_engine_restarts: int = knob(
        3, "An engine that ends is started again, so often in ten minutes.", low=0
    )
    engine_stall_s: float = knob(
        300.0, "An engine that has requests and is silent for so long is ended.", low=1.0
    )

    def __post_init__(self) -> None:
        check_bounds(self, self.PREFIX)
        if not self.host:
            raise ValueError(
                "--host is empty; give the address to listen on: 127.0.0.1 for this machine "
                "alone, 0.0.0.0 for all that can reach it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The knobs of a server, beside its engine's."""

    server: ServerSection = dataclasses.field(default_factory=ServerSection)


def from_knobs(config_type: Any, **knobs: Any) -> Any:
    """A composed configuration from flat names as on the command line.

    Args:
        config_type: A dataclass whose fields are sections with a PREFIX.
        knobs: Flag names without dashes, such as `cache_page_size=64`.

    Raises:
        ValueError: A name is no knob, or a value is out of bounds.
    """
    sections = {}
    for field in dataclasses.fields(config_type):
        kind = section_type(field)
        names = {f"{kind.PREFIX}{f.name}": f for f in dataclasses.fields(kind)}
        taken = {}
        for name in [name for name in knobs if name in names]:
            knob_field, value = names[name], knobs.pop(name)
            if isinstance(knob_field.default, enum.StrEnum):
                value = parse_name(type(knob_field.default), value, knob_name=name)
            taken[knob_field.name] = value
        sections[field.name] = kind(**taken)
    if knobs:
        raise ValueError(
            f"{', '.join(sorted(knobs))}: no such knob; knobs are "
            f"{', '.join(knob_names(config_type))}"
        )
    return config_type(**sections)


def parse_name(kind: type[_Names], name: Any, *, knob_name: str) -> _Names:
    """The member of that name, or a ValueError that lists the names."""
    if not isinstance(name, str) or name not in list(kind):
        raise ValueError(f"{knob_name}={name!r} is not one of {', '.join(kind)}")
    return kind(name)


def section_type(field: Any) -> Any:
    """The dataclass of a section of a composed configuration."""
    return field.default_factory


def knob_names(config_type: type) -> list[str]:
    """Flag names of all knobs, in order."""
    return [
        f"{section_type(section).PREFIX}{f.name}"
        for section in dataclasses.fields(config_type)
        for f in dataclasses.fields(section_type(section))
    ]
