"""A client of a gateway: its own layers, a channel, and as many requests as it likes."""

import asyncio
import dataclasses
import importlib.metadata
import itertools
from collections.abc import Sequence

from nanoflow_jax import request
from nanoflow_jax.split import (
    alone,
    attempts,
    driver,
    engine_thread,
    errors,
    interface,
    link,
    messages,
    question,
    remote,
    report,
    settings,
    transport,
)
from nanoflow_jax.split import codecs as codecs_lib
from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split.messages import Code


class SplitClient:
    """Generates over a local piece engine and a gateway's.

    Use it as an async context manager; requests may run beside each other.
    """

    def __init__(
        self,
        endpoint: transport.Endpoint,
        identity: messages.Identity,
        *,
        engine: interface.PieceEngine | None = None,
        held_layers: Sequence[tuple[int, int]] = (),
        codecs: Sequence[codecs_lib.Codec] = (codecs_lib.Codec.BF16, codecs_lib.Codec.F32),
        knobs: settings.ClientSection | None = None,
    ) -> None:
        """Makes a client.

        Args:
            endpoint: The gateway.
            identity: The model that both have.
            engine: Runs the layers that are held here.
            held_layers: Ranges [start, stop) of them.
            codecs: How hidden states may travel, best first.
            knobs: Chunks, timeouts, attempts.
        """
        self._endpoint = endpoint
        self._identity = identity
        self._engine = None if engine is None else engine_thread.EngineThread(engine)
        self._held_layers = tuple(held_layers)
        self._codecs = tuple(codecs)
        self._knobs = knobs or settings.ClientSection()
        self._numbers = itertools.count()

    async def __aenter__(self) -> "SplitClient":
        """Raises ValueError if TLS files cannot be read; connects when first asked."""
        frame_bytes = self._knobs.frame_limits.frame_bytes
        self._channel = transport.connect(self._endpoint, max_frame_bytes=frame_bytes)
        if self._engine is not None:
            await self._engine.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._engine is not None:
            await self._engine.__aexit__()
        await self._channel.close()

    async def probe(self, *, num_bytes: int = 1 << 20) -> link.Link:
        """Measures the link; see `link.probe`."""
        return await link.probe(
            self._channel,
            self._endpoint.token,
            limits=self._knobs.frame_limits,
            num_bytes=num_bytes,
        )

    async def check(
        self,
        prompt_ids: Sequence[int],
        params: request.SamplingParams,
        cut: cut_lib.Cut,
        *,
        max_len: int | None = None,
    ) -> None:
        """Asks whether the gateway would take a request, before this end is made ready for it.

        Args:
            prompt_ids: As in `generate`.
            params: As in `generate`.
            cut: As in `generate`.
            max_len: As in `generate`.

        Raises:
            ValueError: It cannot be asked so.
            SplitError: The gateway would not, or cannot be reached.
        """
        hello = self._hello(_order("trial", prompt_ids, params, cut, max_len=max_len))
        tries = attempts.Attempts(self._knobs)
        while True:
            try:
                async with question.asking(
                    self._channel, transport.TRIAL, self._endpoint.token, hello
                ) as stream:
                    await question.hear(stream, self._knobs)
                return
            except errors.SplitError as error:
                if not error.retryable:
                    raise
                await tries.failed(error, note="nothing was loaded for it")

    async def ask(self) -> messages.Offer:
        """What the gateway offers; see `link.ask`."""
        return await link.ask(
            self._channel,
            self._endpoint.token,
            limits=self._knobs.frame_limits,
            timeout_s=self._knobs.connect_timeout_s,
        )

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: request.SamplingParams,
        cut: cut_lib.Cut,
        *,
        max_len: int | None = None,
        promise: report.Promise | None = None,
        deadline_s: float | None = None,
        on_tokens: driver.OnTokens = lambda token_ids: None,
    ) -> driver.Generation:
        """Generates one choice.

        Args:
            prompt_ids: Token ids, at least one.
            params: How to draw.
            cut: Who runs which layers.
            max_len: Most positions; needed where `params` has no `max_tokens`.
            promise: What was predicted, for the report.
            deadline_s: Fails then, rather than be late without a word.
            on_tokens: Told new tokens as they come.

        Raises:
            ValueError: It cannot be asked so.
            SplitError: It failed, and says why.
        """
        order = dataclasses.replace(
            _order(f"split-{next(self._numbers)}", prompt_ids, params, cut, max_len=max_len),
            promise=promise or report.Promise(),
            on_tokens=on_tokens,
        )
        self._check_layers(cut)
        running = driver.Driver(
            order,
            engine=self._engine,
            make_remote=lambda hello, on_event: remote.Remote(
                self._channel,
                token=self._endpoint.token,
                hello=hello,
                knobs=self._knobs,
                on_event=on_event,
            ),
            make_hello=self._hello,
            knobs=self._knobs,
        )
        try:
            async with asyncio.timeout(deadline_s) as limit:
                return await running.run()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise errors.SplitError(
                Code.LINK,
                f"not finished in {deadline_s:g} s: {running.num_drawn} tokens came; "
                f"{running.describe_link()}",
                retryable=True,
            ) from error

    async def generate_alone(
        self, prompt_ids: Sequence[int], params: request.SamplingParams
    ) -> driver.Generation:
        """Generates one choice with this client's layers alone; see `alone.generate`.

        Args:
            prompt_ids: Token ids, at least one.
            params: How to draw.

        Raises:
            ValueError: It cannot be asked so, or the client does not hold the model.
            SplitError: The client's engine failed.
        """
        num_layers = self._identity.num_layers
        if self._engine is None or (0, num_layers) not in self._held_layers:
            raise ValueError(
                f"this client does not hold all {num_layers} layers; it holds "
                f"{list(self._held_layers)}"
            )
        piece = interface.Piece(
            piece_id=f"alone-{next(self._numbers)}",
            start=0,
            stop=num_layers,
            params=params,
            prompt_len=len(prompt_ids),
            max_len=_checked_len(prompt_ids, params, None),
        )
        return await alone.generate(self._engine, piece, prompt_ids)

    def _check_layers(self, cut: cut_lib.Cut) -> None:
        for low, high in cut.client_layers:
            if self._engine is None or not any(
                a <= low and high <= b for a, b in self._held_layers
            ):
                raise ValueError(
                    f"{cut}: this client does not hold [{low}, {high}); it holds "
                    f"{list(self._held_layers)}"
                )

    def _hello(self, order: driver.Order) -> messages.Hello:
        return messages.Hello(
            major=messages.PROTOCOL_MAJOR,
            minor=messages.PROTOCOL_MINOR,
            build=importlib.metadata.version("nanoflow_jax"),
            identity=self._identity,
            client_layers=self._held_layers,
            start=order.cut.start,
            stop=order.cut.stop,
            codecs=self._codecs,
            # A server that does not draw need not know how.
            params=order.params if order.cut.server_draws else request.SamplingParams(),
            prompt_len=len(order.prompt_ids),
            max_len=order.max_len,
        )


