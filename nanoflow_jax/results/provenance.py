"""What code and what machine a result comes from."""

import ast
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from nanoflow_jax.results.manifest import Device, Origin

PROJECT = Path(__file__).resolve().parents[2]
_PACKAGES = (
    "nanoflow_jax",
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime",
    "nvidia-cublas-cu12",
    "nvidia-cublas",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "numpy",
    "torch",
    "tokamax",
    "flashinfer-python",
)
# Places on a machine are left out.
_VARIABLES = re.compile(r"(JAX|XLA)_(?!\w*DIR$)\w+|NPROC|CUDA_VISIBLE_DEVICES")
_KERNELS = "pallas_kernels"
RESULTS = "configs/results"  # the committed results, which are written while the tree is clean


def collect(kernels: Iterable[str], *, project: Path = PROJECT) -> Origin:
    """The origin of a result that begins now.

    Args:
        kernels: Modules of pallas_kernels that it uses; what they import is found.
        project: The checkout.
    """
    commit = _commit(project)
    return Origin(
        commit=commit,
        is_clean=commit is not None and not _changes(project),
        kernel_sources=kernel_sources(kernels, project=project),
        versions=_versions(),
        environment={k: v for k, v in sorted(os.environ.items()) if _VARIABLES.fullmatch(k)},
    )


def kernel_sources(kernels: Iterable[str], *, project: Path = PROJECT) -> dict[str, str]:
    """SHA-256 of kernel modules and of what they import from pallas_kernels, by path.

    Raises:
        ValueError: There is no such module.
    """
    found: dict[str, str] = {}
    left = sorted(kernels)
    while left:
        module = left.pop()
        path = f"{_KERNELS}/{module}.py"
        if path in found:
            continue
        try:
            source = (project / path).read_bytes()
        except OSError as error:
            raise ValueError(f"{path} is no kernel: {error.strerror}") from error
        found[path] = hashlib.sha256(source).hexdigest()
        left += _imported(source)
    return dict(sorted(found.items()))


def changed_kernels(sources: Mapping[str, str], *, project: Path = PROJECT) -> list[str]:
    """Paths of kernel sources that are no longer what they were.

    Args:
        sources: What `kernel_sources` found.
        project: The checkout.
    """
    changed = []
    for path, digest in sources.items():
        file = project / path
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            changed.append(path)
    return changed


def _imported(source: bytes) -> list[str]:
    """Modules of pallas_kernels that a module of it imports."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == _KERNELS:
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_KERNELS}."):
            found.append(str(node.module).removeprefix(f"{_KERNELS}."))
        elif isinstance(node, ast.Import):
            names = [name.name for name in node.names if name.name.startswith(f"{_KERNELS}.")]
            found += [name.removeprefix(f"{_KERNELS}.") for name in names]
    return found


def processor() -> Device:
    """The CPU at hand, with the cores that this process may use."""
    name = platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return Device(platform="cpu", name=found[1].strip() if found else name, count=cores or 1)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if driver:
        found["driver"] = driver.splitlines()[0].strip()
    return found


def _commit(project: Path) -> str | None:
    """The checkout's commit; None if this is not a checkout of its own."""
    top = _said(["git", "-C", str(project), "rev-parse", "--show-toplevel"])
    if top is None or Path(top.strip()).resolve() != project.resolve():
        return None
    head = _said(["git", "-C", str(project), "rev-parse", "HEAD"])
    return None if head is None else head.strip()


def _changes(project: Path) -> str:
    """Changed and unknown files of the checkout, results apart."""
    command = ["git", "-C", str(project), "status", "--porcelain", "--untracked-files=all", "--"]
    said = _said([*command, ".", f":(exclude){RESULTS}"])
    return "git status failed" if said is None else said


def _said(command: list[str]) -> str | None:
    """What a program wrote; None if it is not there or failed."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout if done.returncode == 0 else None
