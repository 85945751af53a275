"""Knobs of a split session's ends."""

import dataclasses

from nanoflow_jax import config
from nanoflow_jax.split import frames, messages

knob = config.knob
HEADER_BYTES = frames.FrameLimits().header_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatewaySection:
    """What a gateway grants its sessions."""

    PREFIX = "split_"

    max_sessions: int = knob(
        256, "Most sessions, those that wait for their client included.", low=1
    )
    max_len: int = knob(8192, "Most positions of a session.", low=1)
    max_rows: int = knob(256, "Most rows of one step.", low=1, high=messages.MAX_ROWS)
    credits: int = knob(4, "Steps of a session that may be under way.", low=1, high=1024)
    patience_s: float = knob(
        0.002,
        "How long rows that find the engine idle wait for those of sessions that are about to send "
        "theirs, so that they share a step; a session alone never waits.",
        low=0.0,
        high=1.0,
    )
    max_payload_bytes: int = knob(8 << 20, "Largest tensor of a frame.", low=1024, high=64 << 20)
    max_waiting_bytes: int = knob(
        256 << 20, "Rows of all sessions that wait for the engine; past it nothing is read.", low=1
    )
    max_outbox_bytes: int = knob(
        16 << 20, "Results that wait for a client; past it its rows wait.", low=1
    )
    heartbeat_s: float = knob(
        10.0, "Time between pings; who is silent for two is gone.", low=0.05, high=3600.0
    )
    lease_s: float = knob(20.0, "How long a session waits for its client to come back.", low=0.0)
    write_timeout_s: float = knob(30.0, "How long a client may take to read one frame.", low=0.05)
    retry_after_s: float = knob(1.0, "When a client that found no room may ask again.", low=0.0)
    max_fetches: int = knob(4, "Streams that weights are given on at once.", low=1, high=256)
    busy_fetch_bytes_per_s: int = knob(
        32 << 20, "Weights given per second, on all streams, while sessions are open.", low=1 << 16
    )

    def __post_init__(self) -> None:
        config.check_bounds(self, self.PREFIX)

    @property
    def frame_limits(self) -> frames.FrameLimits:
        """The largest frame that is taken."""
        return frames.FrameLimits(header_bytes=HEADER_BYTES, payload_bytes=self.max_payload_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClientSection:
    """How a client drives its sessions."""

    PREFIX = "split_client_"

    chunk_len: int = knob(
        64, "Tokens of a prompt that travel together.", low=1, high=messages.MAX_ROWS
    )
    chunks_ahead: int = knob(2, "Chunks that are computed before the first is sent.", low=1)
    connect_timeout_s: float = knob(10.0, "How long a session may take to open.", low=0.05)
    step_timeout_s: float = knob(
        60.0, "How long a result may take; then the link is lost.", low=0.05
    )
    max_attempts: int = knob(5, "How often in a row a session may be lost, or find no room.", low=1)
    backoff_s: float = knob(
        0.2, "Wait before the second attempt; twice as long before each further one.", low=0.0
    )
    max_payload_bytes: int = knob(8 << 20, "Largest tensor of a frame.", low=1024, high=64 << 20)

    def __post_init__(self) -> None:
        config.check_bounds(self, self.PREFIX)

    @property
    def frame_limits(self) -> frames.FrameLimits:
        """The largest frame that is taken."""
        return frames.FrameLimits(header_bytes=HEADER_BYTES, payload_bytes=self.max_payload_bytes)
