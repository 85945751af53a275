"""What was planned for a request beside what came of it."""

import dataclasses
from typing import Any

from nanoflow_jax.split import driver, report
from nanoflow_jax.split.planning.choosing import Choice, Measured
from nanoflow_jax.split.planning.correction import Corrections


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """One request, planned and served.

    Attributes:
        choice: How it was planned.
        corrections: Of the profiles that it was planned with.
        report: How it was served; None if it was rejected.
        num_tokens: Generated.
    """

    choice: Choice
    corrections: Corrections
    report: report.Report | None
    num_tokens: int

    @property
    def where(self) -> str:
        """Who runs which layers, in words."""
        if self.choice.cut is not None:
            return str(self.choice.cut)
        return "nothing runs" if self.report is None else "client alone"

    def rows(self) -> list[tuple[str, str, float | None, float | None]]:
        """Name, unit, predicted and measured value, one row for each quantity; None is unknown."""
        made, expected = self.report, self.choice.expected
        if made is None or expected is None:
            return []
        saved_s = expected.all_server_s - expected.server_s
        return [
            ("first token", "ms", _ms(expected.ttft_s), _ms(made.ttft_s)),
            ("each further", "ms", _ms(expected.tpot_s), _ms(made.tpot_s)),
            ("sent", "kB", expected.up_bytes / 1e3, made.up_bytes / 1e3),
            ("received", "kB", expected.down_bytes / 1e3, made.down_bytes / 1e3),
            ("round trips", "", float(expected.round_trips), float(made.num_steps)),
            ("server's time", "ms", _ms(expected.server_s), _ms(made.server_s)),
            ("of it saved", "ms", _ms(saved_s), _ms(expected.all_server_s - made.server_s)),
        ]


def measured(done: driver.Generation) -> Measured | None:
    """What a request shows of machines and link; None if no token came."""
    made = done.report
    if made.ttft_s is None:
        return None
    return Measured(
        num_tokens=len(done.token_ids),
        ttft_s=made.ttft_s,
        tpot_s=made.tpot_s,
        client_s=made.client_s,
        client_first_s=made.client_first_s,
        server_s=made.server_s,
        server_first_s=made.server_first_s,
        rtt_s=made.rtt_p50_s,
    )


def text(one: Account) -> str:
    """An account in lines for people."""
    verdict = one.choice.verdict
    lines = [f"{verdict.kind}: {one.where}; {verdict.reason}"]
    rows = one.rows()
    if rows:
        lines.append(f"{'':16}{'predicted':>14}{'measured':>14}")
    for name, unit, predicted, found in rows:
        cells = [
            "-" if value is None else f"{value:,.1f} {unit}".rstrip()
            for value in (predicted, found)
        ]
        lines.append(f"{name:16}{cells[0]:>14}{cells[1]:>14}")
    return "\n".join([*lines, f"planned with {one.corrections}"])


def as_json(one: Account) -> dict[str, Any]:
    """An account for programs; times in ms, amounts in kB."""
    verdict, cut = one.choice.verdict, one.choice.cut
    best = verdict.best
    return {
        "verdict": str(verdict.kind),
        "reason": verdict.reason,
        "meets_deadlines": verdict.meets_deadlines,
        "server_layers": None if cut is None else [cut.start, cut.stop],
        "prompt_len": one.choice.request.prompt_len,
        "num_tokens": one.num_tokens,
        "best_ms": None
        if best is None
        else {"ttft": _ms(best.ttft_s), "tpot": _ms(best.tpot_s), "e2e": _ms(best.e2e_s)},
        "rows": [
            {"name": name, "unit": unit, "predicted": predicted, "measured": found}
            for name, unit, predicted, found in one.rows()
        ],
        "corrections": dataclasses.asdict(one.corrections),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
