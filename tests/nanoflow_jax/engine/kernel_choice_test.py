"""What each operation is made of, on machines of every kind."""

import dataclasses
import os
import re

import jax
import numpy as np
import pytest

from nanoflow_jax import compat, config
from nanoflow_jax.engine import kernel_choice
from nanoflow_jax.engine.kernel_choice import Choice, Maker, Operation
from nanoflow_jax.models import huggingface, presets

_CPU = kernel_choice.Machine(
    name="cpu",
    compute_capability=None,
    num_sms=0,
    jax_version="0.11.2",
    can_interpret=True,
    num_threads=8,
)
_H200 = dataclasses.replace(_CPU, name="NVIDIA H200", compute_capability=(9, 0), num_sms=132)
_A100 = dataclasses.replace(_CPU, name="NVIDIA A100", compute_capability=(8, 0), num_sms=108)
_B200 = dataclasses.replace(_CPU, name="NVIDIA B200", compute_capability=(10, 0), num_sms=148)
_ATTENTION = (Operation.DECODE_ATTENTION, Operation.PREFILL_ATTENTION)
_EACH_ATTENTION = pytest.mark.parametrize("operation", _ATTENTION)
_PLAIN = {f"kernel_{operation}": "plain" for operation in Operation}


def _served(preset="llama-3-8b", *, dtype="bfloat16", page_size=64, **changes):
    read = huggingface.read_config(presets.load(preset))
    return kernel_choice.Served(
        config=dataclasses.replace(read, **changes),
        dtype=np.dtype(jax.numpy.dtype(dtype)),
        page_size=page_size,
    )


def _choose(machine, served=None, **knobs):
    section = config.EngineConfig.from_knobs(**knobs).kernels
    return kernel_choice.choose(section, machine, served or _served())


def _refuses(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_every_operation_has_a_knob_of_its_name():
    fields = [field.name for field in dataclasses.fields(config.KernelsSection)]
    assert fields == [str(operation) for operation in Operation]


@pytest.mark.parametrize("machine", [_CPU, _B200], ids=lambda machine: machine.name)
def test_elsewhere_than_on_hopper_and_before_it_all_is_plain(machine):
    found = _choose(machine, _served("mixtral-8x7b"))
    assert {choice.maker for choice in found.by_operation.values()} == {Maker.PLAIN}
    assert not any(choice.interpreted for choice in found.by_operation.values())


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (_CPU, "cpu is no NVIDIA GPU"),
        (
            _B200,
            "the kernel is made for Hopper or Ampere and Ada, and this is NVIDIA B200 of compute "
            "capability 10.0",
        ),
    ],
)
def test_the_reason_names_the_device(machine, reason):
    wanted = Choice(maker=Maker.PLAIN, reason=reason)
    assert _choose(machine)[Operation.DECODE_ATTENTION] == wanted


def test_hopper_takes_kernels_for_attention_and_experts_and_xla_for_products():
    found = _choose(_H200, _served("mixtral-8x7b"))
    for operation in (*_ATTENTION, Operation.GROUPED_GEMM):
        assert found[operation] == Choice(maker=Maker.MOSAIC, reason="Hopper")
    assert found[Operation.GEMM].maker is Maker.PLAIN
    assert found[Operation.GEMM].reason.startswith("cuBLASLt until")
    assert found.num_ctas == 132
    assert not found.any_interpreted


def test_a_plan_that_caps_products_takes_our_kernel_unless_something_else_is_asked():
    def chosen(machine, **knobs):
        section = config.EngineConfig.from_knobs(**knobs).kernels
        found = kernel_choice.choose(section, machine, _served(), caps_products=True)
        return found[Operation.GEMM]

    assert chosen(_H200).maker is Maker.MOSAIC
    assert chosen(_H200).reason == "Hopper, capped by a plan"
    assert chosen(_H200, kernel_gemm="plain").maker is Maker.PLAIN
    assert chosen(_CPU).maker is Maker.PLAIN


def test_ampere_takes_triton_kernels_for_attention_and_xla_for_the_rest():
    found = _choose(_A100, _served("mixtral-8x7b"))
    for operation in _ATTENTION:
        assert found[operation] == Choice(maker=Maker.TRITON, reason="Ampere and Ada")
    others = [found[other] for other in Operation if other not in _ATTENTION]
    assert {choice.maker for choice in others} == {Maker.PLAIN}
    assert others[0].reason == (
        "the kernel is made for Hopper, and this is NVIDIA A100 of compute capability 8.0"
    )


@_EACH_ATTENTION
def test_a_jax_without_the_triton_backend_leaves_ampere_to_xla_and_says_so(monkeypatch, operation):
    monkeypatch.setattr(compat, "plt", None)
    reason = f"jax {jax.__version__} has no Triton backend of Pallas; 0.12.0.1 still has it"
    wanted = Choice(maker=Maker.PLAIN, reason=reason)
    assert _choose(_A100)[operation] == wanted
    with _refuses(
        f"--kernel_{operation}=triton: the kernel cannot serve this model: "
        f"{reason}; leave the flag out for the plain path"
    ):
        _choose(_A100, **{f"kernel_{operation}": "triton"})


