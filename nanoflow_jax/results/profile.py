"""Files of profiles: how long operations of a layer take on a device, with every sample."""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from checkpoints import files
from nanoflow_jax.models import architecture
from nanoflow_jax.results import manifest, provenance

SCHEMA = 1
FOLDER = "configs/profiles"
# An empty program: what a call costs beside what it computes.
LAUNCH = "launch"
_SUFFIX = ".json"


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One operation alone on the device.

    Attributes:
        operation: Its name in `nanobatch.operations`; or `kqv`, the product of `norm_kqv` without
            its norm; `head`, the product with the vocabulary; or `LAUNCH`.
        tokens: Rows that it runs over: decode rows of decode attention, tokens of chunks of prefill
            attention.
        context: Of attention, cached tokens that each of these sees on average; else 0.
        num_ctas: SMs that it may use; None for all there are.
        tile: How a kernel cuts it, or whose program it is.
        seconds: Of a call, one a round.
    """

    operation: str
    tokens: int
    context: int = 0
    num_ctas: int | None = None
    tile: str = ""
    seconds: tuple[float, ...]


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A product and another operation side by side.

    Attributes:
        product: Its operation.
        tokens: Rows of the product.
        other: The operation beside it.
        other_tokens: Rows of that.
        context: As in `Point`.
        num_ctas: SMs of the product; the others' are the rest.
        seconds: Until both are done, one a round.
    """

    product: str
    tokens: int
    other: str
    other_tokens: int
    context: int = 0
    num_ctas: int
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that was timed of one model on one device.

    Attributes:
        schema: Of the file.
        model: Its name.
        sizes: Of the model, see `sizes_of`.
        num_devices: That share a layer.
        device: What was measured.
        num_sms: Of a GPU; None of what has no shares to give.
        memory_bytes: Of the device.
        dtype: Of weights and activations.
        method: Of timing: `cupti` or `wall`.
        date: Of the measurement.
        load: Of the host at the end: programs that wanted to run, these times too.
        command: The command line.
        versions: Of packages.
        commit: Of the code; None if it was not known.
        kernel_sources: SHA-256 of kernels that were timed, by path.
        notes: What is not there, and why.
        points: Operations alone.
        pairs: Side by side.
    """

    schema: int = SCHEMA
    model: str
    sizes: dict[str, int]
    num_devices: int = 1
    device: manifest.Device
    num_sms: int | None
    memory_bytes: int
    dtype: str
    method: str
    date: str
    load: float
    command: tuple[str, ...]
    versions: dict[str, str]
    commit: str | None
    kernel_sources: dict[str, str]
    notes: tuple[str, ...] = ()
    points: tuple[Point, ...]
    pairs: tuple[Pair, ...] = ()

    @property
    def source(self) -> str:
        """Where its times come from, for people."""
        jax = self.versions.get("jax", "of an unknown version")
        busy = ""
        if self.is_busy:
            busy = f", which was busy (load {self.load:g}; so the fastest samples count)"
        return f"measured on {self.device.name}{busy}, {self.date}, {self.dtype}, jax {jax}"

    @property
    def is_busy(self) -> bool:
        """Whether other programs took turns with what was timed."""
        return self.device.platform == "cpu" and self.load > self.device.count + 1

    def time_s(self, point: Point) -> float:
        """Of an operation alone: the median of its samples.

        On a busy machine it is the fastest, which was disturbed least: nothing makes it faster than
        it is.
        """
        return min(point.seconds) if self.is_busy else statistics.median(point.seconds)

    def check(self) -> None:
        """Refuses what nobody can have measured.

        Raises:
            ValueError: There are no points, one is there twice, or a number makes no sense.
        """
        if not self.points:
            raise ValueError("it has no points")
        seen: set[tuple[object, ...]] = set()
        measured: list[Point | Pair] = [*self.points, *self.pairs]
        for one in measured:
            key = tuple(getattr(one, field) for field in one.__struct_fields__[:-1])
            name = _name(one)
            if key in seen:
                raise ValueError(f"{name} is there twice")
            seen.add(key)
            if not one.seconds or not all(0 < s < math.inf for s in one.seconds):
                raise ValueError(f"{name} took {list(one.seconds)} seconds; wanted some above 0")
            counts = [one.tokens, *([one.other_tokens] if isinstance(one, Pair) else [])]
            if min(counts) < 1 or one.context < 0:
                raise ValueError(f"{name} has rows below 1, or a context below 0")
            if one.num_ctas is not None and not 0 < one.num_ctas <= (self.num_sms or 0):
                raise ValueError(f"{name}: {one.num_ctas} SMs of {self.num_sms} cannot be used")


def _name(one: Point | Pair) -> str:
    if isinstance(one, Pair):
        return f"{one.product} of {one.tokens} tokens beside {one.other} of {one.other_tokens}"
    return f"{one.operation} of {one.tokens} tokens"


def sizes_of(config: architecture.ModelConfig) -> dict[str, int]:
    """Of a model, what its operations' times depend on."""
    c = config
    found = {
        "num_layers": c.num_layers,
        "hidden_size": c.hidden_size,
        "num_heads": c.num_heads,
        "num_kv_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "vocab_size": c.vocab_size,
    }
    if c.moe is not None:
        found |= {
            "num_experts": c.moe.num_experts,
            "num_active": c.moe.num_active,
            "expert_size": c.moe.intermediate_size,
        }
    return found


