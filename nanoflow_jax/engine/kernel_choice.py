"""Decides what each operation of a step is made of: the one place that looks at the device.

A kernel stands in a table below with the devices it is made for and a check that asks the kernel
itself whether it can serve the model. Whatever is decided carries its reason, which is logged and
shown when an engine starts.
"""

import dataclasses
import enum
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nanoflow_jax import compat
from nanoflow_jax import config as config_lib
from nanoflow_jax.config import KernelUse
from nanoflow_jax.models import architecture, kernel_attention, kernel_operations


class Operation(enum.StrEnum):
    """What can be made of one thing or another; the names are those of `config.KernelsSection`."""

    GEMM = "gemm"
    GROUPED_GEMM = "grouped_gemm"
    DECODE_ATTENTION = "decode_attention"
    PREFILL_ATTENTION = "prefill_attention"


class Maker(enum.StrEnum):
    """Who makes an operation."""

    PLAIN = "plain"
    MOSAIC = "Mosaic kernel"
    TRITON = "Triton kernel"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What of a device and its jax a choice depends on.

    Attributes:
        name: Of the device, for people.
        compute_capability: Of an NVIDIA GPU; None elsewhere.
        num_sms: Of a GPU; 0 elsewhere.
        jax_version: For people.
        can_interpret: Whether this jax interprets Mosaic kernels.
        num_threads: That XLA has on this machine's CPU.
    """

    name: str
    compute_capability: tuple[int, int] | None
    num_sms: int
    jax_version: str
    can_interpret: bool
    num_threads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What of a model a choice depends on.

    Attributes:
        config: The model, or the share of it that one device has.
        dtype: What it runs in.
        page_size: Tokens in a page of its cache.
        num_devices: Devices that share it.
        by_columns: Products whose weight they share by columns; see `Placement`.
    """

    config: architecture.ModelConfig
    dtype: np.dtype[Any]
    page_size: int
    num_devices: int = 1
    by_columns: Collection[str] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What an operation is made of.

    Attributes:
        maker: Who makes it.
        reason: Why.
        interpreted: Whether its kernel is interpreted on a CPU.
    """

    maker: Maker
    reason: str
    interpreted: bool = False

    def __str__(self) -> str:
        how = ", interpreted" if self.interpreted else ""
        return f"{self.maker}{how} ({self.reason})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """What a step is made of.

    Attributes:
        by_operation: One for each operation.
        num_ctas: CTAs of a kernel that nothing runs beside.
    """

    by_operation: Mapping[Operation, Choice]
    num_ctas: int

    def __getitem__(self, operation: Operation) -> Choice:
        return self.by_operation[operation]

    def __str__(self) -> str:
        shown = (f"{name.replace('_', ' ')} {one}" for name, one in self.by_operation.items())
        return ", ".join(shown)

    @property
    def any_interpreted(self) -> bool:
        """Whether a Mosaic kernel is interpreted, which compiles programs of its own as it runs."""
        choices = self.by_operation.values()
        return any(choice.interpreted and choice.maker is Maker.MOSAIC for choice in choices)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kernel:
    """One implementation of an operation beside the plain one.

    Attributes:
        maker: Who makes it.
        majors: Compute capabilities that it is made for, by their first number.
        family: What NVIDIA calls those.
        check: Raises ValueError where it cannot serve a model.
        held_back: Why `auto` does not take it where it could; None if it does.
    """

    maker: Maker
    majors: tuple[int, ...]
    family: str
    check: Callable[[Served], None]
    held_back: str | None = None


_HOPPER: Mapping[str, Any] = {"maker": Maker.MOSAIC, "majors": (9,), "family": "Hopper"}
_BEFORE_HOPPER: Mapping[str, Any] = {
    "maker": Maker.TRITON,
    "majors": (8,),
    "family": "Ampere and Ada",
}
# In order of preference. A kernel for other devices is one more entry.
_KERNELS: Mapping[Operation, Sequence[_Kernel]] = {
    Operation.GEMM: (
        _Kernel(
            check=lambda s: kernel_operations.check_products(
                s.config, s.dtype, num_devices=s.num_devices, by_columns=s.by_columns
            ),
            held_back="cuBLASLt until a measurement or a cap on SMs asks for the kernel",
            **_HOPPER,
        ),
    ),
    Operation.GROUPED_GEMM: (
        _Kernel(check=lambda s: kernel_operations.check_experts(s.config, s.dtype), **_HOPPER),
    ),
    Operation.DECODE_ATTENTION: (
        _Kernel(
            check=lambda s: kernel_attention.check_decode(s.config, s.dtype, s.page_size),
            **_HOPPER,
        ),
        _Kernel(
            check=lambda s: kernel_attention.check_decode_triton(s.config, s.dtype, s.page_size),
            **_BEFORE_HOPPER,
        ),
    ),
    Operation.PREFILL_ATTENTION: (
        _Kernel(
            check=lambda s: kernel_attention.check_prefill(s.config, s.dtype, s.page_size),
            **_HOPPER,
        ),
        _Kernel(
            check=lambda s: kernel_attention.check_prefill_triton(s.config, s.dtype, s.page_size),
            **_BEFORE_HOPPER,
        ),
    ),
}
# Compute capabilities that kernels are compiled for in tests, by their first number.
_COMPILED_FOR: Mapping[Maker, tuple[tuple[int, ...], str]] = {
    Maker.MOSAIC: ((9,), "Hopper"),
    Maker.TRITON: ((8, 9), "Ampere and Ada and on Hopper"),
}
# XLA has a thread for each core, or NPROC; the warpgroups of an interpreted CTA need one each.
_LEAST_THREADS = 4
# Enough to see shares of work; each is a few threads.
_INTERPRETED_CTAS = 2


def machine_of(device: jax.Device) -> Machine:
    """The machine that a device is in."""
    capability = getattr(device, "compute_capability", None)
    major, _, minor = str(capability or "").partition(".")
    return Machine(
        name=device.device_kind,
        compute_capability=(int(major), int(minor)) if major.isdecimal() else None,
        num_sms=int(getattr(device, "core_count", 0) or 0),
        jax_version=jax.__version__,
        can_interpret=compat.CAN_INTERPRET_MOSAIC,
        num_threads=_num_threads(),
    )


def _num_threads() -> int:
    text = os.environ.get("NPROC", "").strip()
    return int(text) if text.isdecimal() else os.cpu_count() or 1


def num_ctas(machine: Machine) -> int:
    """CTAs of a kernel that nothing runs beside."""
    return machine.num_sms or _INTERPRETED_CTAS


def choose(
    section: config_lib.KernelsSection,
    machine: Machine,
    served: Served,
    *,
    caps_products: bool = False,
) -> Choices:
    """What each operation is made of, from the knobs, the device and the model.

    Args:
        section: The knobs.
        machine: Where it will run.
        served: What it will run.
        caps_products: Whether a plan gives products a share of the SMs only.

    Raises:
        ValueError: A kernel is asked for that cannot run here.
    """
    found = {
        operation: _choose(operation, KernelUse(getattr(section, operation)), machine, served)
        for operation in Operation
    }
    if caps_products and KernelUse(section.gemm) is KernelUse.AUTO:
        found[Operation.GEMM] = _automatic(Operation.GEMM, machine, served, is_capped=True)
    return Choices(by_operation=found, num_ctas=num_ctas(machine))


def _choose(operation: Operation, use: KernelUse, machine: Machine, served: Served) -> Choice:
    if use is KernelUse.PLAIN:
        return Choice(maker=Maker.PLAIN, reason="as asked")
    if use is KernelUse.AUTO:
        return _automatic(operation, machine, served)
    flag = f"--kernel_{operation}={use}"
    interpreted = use in (KernelUse.INTERPRET, KernelUse.INTERPRET_TRITON)
    if use is KernelUse.PALLAS:
        kernel = _made_for(operation, machine, flag)
    else:
        kernel = _made_by(
            Maker.MOSAIC if use is KernelUse.INTERPRET else Maker.TRITON, operation, flag
        )
        if interpreted:
            _check_interpreted(flag, kernel, machine)
        elif reason := _not_compiled(kernel.maker, machine):
            raise ValueError(f"{flag}: {reason}; leave the flag out")
    try:
        kernel.check(served)
    except ValueError as error:
        raise ValueError(
            f"{flag}: the kernel cannot serve this model: {error}; leave the flag out for the "
            "plain path"
        ) from error
    return Choice(maker=kernel.maker, reason="as asked", interpreted=interpreted)


def _automatic(
    operation: Operation, machine: Machine, served: Served, *, is_capped: bool = False
) -> Choice:
    if machine.compute_capability is None:
        return Choice(maker=Maker.PLAIN, reason=f"{machine.name} is no NVIDIA GPU")
    kernel = _find(operation, machine)
    if kernel is None:
        return Choice(maker=Maker.PLAIN, reason=_nothing_for(operation, machine))
    try:
        kernel.check(served)
    except ValueError as error:
        return Choice(maker=Maker.PLAIN, reason=str(error))
    if kernel.held_back is not None and not is_capped:
        return Choice(maker=Maker.PLAIN, reason=kernel.held_back)
    reason = f"{kernel.family}, capped by a plan" if is_capped else kernel.family
    return Choice(maker=kernel.maker, reason=reason)


def _find(operation: Operation, machine: Machine) -> _Kernel | None:
    major = (machine.compute_capability or (None,))[0]
    return next((k for k in _KERNELS[operation] if major in k.majors), None)


def _made_for(operation: Operation, machine: Machine, flag: str) -> _Kernel:
    kernel = _find(operation, machine)
    if kernel is None:
        raise ValueError(
            f"{flag}: {_nothing_for(operation, machine)}; leave the flag out for the plain path, "
            "or interpret the kernel with interpret"
        )
    return kernel


def _made_by(maker: Maker, operation: Operation, flag: str) -> _Kernel:
    for kernel in _KERNELS[operation]:
        if kernel.maker is maker:
            return kernel
    raise ValueError(f"{flag}: there is no {maker} for it; leave the flag out")


def _nothing_for(operation: Operation, machine: Machine) -> str:
    families = " or ".join(kernel.family for kernel in _KERNELS[operation])
    return f"the kernel is made for {families}, and this is {_described(machine)}"


def _described(machine: Machine) -> str:
    if machine.compute_capability is None:
        return machine.name
    return "{} of compute capability {}.{}".format(machine.name, *machine.compute_capability)


def _not_compiled(maker: Maker, machine: Machine) -> str | None:
    """Why a maker's kernels are not compiled for a device; None if they are."""
    majors, families = _COMPILED_FOR[maker]
    if (machine.compute_capability or (None,))[0] in majors:
        return None
    return f"the {maker} runs on {families}, and this is {_described(machine)}"


