"""What one split request did, beside what was promised of it."""

import dataclasses
import time

from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split import link, remote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promise:
    """What a plan predicted; None where it says nothing.

    Attributes:
        ttft_s: Time to the first token.
        tpot_s: Time for each further one.
        rtt_s: Round trip of the link.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    rtt_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One request as it was served.

    Attributes:
        cut: The plan that was run; None if the client ran all.
        codec: How hidden states travelled; empty if none did.
        promise: What was predicted.
        ttft_s: Time to the first token; None if there was none.
        tpot_s: Mean time of each further token; None if there was none.
        total_s: From the call to the last token.
        up_bytes: Of frames from the client.
        down_bytes: Of frames to it.
        num_steps: Steps that were sent, those sent again included.
        num_results: Results that came.
        server_s: Time that results took at the server, waiting included.
        server_first_s: Of it until the first token.
        client_s: Time that the client's engine was busy meanwhile, with other requests too.
        client_first_s: Of it until the first token.
        rtt_p50_s: Median round trip of pings; None if none came back.
        rtt_p95_s: One of twenty took longer.
        num_resumes: Times that a lost stream was taken up again.
        num_replays: Times that the server had forgotten the session and was told all anew.
    """

    cut: cut_lib.Cut | None
    codec: str
    promise: Promise
    ttft_s: float | None
    tpot_s: float | None
    total_s: float
    up_bytes: int
    down_bytes: int
    num_steps: int
    num_results: int
    server_s: float
    server_first_s: float
    client_s: float
    client_first_s: float
    rtt_p50_s: float | None
    rtt_p95_s: float | None
    num_resumes: int
    num_replays: int

    @property
    def lateness(self) -> str | None:
        """What took longer than was promised, in words; None if nothing did."""
        pairs = (
            ("time to first token", self.ttft_s, self.promise.ttft_s),
            ("time per token", self.tpot_s, self.promise.tpot_s),
            ("round trip", self.rtt_p50_s, self.promise.rtt_s),
        )
        late = [
            f"{what} {measured * 1e3:.1f} ms, {promised * 1e3:.1f} ms promised"
            for what, measured, promised in pairs
            if measured is not None and promised is not None and measured > promised
        ]
        return "; ".join(late) or None


@dataclasses.dataclass(kw_only=True)
class Record:
    """What a report is made of, while the request runs.

    Attributes:
        begun_s: When the call came, by `time.monotonic`.
        client_begun_s: How long the client's engine had been busy before.
        token_times_s: When each token came.
        server_first_s: See `Report`.
        client_first_s: See `Report`.
        num_resumes: See `Report`.
        num_replays: See `Report`.
    """

    begun_s: float
    client_begun_s: float = 0.0
    token_times_s: list[float] = dataclasses.field(default_factory=list)
    server_first_s: float = 0.0
    client_first_s: float = 0.0
    num_resumes: int = 0
    num_replays: int = 0

    def drew(self, *, server_s: float, client_busy_s: float) -> None:
        """A token came.

        Args:
            server_s: That results took at the server so far.
            client_busy_s: That the client's engine was busy so far.
        """
        if not self.token_times_s:
            self.server_first_s = server_s
            self.client_first_s = client_busy_s - self.client_begun_s
        self.token_times_s.append(time.monotonic())

    def report(
        self,
        cut: cut_lib.Cut | None,
        codec: str,
        promise: Promise,
        traffic: remote.Traffic,
        *,
        client_busy_s: float,
    ) -> Report:
        """The finished report."""
        times = self.token_times_s
        further = len(times) - 1
        return Report(
            cut=cut,
            codec=codec,
            promise=promise,
            ttft_s=times[0] - self.begun_s if times else None,
            tpot_s=(times[-1] - times[0]) / further if further > 0 else None,
            total_s=times[-1] - self.begun_s if times else 0.0,
            up_bytes=traffic.up_bytes,
            down_bytes=traffic.down_bytes,
            num_steps=traffic.num_steps,
            num_results=traffic.num_results,
            server_s=traffic.server_s,
            server_first_s=self.server_first_s,
            client_s=client_busy_s - self.client_begun_s,
            client_first_s=self.client_first_s,
            rtt_p50_s=link.percentile(traffic.rtts_s, 0.5),
            rtt_p95_s=link.percentile(traffic.rtts_s, 0.95),
            num_resumes=self.num_resumes,
            num_replays=self.num_replays,
        )
