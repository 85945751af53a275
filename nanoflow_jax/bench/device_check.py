"""Whether a device is fit to be measured: alone, not slowed down, as fast as it should be."""

import dataclasses
from collections.abc import Mapping

import jax

from nanoflow_jax.bench import ceilings, hardware
from nanoflow_jax.bench import clock as clock_lib
from nanoflow_jax.cost import datasheets
from nanoflow_jax.results import kernels

# Of the datasheet. Healthy H100s and H200s, at their power limit, made 80 to 81 % of the products
# and 90 % of the bytes.
LEAST_FLOPS_FRACTION = 0.75
LEAST_BYTES_FRACTION = 0.80
MOST_DRIFT = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: Of it.
        ok: Whether it is fit; None if it could not be looked at.
        detail: What was seen, or why nothing was.
    """

    name: str
    ok: bool | None
    detail: str

    @property
    def line(self) -> str:
        """For people."""
        verdict = {True: "ok", False: "FAILED", None: "not checked"}[self.ok]
        return f"{verdict}: {self.name}: {self.detail}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A device that was looked at.

    Attributes:
        findings: In the order looked.
        ceilings: As measured; empty without a GPU.
        driver: What nvidia-smi said under load, as it came; empty if nothing.
    """

    findings: tuple[Finding, ...]
    ceilings: Mapping[str, float]
    driver: str

    @property
    def unfit(self) -> tuple[str, ...]:
        """What speaks against measuring; empty if nothing."""
        return tuple(f"{one.name}: {one.detail}" for one in self.findings if one.ok is False)


def check(clock: clock_lib.Clock, sizes: ceilings.Sizes | None = None) -> Checked:
    """Looks at the default device, in seconds.

    Args:
        clock: To measure with.
        sizes: Of what the ceilings are measured by, twice, to see whether they hold still.
    """
    device = jax.devices()[0]
    if device.platform != "gpu":
        names = ("device", "driver", "other processes", "clocks", "ceilings", "drift", "timing")
        findings = [Finding(name=name, ok=None, detail="there is no GPU") for name in names]
        return Checked(findings=tuple(findings), ceilings={}, driver="")
    first, second = (ceilings.measure(clock, sizes or ceilings.Sizes()) for _ in range(2))
    driver = hardware.ask_driver(device.local_hardware_id or 0)
    return Checked(
        findings=(
            *driver_findings(driver),
            *ceiling_findings(device.device_kind, second),
            drift_finding(first, second),
            clock_finding(clock),
        ),
        ceilings=second,
        driver="" if isinstance(driver, str) else driver.raw,
    )


def clock_finding(clock: clock_lib.Clock) -> Finding:
    """Whether times are the device's own."""
    if clock.method == clock_lib.CUPTI:
        return Finding(name="timing", ok=True, detail="by CUPTI")
    return Finding(name="timing", ok=None, detail=f"by the wall clock: {clock.why}")


def driver_findings(driver: hardware.DriverView | str) -> list[Finding]:
    """What the driver's answer says of a device under load.

    Args:
        driver: The answer, or why there is none.
    """
    if isinstance(driver, str):
        names = ("driver", "other processes", "clocks")
        return [Finding(name=name, ok=None, detail=driver) for name in names]
    seen = ", ".join(f"{name} {value}" for name, value in driver.values.items())
    limits = [*driver.slowdowns, *(["power limit"] if driver.is_power_capped else [])]
    others = max(len(driver.processes) - 1, 0)
    return [
        Finding(name="driver", ok=True, detail=seen),
        Finding(
            name="other processes",
            ok=not others,
            detail=f"{others}, among {'; '.join(driver.processes)}" if others else "none",
        ),
        Finding(
            name="clocks",
            ok=not driver.slowdowns,
            detail="held down by " + ", ".join(limits) if limits else "not held down",
        ),
    ]


def ceiling_findings(device_kind: str, found: Mapping[str, float]) -> list[Finding]:
    """How near a device comes to its datasheet."""
    sheet = datasheets.datasheet(device_kind)
    if sheet is None:
        detail = f"{device_kind} is in no table of datasheets: add it to cost/datasheets.py"
        return [Finding(name=name, ok=None, detail=detail) for name in ("device", "ceilings")]
    flops = (kernels.FLOPS_CEILING, sheet.bf16_flops, LEAST_FLOPS_FRACTION)
    copy = (kernels.COPY_CEILING, sheet.memory_bytes_per_s, LEAST_BYTES_FRACTION)
    return [
        Finding(name="device", ok=True, detail=f"{device_kind}: {sheet.name}, {sheet.source}"),
        *(
            Finding(
                name=name,
                ok=found[name] >= least * promised,
                detail=f"{found[name]:.3g} of {promised:.3g}, {found[name] / promised:.0%}; at "
                f"least {least:.0%} wanted",
            )
            for name, promised, least in (flops, copy)
        ),
    ]


def drift_finding(before: Mapping[str, float], after: Mapping[str, float]) -> Finding:
    """Whether the ceilings have held still."""
    drift = max(abs(after[name] / before[name] - 1) for name in before)
    return Finding(
        name="drift of the ceilings",
        ok=drift <= MOST_DRIFT,
        detail=f"{drift:.1%}; at most {MOST_DRIFT:.0%} wanted",
    )
