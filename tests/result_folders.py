"""Small result folders, of a small project with a kernel."""

import pathlib
import subprocess
from typing import Any

from nanoflow_jax.results import manifest, writer

DEVICE = manifest.Device(platform="cpu", name="Abacus 7", count=2)
SECONDS = (2.0, 2.5, 4.0)


def project(folder: pathlib.Path) -> pathlib.Path:
    """A clean checkout with a kernel that imports another file."""
    kernels = folder / "pallas_kernels"
    kernels.mkdir(parents=True)
    (kernels / "toy.py").write_text("from pallas_kernels import pieces\n")
    (kernels / "pieces.py").write_text("WIDTH = 8\n")
    (kernels / "other.py").write_text("")
    git(folder, "init", "-q")
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
        "output_tokens": 100,
        "seconds": SECONDS[number],
        "steps": 50,
        "tokens_sha256": "5e" * 32,
        "first_token_s": [0.1, 0.2],
        "per_token_s": [0.02, 0.03],
    }
    return {**made, **changes}


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
