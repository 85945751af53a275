"""What requests showed of machines and a link, beside what their profiles promise.

Each request gives one sample of how much slower the client, the server and the link were than
predicted. Samples are averaged, later ones more: e <- (1 - w) e + w s, an exponentially weighted
moving average of weight w. One stall is no measurement of a machine: a sample of one counts as at
most four times as slow or as quick. What a request shows nothing of drifts back to what the profile
promises, so that a client whose layers were once slow, and which was then left out, is tried again.
"""

import dataclasses

from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile

_LEAST, _MOST = 0.25, 4.0  # of one sample
_DRIFT = 0.1  # of the logarithm of what was not measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What one request showed; None where it showed nothing.

    Attributes:
        client: The client's time over the predicted one.
        server: The same of the server.
        rtt_s: A round trip of the link.
        transfer: Time of bytes on the link over the predicted one.
    """

    client: float | None = None
    server: float | None = None
    rtt_s: float | None = None
    transfer: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corrections:
    """How profiles are to be changed; without samples, not at all.

    Attributes:
        client: Times as slow as its profile.
        server: The same of the server.
        rtt_s: Of the link; None as in its profile.
        transfer: Times as long as the link's profile says bytes take.
        weight: Of a sample, in (0, 1].
    """

    client: float = 1.0
    server: float = 1.0
    rtt_s: float | None = None
    transfer: float = 1.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(
                f"a sample's weight of {self.weight:g} is outside (0, 1]; 0.5 forgets half of what "
                "was with each request"
            )

    def after(self, sample: Sample, link: LinkProfile) -> "Corrections":
        """Corrections with one more sample, whose ratios are over corrected predictions.

        Args:
            sample: What it showed.
            link: As its profile has it.
        """
        before_s = link.rtt_p50_s if self.rtt_s is None else self.rtt_s
        rtt_s = self.rtt_s
        if sample.rtt_s is not None:
            rtt_s = (1 - self.weight) * before_s + self.weight * sample.rtt_s
        return dataclasses.replace(
            self,
            client=self._moved(self.client, _clipped(sample.client)),
            server=self._moved(self.server, _clipped(sample.server)),
            transfer=self._moved(self.transfer, sample.transfer),
            rtt_s=rtt_s,
        )

    def _moved(self, factor: float, ratio: float | None) -> float:
        if ratio is None:
            return factor ** (1 - _DRIFT)
        return factor * (1 - self.weight + self.weight * ratio)

    def of_client(self, profile: DeviceProfile) -> DeviceProfile:
        """The client as it is now."""
        return profile if self.client == 1 else profile.scaled(1 / self.client)

    def of_server(self, profile: DeviceProfile) -> DeviceProfile:
        """The server as it is now."""
        return profile if self.server == 1 else profile.scaled(1 / self.server)

    def of_link(self, profile: LinkProfile) -> LinkProfile:
        """The link as it is now; slow round trips are as much slower than usual ones as before."""
        rtt_s = profile.rtt_p50_s if self.rtt_s is None else self.rtt_s
        spread = profile.rtt_p95_s / profile.rtt_p50_s if profile.rtt_p50_s else 1.0
        return dataclasses.replace(
            profile,
            rtt_p50_s=rtt_s,
            rtt_p95_s=max(rtt_s * spread, profile.rtt_p95_s if self.rtt_s is None else 0.0),
            up_bytes_per_s=profile.up_bytes_per_s / self.transfer,
            up_p10_bytes_per_s=profile.up_p10_bytes_per_s / self.transfer,
            down_bytes_per_s=profile.down_bytes_per_s / self.transfer,
            down_p10_bytes_per_s=profile.down_p10_bytes_per_s / self.transfer,
        )

    def __str__(self) -> str:
        rtt = "as promised" if self.rtt_s is None else f"{self.rtt_s * 1e3:.1f} ms"
        return (
            f"client x{self.client:.2f}, server x{self.server:.2f}, bytes x{self.transfer:.2f} of "
            f"their times; round trip {rtt}"
        )


def _clipped(ratio: float | None) -> float | None:
    return None if ratio is None else min(max(ratio, _LEAST), _MOST)