@_EACH_ATTENTION
def test_hopper_takes_the_triton_kernel_where_it_is_asked_to(operation):
    found = _choose(_H200, **{f"kernel_{operation}": "triton"})
    assert found[operation] == Choice(maker=Maker.TRITON, reason="as asked")


@_EACH_ATTENTION
@pytest.mark.parametrize(
    ("machine", "device"),
    [(_CPU, "cpu"), (_B200, "NVIDIA B200 of compute capability 10.0")],
)
def test_the_triton_kernel_is_refused_where_it_is_not_compiled_for_the_device(
    machine, device, operation
):
    with _refuses(
        f"--kernel_{operation}=triton: the Triton kernel runs on Ampere and Ada and on Hopper, "
        f"and this is {device}; leave the flag out"
    ):
        _choose(machine, **{f"kernel_{operation}": "triton"})


@pytest.mark.parametrize(
    ("maker", "machine", "reason"),
    [
        (Maker.MOSAIC, _H200, None),
        (Maker.TRITON, _H200, None),
        (Maker.TRITON, _A100, None),
        (
            Maker.MOSAIC,
            _A100,
            "the Mosaic kernel runs on Hopper, and this is NVIDIA A100 of compute capability 8.0",
        ),
        (
            Maker.TRITON,
            _B200,
            "the Triton kernel runs on Ampere and Ada and on Hopper, and this is NVIDIA B200 of "
            "compute capability 10.0",
        ),
        (Maker.MOSAIC, _CPU, None),
        (Maker.TRITON, dataclasses.replace(_CPU, can_interpret=False, num_threads=1), None),
        (
            Maker.MOSAIC,
            dataclasses.replace(_CPU, num_threads=3),
            "interpreted kernels wait for ever for one of fewer than 4 threads; set NPROC=8 in the "
            "environment",
        ),
    ],
)
def test_what_keeps_kernels_from_a_machine_is_told(maker, machine, reason):
    assert kernel_choice.why_not(maker, machine) == reason


@pytest.mark.parametrize("use", ["triton", "interpret_triton"])
def test_an_operation_without_a_triton_kernel_says_so(use):
    with _refuses(f"--kernel_gemm={use}: there is no Triton kernel for it; leave the flag out"):
        _choose(_A100, kernel_gemm=use)


@_EACH_ATTENTION
def test_any_jax_interprets_the_triton_kernel_without_compiling_as_it_runs(operation):
    machine = dataclasses.replace(_CPU, can_interpret=False, num_threads=1)
    found = _choose(machine, **{f"kernel_{operation}": "interpret_triton"})
    wanted = Choice(maker=Maker.TRITON, reason="as asked", interpreted=True)
    assert found[operation] == wanted
    assert not found.any_interpreted


@pytest.mark.parametrize(
    ("served", "operation", "reason"),
    [
        (_served(dtype="float32"), "decode_attention", "q is float32 and cache float32; both must"),
        (_served(page_size=50), "decode_attention", "page_size=50 must be at least 8 and divide"),
        (_served(head_dim=512), "decode_attention", "head_dim=512 is no multiple of 16 up to 256"),
        (_served(page_size=50), "prefill_attention", "page size 50 is none of (16, 32, 64, 128)"),
        (_served(head_dim=80), "prefill_attention", "head width 80 is none of (64, 128, 256)"),
        (
            _served(num_heads=40, num_kv_heads=2),
            "prefill_attention",
            "20 query heads for each KV head are not in 1..16; prefill with the plain path",
        ),
        (_served(), "grouped_gemm", "the model has no experts"),
        (
            _served("mixtral-8x7b", dtype="float32"),
            "grouped_gemm",
            "the kernel multiplies float32 as TF32",
        ),
        (
            _served("mixtral-8x7b", hidden_size=4100),
            "grouped_gemm",
            "a weight [229376, 4100] would be copied into [229376, 4160] in every step; the kernel "
            "wants rows in multiples of 64 elements",
        ),
        (_served(hidden_size=4100), "gemm", "a weight [6144, 4100] would be copied into"),
        (_served(dtype="float32"), "gemm", "the kernel multiplies float32 as TF32, in which"),
    ],
)
def test_a_model_that_a_kernel_cannot_serve_is_plain_for_the_kernels_own_reason(
    served, operation, reason
):
    found = _choose(_H200, served)[Operation(operation)]
    assert found.maker is Maker.PLAIN
    assert found.reason.startswith(reason)
    with pytest.raises(ValueError, match="^" + re.escape(_cannot(operation, reason))):
        _choose(_H200, served, **{f"kernel_{operation}": "pallas"})


