"""Chooses for each request of one client which layers the server runs, and learns from each."""

import dataclasses

from nanoflow_jax.split import cut as cut_lib
from nanoflow_jax.split.planning import cuts, planner, simulation
from nanoflow_jax.split.planning import problem as problems
from nanoflow_jax.split.planning.asked import Policy, Request
from nanoflow_jax.split.planning.correction import Corrections, Sample
from nanoflow_jax.split.planning.costs import Model
from nanoflow_jax.split.planning.profiles import DeviceProfile, LinkProfile

_TOKEN_BYTES = 4
# Fewer bytes take no time beside what else there is, and say nothing of a link's speed.
_LEAST_BYTES = 1 << 14


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ends:
    """A model, the two machines that share it, and what is between them."""

    model: Model
    client: DeviceProfile
    server: DeviceProfile
    link: LinkProfile

    @property
    def in_order(self) -> tuple[Model, DeviceProfile, DeviceProfile, LinkProfile]:
        """As planners take them."""
        return self.model, self.client, self.server, self.link


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """What a plan comes to on the link as it usually is; deadlines count its slow messages.

    Attributes:
        ttft_s: Until the first token.
        tpot_s: Of each further one; None of an only token.
        up_bytes: Sent to the server.
        down_bytes: Sent by it.
        round_trips: Of all tokens.
        server_s: The server's time.
        all_server_s: What it would take if the server ran all.
    """

    ttft_s: float
    tpot_s: float | None
    up_bytes: float
    down_bytes: float
    round_trips: int
    server_s: float
    all_server_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be done with a request.

    Attributes:
        request: It.
        ends: As they were taken to be.
        verdict: The planner's.
        cut: The server's layers; None where the client does all, or the request is rejected.
        expected: What comes of it; None if it is rejected.
    """

    request: Request
    ends: Ends
    verdict: planner.Verdict
    cut: cut_lib.Cut | None
    expected: Expected | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a request.

    Attributes:
        num_tokens: Generated.
        ttft_s: Until the first token.
        tpot_s: Of each further one; None of an only token.
        client_s: The client's layers were busy so long.
        client_first_s: Of it before the first token.
        server_s: The server's were, waiting included.
        server_first_s: Of it before the first token.
        rtt_s: Round trip of a ping; None if none came back.
    """

    num_tokens: int
    ttft_s: float
    tpot_s: float | None
    client_s: float
    client_first_s: float
    server_s: float
    server_first_s: float
    rtt_s: float | None = None


class Chooser:
    """Plans each request with profiles that what was measured corrects.

    Attributes:
        corrections: Of the profiles, so far.
    """

    def __init__(self, ends: Ends, policy: Policy, *, weight: float = 0.5) -> None:
        """Nothing was measured yet.

        Args:
            ends: By their profiles.
            policy: With the borders at which sessions may enter and leave, and the layers that the
                client holds; nothing migrates. `least_saving` is also what another cut than the
                request's before must save.
            weight: Of each request in what is learnt.

        Raises:
            ValueError: The weight is none, or cached tokens may migrate, which sessions cannot.
        """
        if policy.migrates:
            raise ValueError("sessions do not move cached tokens; plan without migration")
        self._promised, self._policy = ends, policy
        self._present: planner.Plan | None = None
        self.corrections = Corrections(weight=weight)

    @property
    def ends(self) -> Ends:
        """As they are taken to be by now."""
        promised, corrections = self._promised, self.corrections
        return Ends(
            model=promised.model,
            client=corrections.of_client(promised.client),
            server=corrections.of_server(promised.server),
            link=corrections.of_link(promised.link),
        )

    def choose(self, request: Request) -> Choice:
        """Plans a request; the next one keeps its cut unless another is enough better.

        Raises:
            ValueError: As of `planner.plan`.
        """
        ends, policy = self.ends, self._policy
        problem = problems.build(*ends.in_order, request, policy)
        present = None if self._present is None else cuts.placement(problem, self._present)
        verdict = planner.plan(
            *ends.in_order, request, policy, among=cuts.runnable, present=present
        )
        plan = verdict.plan
        if plan is None:
            return Choice(request=request, ends=ends, verdict=verdict, cut=None, expected=None)
        self._present = plan
        return Choice(
            request=request,
            ends=ends,
            verdict=verdict,
            cut=cuts.try_cut(ends.model, plan),
            expected=_expected(ends, request, policy, plan),
        )

    def learn(self, choice: Choice, measured: Measured) -> Sample:
        """Takes in what came of a request that ran as it was planned."""
        found = sample(choice, measured, activation_bytes=self._policy.activation_bytes)
        self.corrections = self.corrections.after(found, self._promised.link)
        return found