def _check_interpreted(flag: str, kernel: _Kernel, machine: Machine) -> None:
    if machine.compute_capability is not None:
        raise ValueError(f"{flag}: kernels are interpreted on a CPU only; set JAX_PLATFORMS=cpu")
    if kernel.maker is Maker.TRITON:
        return  # one XLA program on any jax
    try:
        check_interpreter(machine)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def check_interpreter(machine: Machine) -> None:
    """Raises ValueError where kernels cannot be interpreted, and says what is missing."""
    if not machine.can_interpret:
        raise ValueError(
            f"jax {machine.jax_version} cannot interpret the kernels; use jax 0.11 or newer, on "
            "Python 3.12"
        )
    if machine.num_threads < _LEAST_THREADS:
        raise ValueError(
            f"interpreted kernels wait for ever for one of fewer than {_LEAST_THREADS} threads; "
            "set NPROC=8 in the environment"
        )


def why_not(maker: Maker, machine: Machine) -> str | None:
    """What keeps a maker's kernels from a machine, on which they are interpreted if it has no GPU.

    Args:
        maker: Of kernels.
        machine: Where they should run.

    Returns:
        A reason; None if they run.
    """
    if machine.compute_capability is not None and (reason := _not_compiled(maker, machine)):
        return reason
    try:
        if maker is Maker.TRITON:
            compat.check_pallas_triton()
        elif machine.compute_capability is None:
            check_interpreter(machine)
    except ValueError as error:
        return str(error)
    return None