def _cannot(operation, reason):
    return f"--kernel_{operation}=pallas: the kernel cannot serve this model: {reason}"


@pytest.mark.parametrize("preset", presets.names())
def test_every_preset_is_served_by_every_kernel(preset):
    served = _served(preset)
    asked = [op for op in Operation if op is not Operation.GROUPED_GEMM or served.config.moe]
    found = _choose(_H200, served, **{f"kernel_{operation}": "pallas" for operation in asked})
    for operation in asked:
        assert found[operation] == Choice(maker=Maker.MOSAIC, reason="as asked")


@pytest.mark.parametrize("machine", [_CPU, _H200], ids=lambda machine: machine.name)
def test_plain_is_plain_wherever_it_is_asked_for(machine):
    found = _choose(machine, **_PLAIN)
    wanted = Choice(maker=Maker.PLAIN, reason="as asked")
    assert set(found.by_operation.values()) == {wanted}


@pytest.mark.parametrize(
    ("machine", "device"),
    [(_CPU, "cpu"), (_B200, "NVIDIA B200 of compute capability 10.0")],
)
def test_a_kernel_is_refused_where_it_is_not_made_for_the_device(machine, device):
    with _refuses(
        f"--kernel_gemm=pallas: the kernel is made for Hopper, and this is {device}; leave the "
        "flag out for the plain path, or interpret the kernel with interpret"
    ):
        _choose(machine, kernel_gemm="pallas")


@pytest.mark.parametrize("operation", Operation)
def test_a_cpu_interprets_what_it_is_asked_to(operation):
    found = _choose(_CPU, _served("mixtral-8x7b"), **{f"kernel_{operation}": "interpret"})
    assert found[operation] == Choice(maker=Maker.MOSAIC, reason="as asked", interpreted=True)
    assert found.any_interpreted
    others = [found[other] for other in Operation if other is not operation]
    assert {choice.maker for choice in others} == {Maker.PLAIN}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"can_interpret": False, "jax_version": "0.10.2"},
            "jax 0.10.2 cannot interpret the kernels; use jax 0.11 or newer, on Python 3.12",
        ),
        (
            {"num_threads": 3},
            "interpreted kernels wait for ever for one of fewer than 4 threads; set NPROC=8 in "
            "the environment",
        ),
        (
            {"compute_capability": (9, 0)},
            "kernels are interpreted on a CPU only; set JAX_PLATFORMS=cpu",
        ),
    ],
)
def test_what_an_interpreter_lacks_is_said(changes, message):
    machine = dataclasses.replace(_CPU, **changes)
    with _refuses(f"--kernel_decode_attention=interpret: {message}"):
        _choose(machine, kernel_decode_attention="interpret")


def test_a_model_that_cannot_be_interpreted_either_is_refused():
    with _refuses(
        "--kernel_prefill_attention=interpret: the kernel cannot serve this model: page size 50 is "
        "none of (16, 32, 64, 128); leave the flag out for the plain path"
    ):
        _choose(_CPU, _served(page_size=50), kernel_prefill_attention="interpret")


def test_choices_are_shown_with_their_reasons():
    shown = str(_choose(_CPU, kernel_gemm="interpret", kernel_prefill_attention="plain"))
    assert shown == (
        "gemm Mosaic kernel, interpreted (as asked), grouped gemm plain (cpu is no NVIDIA GPU), "
        "decode attention plain (cpu is no NVIDIA GPU), prefill attention plain (as asked)"
    )


def test_the_machine_is_described_as_it_is(monkeypatch):
    monkeypatch.setenv("NPROC", "5")
    found = kernel_choice.machine_of(jax.devices("cpu")[0])
    assert found == kernel_choice.Machine(
        name="cpu",
        compute_capability=None,
        num_sms=0,
        jax_version=jax.__version__,
        can_interpret=compat.CAN_INTERPRET_MOSAIC,
        num_threads=5,
    )


@pytest.mark.parametrize("text", ["", "all", "-3"])
def test_what_is_no_number_of_threads_stops_no_start(monkeypatch, text):
    monkeypatch.setenv("NPROC", text)
    found = kernel_choice.machine_of(jax.devices("cpu")[0])
    assert found.num_threads == os.cpu_count()


@dataclasses.dataclass
class _Device:
    device_kind: str
    compute_capability: str
    core_count: int = 132


@pytest.mark.parametrize(
    ("capability", "wanted"), [("9.0", (9, 0)), ("10.3", (10, 3)), ("gfx942", None)]
)
def test_a_gpu_is_described_by_its_compute_capability(capability, wanted):
    found = kernel_choice.machine_of(_Device("a GPU", capability))
    assert (found.name, found.compute_capability, found.num_sms) == ("a GPU", wanted, 132)
