"""Whether a device is fit: by datasheets, by what a driver says, by ceilings; and clocks."""

import dataclasses
import subprocess

import jax.numpy as jnp
import pytest

from nanoflow_jax import compat
from nanoflow_jax.bench import ceilings, clock, device_check, hardware
from nanoflow_jax.cost import datasheets
from nanoflow_jax.results import kernels

_ANSWER = (
    "NVIDIA H200, 580.159.04, 1980, 1980, 3201, 650.12, 700.00, 55, 0x0000000000000004, 900, "
    "Disabled\n"
)


def _driver(answer=_ANSWER, processes="77, 900, python\n"):
    def ask(arguments):
        assert "--id=3" in arguments
        return processes if arguments[0].startswith("--query-compute-apps") else answer

    return hardware.ask_driver(3, ask)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40 GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_a_driver_s_name_finds_the_datasheet(kind, name):
    assert datasheets.datasheet(kind).name == name


def test_a_device_that_no_datasheet_is_known_of_is_said_to_be_so():
    assert datasheets.datasheet("NVIDIA B200") is None
    found = device_check.ceiling_findings("NVIDIA B200", {})
    assert [one.ok for one in found] == [None, None]
    assert found[0].detail == (
        "NVIDIA B200 is in no table of datasheets: add it to cost/datasheets.py"
    )


def test_a_device_alone_at_its_power_limit_is_fit():
    driver = _driver()
    assert driver.raw == _ANSWER
    assert [one.line for one in device_check.driver_findings(driver)] == [
        "ok: driver: name NVIDIA H200, driver 580.159.04, SM clock, MHz 1980, its maximum, MHz "
        "1980, memory clock, MHz 3201, power, W 650.12, power limit, W 700.00, temperature, C 55, "
        "clock limits 0x0000000000000004, memory used, MiB 900, MIG Disabled",
        "ok: other processes: none",
        "ok: clocks: held down by power limit",
    ]


def test_heat_and_other_processes_are_found():
    driver = _driver(
        _ANSWER.replace("0x0000000000000004", "0x0000000000000060"), "1, 2, a\n3, 4, b\n"
    )
    _, others, clocks = device_check.driver_findings(driver)
    assert (others.ok, others.detail) == (False, "1, among 1, 2, a; 3, 4, b")
    assert (clocks.ok, clocks.detail) == (
        False,
        "held down by software thermal slowdown, hardware thermal slowdown",
    )


def test_a_driver_that_does_not_tell_of_clocks_holds_none_down():
    driver = _driver(_ANSWER.replace("0x0000000000000004", "[N/A]"), "")
    assert device_check.driver_findings(driver)[2].detail == "not held down"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (FileNotFoundError("there is no nvidia-smi"), "there is no nvidia-smi"),
        (subprocess.TimeoutExpired("nvidia-smi", 20), "timed out after 20 seconds"),
        ("NVIDIA H200, 580\n", "nvidia-smi answered with 2 values, not 11"),
    ],
)
def test_a_driver_that_says_nothing_is_not_checked(answer, message):
    def ask(arguments):
        if isinstance(answer, Exception):
            raise answer
        return answer

    found = device_check.driver_findings(hardware.ask_driver(0, ask))
    assert [one.ok for one in found] == [None, None, None]
    assert message in found[0].detail


def test_ceilings_below_the_datasheet_fail():
    speeds = {kernels.FLOPS_CEILING: 0.8 * 989.5e12, kernels.COPY_CEILING: 0.7 * 4.8e12}
    device, product, copy = device_check.ceiling_findings("NVIDIA H200", speeds)
    assert device.detail.startswith("NVIDIA H200: H200 SXM, NVIDIA H200 Tensor Core GPU datasheet")
    assert (product.ok, copy.ok) == (True, False)
    assert copy.line == ("FAILED: copy_bytes_per_s: 3.36e+12 of 4.8e+12, 70%; at least 80% wanted")


