"""What the front process and the engine process say to each other.

Both ends run the same version of this file: the front starts the engine's process.
"""

import msgspec

from nanoflow_jax import config as config_lib
from nanoflow_jax import request as request_lib
from nanoflow_jax.batch import record


class Start(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The first message to the engine: load this and compile."""

    config: config_lib.EngineConfig


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request.

    Attributes:
        request_id: Never used before on this socket.
        prompt_ids: Token ids.
        params: Its seed is set.
        priority: Lower runs first.
        stream: Whether tokens are wanted as they come; without, only the finished request is.
        sent_s: When, by the clock that all processes of a machine share.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: request_lib.SamplingParams
    priority: int
    stream: bool
    sent_s: float


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Drops a request, if it is still there. Nothing more is said of it, or little."""

    request_id: str


class StartTrace(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Begins to record what the device does, for xprof."""

    folder: str


class StopTrace(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Writes what was recorded."""


class Drain(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The server is about to stop: no new sessions are opened; those that are open go on."""


class Leave(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last message to the engine: its process tells sessions that are left, and ends."""


ToEngine = Start | Submit | Abort | StartTrace | StopTrace | Drain | Leave


class Said(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A line for people about the start: loading, settings, compiling."""

    text: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine takes requests from now on.

    Attributes:
        device: Its name.
        dtype: Number format the model runs in.
        vocab_size: V.
        eos_ids: End-of-text tokens.
        max_context_len: Most tokens of one request.
        max_requests: Most requests in one step.
        dense_batch: Tokens in a full step.
        num_pages: Pages of the cache.
        page_size: Tokens in one page.
        identity: What a batch job must know of the model.
        sessions_at: HOST:PORT where split sessions are opened; empty if nowhere.
    """

    device: str
    dtype: str
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_context_len: int
    max_requests: int
    dense_batch: int
    num_pages: int
    page_size: int
    identity: record.ModelIdentity
    sessions_at: str = ""


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request was not taken in; the message is for its sender.

    Attributes:
        request_id: As submitted.
        message: Why.
        is_of_grammar: Whether it is about the request's grammar.
    """

    request_id: str
    message: str
    is_of_grammar: bool = False


class Load(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How busy the engine is after a step; tokens, steps and what follows count from its start.

    Attributes:
        running: Requests in the dense batch.
        waiting: Requests that wait for room.
        pages_used: Pages held.
        decode_tokens: Decode rows run.
        prefill_tokens: Tokens of prompt chunks run.
        generated_tokens: Tokens given to requests.
        steps: Steps launched.
        preemptions: How often a request lost its pages.
        late_compiles: Programs compiled inside a step; anything but 0 is a defect.
        cpu_s: Processor time of the engine's process.
        failed_steps: Steps that the device gave up.
        sessions: Split sessions that are open, those that wait for their client included.
    """

    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    decode_tokens: int = 0
    prefill_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    preemptions: int = 0
    late_compiles: int = 0
    cpu_s: float = 0.0
    failed_steps: int = 0
    sessions: int = 0


class Times(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How a request went, for statistics; all seconds count from its sending by the front.

    Attributes:
        started_s: Until its prompt began to run, if it gave a token.
        first_token_s: Until its first token, of any choice, if it gave one.
        end_s: Until its last.
        num_tokens: Generated for all its choices.
        reasons: Why each choice ended.
    """

    started_s: float | None
    first_token_s: float | None
    end_s: float
    num_tokens: int
    reasons: tuple[str, ...]


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What one step gave.

    Attributes:
        scored: Prompts whose log-probabilities are complete.
        deltas: New tokens of requests that stream.
        completions: Finished requests, without their prompt ids; those that stream without
            choices and prompt log-probabilities too, since deltas told these.
        times: Of each completion, in the same order.
        load: How busy the engine is.
    """

    scored: tuple[request_lib.ScoredPrompt, ...]
    deltas: tuple[request_lib.Delta, ...]
    completions: tuple[request_lib.Completion, ...]
    times: tuple[Times, ...]
    load: Load


class Traced(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A recording began or was written; `error` says why not."""

    error: str | None = None


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The engine cannot go on and its process ends.

    Attributes:
        message: What happened and what to change.
        is_input: Whether the same start can only fail again: a wrong flag or model.
    """

    message: str
    is_input: bool


FromEngine = Said | Ready | Refused | Stepped | Traced | Failed