def path_of(root: Path, device: manifest.Device, model: str) -> Path:
    """Where a profile lies among all: `DEVICE/MODEL.json`."""
    return root / device.folder / (model + _SUFFIX)


def to_json(profile: Profile) -> str:
    """A profile as text, a line for each point."""
    fields = msgspec.structs.asdict(profile)
    head = [f' "{name}": {_json(value)},' for name, value in fields.items() if name not in _LISTS]
    lists = [f' "{name}": [{_lines(fields[name])}]' for name in _LISTS]
    return "{\n" + "\n".join(head) + "\n" + ",\n".join(lists) + "\n}\n"


_LISTS = ("points", "pairs")


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=0).decode()


def _lines(rows: Iterable[Point | Pair]) -> str:
    lines = ",".join(f"\n  {_json(row)}" for row in rows)
    return lines + "\n " if lines else ""


def write(profile: Profile, path: Path) -> None:
    """Writes a profile, whole or not at all.

    Raises:
        ValueError: It cannot be written, or makes no sense.
    """
    profile.check()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path, to_json(profile).encode())
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error


def read(path: Path) -> Profile:
    """A profile that `write` wrote.

    Raises:
        ValueError: There is none, it is broken, or of another version.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"profile {path} cannot be read: {error.strerror}") from error
    try:
        schema = msgspec.json.decode(text, type=_Schema).schema
        if schema != SCHEMA:
            raise ValueError(f"its schema is {schema}, and this version reads {SCHEMA}")
        found = msgspec.json.decode(text, type=Profile)
        found.check()
    except ValueError as error:  # what msgspec raises is one
        raise ValueError(
            f"{path} is no profile of this version: {error}; measure it again with search profile"
        ) from error
    return found


class _Schema(msgspec.Struct):
    schema: int


def find(path: Path, model: str) -> Path:
    """The file of a model's profile.

    Args:
        path: The file, or a folder with one of that model in it or in a folder below.
        model: Its name.

    Raises:
        ValueError: There is none, or there are several.
    """
    if not path.is_dir():
        return path
    found = sorted({*path.glob(model + _SUFFIX), *path.glob(f"*/{model}{_SUFFIX}")})
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"--profile={path} has profiles of {model} on several devices: "
            f"{', '.join(map(str, found))}; name one"
        )
    raise ValueError(
        f"--profile={path} has no profile of {model}; measure one with search profile "
        f"--model={model}"
    )


def check_fits(
    profile: Profile,
    path: Path,
    *,
    sizes: Mapping[str, int],
    num_devices: int,
    project: Path = provenance.PROJECT,
) -> None:
    """Refuses a profile of something else.

    Args:
        profile: That was read.
        path: Where from.
        sizes: Of the model asked about.
        num_devices: That share a layer.
        project: The checkout whose kernels would run.

    Raises:
        ValueError: It is of another model, another number of devices, or of kernels that have
            changed since.
    """
    differing = [
        f"{name} {profile.sizes.get(name)} instead of {sizes.get(name)}"
        for name in sorted({*profile.sizes, *sizes})
        if profile.sizes.get(name) != sizes.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} is a profile of another model, {profile.model}: {', '.join(differing)}; "
            "measure this one with search profile"
        )
    if profile.num_devices != num_devices:
        raise ValueError(
            f"{path} is of layers that {profile.num_devices} devices share, not {num_devices}; "
            "measure with search profile --devices"
        )
    changed = provenance.changed_kernels(profile.kernel_sources, project=project)
    if changed:
        raise ValueError(
            f"{path} is stale: {', '.join(changed)} changed since {profile.date}; measure again "
            "with search profile"
        )


def by_operation(profile: Profile) -> dict[str, list[Point]]:
    """Points of each operation."""
    found: dict[str, list[Point]] = collections.defaultdict(list)
    for point in profile.points:
        found[point.operation].append(point)
    return dict(found)