def _expected(ends: Ends, request: Request, policy: Policy, plan: planner.Plan) -> Expected:
    trip = simulation.play(
        *ends.in_order,
        request,
        plan,
        weather=simulation.usual(ends.link),
        activation_bytes=policy.activation_bytes,
    )
    steps = request.num_steps
    first, last = trip.token_s[0], trip.token_s[-1]
    alone = problems.build(*ends.in_order, request, policy)
    return Expected(
        ttft_s=first,
        tpot_s=(last - first) / steps if steps else None,
        up_bytes=trip.up_bytes,
        down_bytes=trip.down_bytes,
        round_trips=(1 if plan.first_token.server_s else 0) + steps * plan.round_trips,
        server_s=plan.first_token.server_s + steps * plan.step.server_s,
        all_server_s=sum(u.prefill[1] + steps * u.decode[1] for u in alone.units)
        / problems.PER_SECOND,
    )


def sample(choice: Choice, measured: Measured, *, activation_bytes: float) -> Sample:
    """What a request shows of both machines and the link.

    Machines: their time over the predicted one. The link, where layers are split: what a further
    token took beside machines and bytes is a round trip; and what the first token took beside
    machines and that round trip is what bytes took. Chunks of a prompt travel while others are
    computed, so that the latter is no more than it was: bytes were quicker than predicted only if
    all of the first token's time was.
    """
    plan, cut, link = choice.verdict.plan, choice.cut, choice.ends.link
    if plan is None:
        return Sample()
    steps = measured.num_tokens - 1
    client = _ratio(measured.client_s, plan.first_token.client_s + steps * plan.step.client_s)
    server = _ratio(measured.server_s, plan.first_token.server_s + steps * plan.step.server_s)
    if cut is None:
        return Sample(client=client)
    rows = choice.request.prompt_len
    width = choice.ends.model.config.hidden_size * activation_bytes
    up_row = width if cut.start else _TOKEN_BYTES
    down_row = _TOKEN_BYTES if cut.server_draws else width
    rtt_s = measured.rtt_s
    if not cut.is_all_server and steps and measured.tpot_s is not None:
        busy_s = measured.client_s - measured.client_first_s
        busy_s += measured.server_s - measured.server_first_s
        bytes_s = up_row / link.up_bytes_per_s + down_row / link.down_bytes_per_s
        crossing_s = measured.tpot_s - busy_s / steps - bytes_s - 2 * link.serialisation_s
        if crossing_s > 0:  # else engines were busy with more than this request
            rtt_s = crossing_s
    down_rows = 1 if cut.server_draws else rows
    transfer = None
    if rows * up_row + down_rows * down_row >= _LEAST_BYTES:
        predicted_s = rows * up_row / link.up_bytes_per_s
        predicted_s += down_rows * down_row / link.down_bytes_per_s
        moved_s = measured.ttft_s - measured.client_first_s - measured.server_first_s
        moved_s -= rtt_s or 0.0
        if moved_s > predicted_s:
            transfer = moved_s / predicted_s
        elif predicted_s > measured.ttft_s:
            transfer = measured.ttft_s / predicted_s
    return Sample(client=client, server=server, rtt_s=rtt_s, transfer=transfer)


def _ratio(measured_s: float, predicted_s: float) -> float | None:
    return measured_s / predicted_s if measured_s > 0 and predicted_s > 0 else None
