"""Small result folders, of a small project with a kernel."""

import gzip
import hashlib
import pathlib
import shutil
import subprocess
from typing import Any

import msgspec
import pytest

from nanoflow_jax.results import figures, kind, manifest, throughput, writer

DEVICE = manifest.Device(platform="cpu", name="Abacus 7", count=2)
SECONDS = (2.0, 2.5, 4.0)


def project(folder: pathlib.Path) -> pathlib.Path:
    """Makes a clean checkout with a kernel that imports another file."""
    kernels = folder / "pallas_kernels"
    kernels.mkdir(parents=True)
    (kernels / "toy.py").write_text("from pallas_kernels import pieces\n")
    (kernels / "pieces.py").write_text("WIDTH = 8\n")
    (kernels / "other.py").write_text("")
    git(folder, "init", "-q", "--template=")
    commit(folder)
    return folder


def git(folder: pathlib.Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def commit(folder: pathlib.Path) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "Change")
    return git(folder, "rev-parse", "HEAD")


def run(**changes: Any) -> manifest.Run:
    """What a throughput benchmark of three rounds sets out to do."""
    fields: dict[str, Any] = {
        "kind": "throughput",
        "name": "toy-mix",
        "device": DEVICE,
        "command": ("python", "-m", "nanoflow_jax.bench", "throughput"),
        "seed": 0,
        "num_samples": len(SECONDS),
        "kernels": ("toy",),
    }
    return manifest.Run(**{**fields, **changes})


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """Run `number` of a mix that generates 100 tokens for 60."""
    made = {
        "case": "mix",
        "round": number,
        "requests": 2,
        "input_tokens": 60,
        "asked_tokens": 100,
        "output_tokens": 100,
        "seconds": SECONDS[number],
        "steps": 50,
        "tokens_sha256": "5e" * 32,
        "first_token_s": [0.1, 0.2],
        "per_token_s": [0.02, 0.03],
    }
    return {**made, **changes}


def throughput_sample(number: int, **changes: Any) -> throughput.Sample:
    """The same, as it is read."""
    return msgspec.convert(sample(number, **changes), throughput.Sample)


def write(
    checkout: pathlib.Path,
    samples: list[dict[str, Any]] | None = None,
    *,
    before: dict[str, float] | None = None,
    after: dict[str, float] | None = None,
    **changes: Any,
) -> tuple[pathlib.Path, manifest.Manifest]:
    """Writes a result of the checkout; returns its folder and manifest."""
    root = checkout / "configs" / "results"
    with writer.ResultWriter(root, run(**changes), project=checkout) as result:
        result.set_ceilings(before=before)
        for one in [sample(i) for i in range(3)] if samples is None else samples:
            result.add_sample(one)
        result.set_ceilings(after=after)
        result.add_file("log.txt", b"all went well\n")
        return result.path, result.finish()


class ToySample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A step of a kind that is held to a ceiling."""

    case: str
    mode: str
    round: int
    step: int
    flops_per_s: float


def _toy_figures(evidence: kind.Evidence) -> list[figures.Figure]:
    values = [one.flops_per_s for one in evidence.samples]
    return [
        figures.summarise(
            "speed", "FLOP/s", values, ceiling="flops_per_s", ceilings=evidence.ceilings
        )
    ]


TOY = kind.Kind(
    name="toy",
    sample=ToySample,
    files=lambda run: frozenset({manifest.SAMPLES, manifest.TOKENS}),
    needs_ceilings=lambda run: True,
    level=lambda run: kind.Level.CPU_NUMERICS,
    figures=_toy_figures,
)


def toy_samples(**changes: Any) -> list[ToySample]:
    """Two rounds of two steps in each of two modes, ABBA."""
    order = [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    return [
        ToySample(**{"case": "x", "mode": m, "round": r, "step": s, "flops_per_s": 8.0, **changes})
        for m, r in order
        for s in range(2)
    ]


def reseal(path: pathlib.Path, **changes: Any) -> pathlib.Path:
    """Writes the manifest anew as if the run had said so: hashes, and its folder, fit again."""
    found = manifest.read(path)
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.name != manifest.MANIFEST
    }
    found = msgspec.structs.replace(found, **{"files": digests, **changes})
    (path / manifest.MANIFEST).write_bytes(manifest.encode(found))
    moved = path.parents[1] / found.folder
    if moved != path:
        path.rename(moved)
    return moved


def rewrite_samples(path: pathlib.Path, lines: list[bytes]) -> None:
    """Puts other lines in the place of a result's samples."""
    (path / manifest.SAMPLES).write_bytes(gzip.compress(b"".join(one + b"\n" for one in lines)))


@pytest.fixture(scope="session")
def first_checkout(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A small project, not to be changed."""
    return project(tmp_path_factory.mktemp("first") / "project")


@pytest.fixture
def checkout(first_checkout: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A small project to measure, of its own for each test."""
    return pathlib.Path(shutil.copytree(first_checkout, tmp_path / "project"))