@pytest.mark.parametrize(("after", "ok"), [(1.04, True), (0.94, False), (1.06, False)])
def test_ceilings_that_drift_fail(after, ok):
    found = device_check.drift_finding({"a": 1.0, "b": 2.0}, {"a": after, "b": 2.0})
    assert found.ok is ok


def test_what_makes_a_device_unfit_is_said_apart():
    wrong = device_check.drift_finding({"a": 1.0}, {"a": 2.0})
    right = device_check.drift_finding({"a": 1.0}, {"a": 1.0})
    unknown = dataclasses.replace(wrong, ok=None)
    checked = device_check.Checked(findings=(right, wrong, unknown), ceilings={}, driver="")
    assert checked.unfit == ("drift of the ceilings: 100.0%; at most 5% wanted",)


def test_without_a_gpu_it_says_what_it_could_not_check():
    checked = device_check.check(clock.Clock())
    assert {one.ok for one in checked.findings} == {None}
    assert {one.name for one in checked.findings} >= {"driver", "clocks", "ceilings", "drift"}
    assert checked.unfit == ()
    assert checked.ceilings == {}


def test_ceilings_are_operations_and_bytes_per_second():
    class Fixed:
        def seconds(self, call, *, calls, method=None):
            call(0)
            return 0.5

    sizes = ceilings.Sizes(products=((2, 4, 8), (2, 4, 16)), num_bytes=1024)
    assert ceilings.measure(Fixed(), sizes) == {
        kernels.FLOPS_CEILING: 2 * 2 * 4 * 16 / 0.5,
        kernels.COPY_CEILING: 2 * 1024 / 0.5,
        kernels.READ_CEILING: 1024 / 0.5,
    }


def test_without_a_gpu_the_wall_clock_is_taken_and_said():
    found = clock.Clock()
    assert (found.method, found.why) == ("wall", "there is no GPU")
    assert device_check.clock_finding(found).detail == "by the wall clock: there is no GPU"
    assert found.seconds(lambda number: jnp.float32(number) + 1, calls=3) > 0


def _on_gpu(monkeypatch, device_kernels):
    class Gpu:
        platform = "gpu"

    monkeypatch.setattr(clock.jax, "devices", lambda: [Gpu()])
    monkeypatch.setattr(compat, "device_kernels", device_kernels)
    return clock.Clock()


def test_cupti_gives_the_mean_over_calls_of_all_their_kernels(monkeypatch):
    def device_kernels(launch):
        launch()
        return [("a", 0.25), ("b", 0.5)] * 2

    found = _on_gpu(monkeypatch, device_kernels)
    assert (found.method, found.why) == ("cupti", "")
    assert device_check.clock_finding(found).ok
    seen = []
    assert found.seconds(seen.append, calls=2) == 0.75
    assert seen == [0, 1]
    assert found.seconds(seen.append, calls=2, method=clock.WALL) < 0.75


def test_cupti_that_fails_or_sees_nothing_is_not_taken(monkeypatch):
    def fail(launch):
        raise RuntimeError("CUPTI is taken\nby another")

    found = _on_gpu(monkeypatch, fail)
    assert (found.method, found.why) == ("wall", "CUPTI is taken")
    found = _on_gpu(monkeypatch, lambda launch: [])
    assert (found.method, found.why) == ("wall", "CUPTI saw no kernel of a program that has one")


def test_cupti_that_sees_nothing_later_is_an_error(monkeypatch):
    found = _on_gpu(monkeypatch, lambda launch: [("a", 1.0)])
    monkeypatch.setattr(compat, "device_kernels", lambda launch: [])
    with pytest.raises(RuntimeError, match="CUPTI saw no kernel"):
        found.seconds(lambda number: None, calls=1)


def test_calls_fill_a_sample_within_bounds():
    assert clock.calls_for(1e-3, sample_s=1e-2) == 10
    assert clock.calls_for(1.0, sample_s=1e-2) == 3
    assert clock.calls_for(0.0, sample_s=1e-2) == 100


def test_rounds_go_to_and_fro():
    assert [clock.abba("ab", number) for number in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]
