"""One request inside the engine: its tokens on the host, and what its rows ask of the sampler."""

import dataclasses
import hashlib
from collections.abc import Collection

import numpy as np
from jaxtyping import Float, Float32, Int32

from nanoflow_jax import request as request_lib
from nanoflow_jax.engine import fed as fed_lib
from nanoflow_jax.engine import sampling
from nanoflow_jax.grammar import matcher as matcher_lib

_NOT_FINITE = (
    "no token could be drawn: the logits were not finite; the weights may be damaged: download "
    "them again"
)


@dataclasses.dataclass(eq=False, kw_only=True)
class Sequence:
    """A request's tokens and sampler settings.

    Attributes:
        request: What was asked.
        token_ids: Prompt, then generated tokens whose values have arrived.
        limit: Tokens at which it ends, prompt included.
        ends: Tokens that end it.
        bans: Tokens that may not come before `min_tokens` were generated.
        seed: 32 bits, from the request's seed.
        bias: Token ids and what is added to their logits.
        allowed: Bitmask over the vocabulary, if only some tokens are allowed.
        matcher: Follows the grammar through the generated tokens that have arrived, if the
            request has one.
        vocab_size: V.
        prompt_logprobs_done: Prompt positions already reported, or about to be by a step in flight.
        prompt_logprobs_told: Prompt positions already reported.
        started_s: When its prompt first began to run, once it has.
        fed: What comes from outside, for a request that is a piece of a session.
    """

    request: request_lib.Request
    token_ids: list[int]
    limit: int
    ends: frozenset[int]
    bans: tuple[int, ...]
    seed: int
    bias: tuple[Int32[np.ndarray, "B"], Float32[np.ndarray, "B"]]
    allowed: Int32[np.ndarray, "W"] | None
    matcher: matcher_lib.Matcher | None
    vocab_size: int
    prompt_logprobs_done: int = 0
    prompt_logprobs_told: int = 0
    started_s: float | None = None
    fed: fed_lib.Fed | None = None

    def wait_for(self, fed: fed_lib.Fed | None) -> None:
        """Takes its rows from outside, if from anywhere; its tokens are those that come."""
        self.fed = fed
        if fed is not None and fed.leaves:
            self.token_ids.clear()

    def feed(self, token_ids: Collection[int], hidden: Float[np.ndarray, "n D"] | None) -> int:
        """Takes rows from outside and says how many; see `Engine.feed`."""
        assert self.fed is not None
        ids = list(token_ids)
        if hidden is not None:
            self.fed.add(hidden)
            ids = [0] * len(hidden)  # nobody here knows which they are
        if self.fed.leaves:
            self.token_ids += ids
        return len(ids)

    def truncate(self, position: int) -> None:
        """Forgets rows at and after a position; a token drawn before it stays."""
        assert self.fed is not None
        self.fed.truncate(position)
        kept = position if self.fed.leaves else max(self.prompt_len, position + 1)
        del self.token_ids[kept:]

    @property
    def params(self) -> request_lib.SamplingParams:
        """How to sample."""
        return self.request.params

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        """Generated tokens that have arrived."""
        return len(self.token_ids) - self.prompt_len

    def bans_at(self, position: int) -> tuple[int, ...]:
        """Tokens banned when the token at `position` is drawn."""
        return self.bans if position - self.prompt_len < self.params.min_tokens else ()

    @property
    def is_masked(self) -> bool:
        """Whether only some tokens may be drawn."""
        return self.allowed is not None or self.matcher is not None or bool(self.request.bad_tokens)

    @property
    def mask_needs_tokens(self) -> bool:
        """Whether which tokens may be drawn depends on those before."""
        return self.matcher is not None or any(len(bad) > 1 for bad in self.request.bad_tokens)

    def fill_mask(self, out: Int32[np.ndarray, "W"], *, position: int) -> None:
        """Writes which tokens may be drawn at a position.

        Args:
            out: Overwritten.
            position: Where `mask_needs_tokens`, that of the first token not known.
        """
        if self.mask_needs_tokens:
            assert position == len(self.token_ids), "the mask is not where the request is"
        if self.matcher is None:
            out[:] = -1
        else:
            self.matcher.fill_mask(out)
        if self.allowed is not None:
            out &= self.allowed
        words = out.view(np.uint32)
        for *before, last in self.request.bad_tokens:
            start = len(self.token_ids) - len(before)
            if start >= self.prompt_len and self.token_ids[start:] == before:
                words[last // 32] &= ~(np.uint32(1) << np.uint32(last % 32))

    @property
    def has_token_left(self) -> bool:
        """Whether the request lets any token come next, whatever the model says."""
        position = len(self.token_ids)
        mask = np.full(-(-self.vocab_size // 32), -1, np.int32)
        if self.is_masked:
            self.fill_mask(mask, position=position)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: self.vocab_size]
        bits[list(self.bans_at(position))] = 0
        return bool(bits.any())

    def try_error(self, *, is_ok: bool) -> str | None:
        """Why it cannot go on after a draw; None if it can.

        Args:
            is_ok: Whether the draw gave a token.
        """
        if self.matcher is not None and self.matcher.error is not None:
            return self.matcher.error
        if is_ok:
            return None
        return _NOT_FINITE if self.has_token_left else request_lib.NO_TOKEN_LEFT

    @property
    def meets_grammar(self) -> bool:
        """Whether its text is complete, so that nothing may follow."""
        return (
            self.matcher is not None
            and self.matcher.is_finished
            and self.num_generated >= self.params.min_tokens
        )

    def variant_at(self, position: int) -> sampling.SamplerVariant:
        """The least sampler that serves the token at `position`."""
        p = self.params
        if (
            p.uses_penalties
            or p.logprobs is not None
            or len(self.bias[0])
            or self.is_masked
            or self.bans_at(position)
        ):
            return sampling.SamplerVariant.FULL
        if p.is_greedy:
            return sampling.SamplerVariant.GREEDY
        return sampling.SamplerVariant.FILTERED


def make_sequence(
    request: request_lib.Request,
    *,
    vocab_size: int,
    max_context_len: int,
    eos_ids: Collection[int],
    matcher: matcher_lib.Matcher | None = None,
) -> Sequence:
    """Checks a request against the model and prepares it.

    Args:
        request: What was asked.
        vocab_size: V.
        max_context_len: Most tokens of one request.
        eos_ids: The model's end-of-text tokens.
        matcher: Of the request's grammar, if it has one.

    Raises:
        ValueError: The prompt is empty, too long or holds an id outside the vocabulary, or a
            parameter names such an id.
    """
    p = request.params
    prompt = list(request.prompt_ids)
    _check_prompt(prompt, vocab_size=vocab_size, max_context_len=max_context_len)
    _check_ids("logit_bias", p.logit_bias, vocab_size)
    _check_ids("allowed_token_ids", p.allowed_token_ids or (), vocab_size)
    _check_ids("stop_token_ids", p.stop_token_ids, vocab_size)
    for bad in request.bad_tokens:
        _check_ids("bad_words", bad, vocab_size)
    ends = frozenset(p.stop_token_ids) | (frozenset() if p.ignore_eos else frozenset(eos_ids))
    most = max_context_len if p.max_tokens is None else len(prompt) + p.max_tokens
    return Sequence(
        request=request,
        token_ids=prompt,
        limit=min(most, max_context_len),
        ends=ends,
        bans=tuple(sorted(ends)) if p.min_tokens else (),
        seed=_seed_bits(p.seed or 0),
        bias=(
            np.fromiter(p.logit_bias.keys(), np.int32),
            np.fromiter(p.logit_bias.values(), np.float32),
        ),
        allowed=_bitmask(p.allowed_token_ids, vocab_size),
        matcher=matcher,
        vocab_size=vocab_size,
    )


def _check_prompt(prompt: list[int], *, vocab_size: int, max_context_len: int) -> None:
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token")
    if len(prompt) >= max_context_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens and the context holds {max_context_len}, with "
            "room for at least one generated token; shorten the prompt or raise "
            "--max_context_len where the model allows it"
        )
    _check_ids("prompt", prompt, vocab_size)


def _check_ids(name: str, ids: Collection[int], vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(
                f"{name}: {token!r} is not a token id of this model, 0 to {vocab_size - 1}"
            )


def _seed_bits(seed: int) -> int:
    """32 bits that differ whenever 64-bit seeds differ in practice."""
    digest = hashlib.sha256((seed % 2**64).to_bytes(8, "little")).digest()
    return int.from_bytes(digest[:4], "little")


def _bitmask(ids: Collection[int] | None, vocab_size: int) -> Int32[np.ndarray, "W"] | None:
    if ids is None:
        return None
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