def _order(
    request_id: str,
    prompt_ids: Sequence[int],
    params: request.SamplingParams,
    cut: cut_lib.Cut,
    *,
    max_len: int | None,
) -> driver.Order:
    """A checked order that promises nothing and tells nobody; see `SplitClient.generate`."""
    return driver.Order(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        params=params,
        max_len=_checked_len(prompt_ids, params, max_len),
        cut=cut,
        promise=report.Promise(),
        on_tokens=lambda token_ids: None,
    )


def _checked_len(
    prompt_ids: Sequence[int], params: request.SamplingParams, max_len: int | None
) -> int:
    """Most positions of a request; raises if it is one that cannot be split."""
    if not prompt_ids:
        raise ValueError("the prompt has no token; at least one is wanted")
    for name, plain in (("n", 1), ("stop", ()), ("prompt_logprobs", None), ("grammar", None)):
        if getattr(params, name) != plain:
            raise ValueError(f"{name} is not for split requests; leave it out")
    if params.seed is None and not params.is_greedy:
        raise ValueError("a split request needs a seed, so that it can be resumed")
    if max_len is None:
        if params.max_tokens is None:
            raise ValueError("give max_tokens or max_len: room is reserved ahead")
        max_len = len(prompt_ids) + params.max_tokens
    if max_len <= len(prompt_ids):
        raise ValueError(
            f"max_len={max_len} leaves no room after a prompt of {len(prompt_ids)} tokens"
        )
    return max_len
