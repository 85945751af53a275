"""How much `bench ablation` measures: workloads, batches, rounds."""

import dataclasses
from collections.abc import Iterator

from nanoflow_jax.bench import steady_state
from nanoflow_jax.bench.steady_state import Lengths, Load
from nanoflow_jax.results import ablation_sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What is measured.

    Attributes:
        lengths: Of requests, one workload each; the first with decode rows gets the controls.
        sweep: Dense batches at which sequential and overlapped are compared.
        sweep_lengths: Of its requests.
        dense_batch: Of the workloads; less where memory does not keep that full.
        rounds: Over all modes of a workload, to and fro.
        steps: That count in a round.
        control_rounds: Of controls, and of the sweep.
        judged_steps: In which tokens and logits of modes are compared one by one.
        traced_steps: In which operations are timed, of the workload that has controls; 0 for none.
    """

    lengths: tuple[Lengths, ...]
    sweep: tuple[int, ...]
    sweep_lengths: Lengths
    dense_batch: int
    rounds: int
    steps: int
    control_rounds: int
    judged_steps: int
    traced_steps: int


def _lengths(*pairs: tuple[int, int]) -> tuple[Lengths, ...]:
    return tuple(Lengths(prompt=prompt, output=output) for prompt, output in pairs)


# What has a goal comes first, for there may be no time for all.
GPU = Scale(
    lengths=_lengths((512, 512), (1024, 512), (512, 1024), (512, 0)),
    sweep=(2048, 16, 32, 64, 128, 256, 512, 1024, 4096),
    sweep_lengths=Lengths(prompt=256, output=256),
    dense_batch=2048,
    rounds=5,
    steps=60,
    control_rounds=3,
    judged_steps=8,
    traced_steps=20,
)
# The same code in seconds; nothing overlaps on a CPU.
CPU = Scale(
    lengths=_lengths((16, 16), (32, 16), (16, 32), (16, 0)),
    sweep=(8, 32),
    sweep_lengths=Lengths(prompt=8, output=8),
    dense_batch=32,
    rounds=2,
    steps=4,
    control_rounds=2,
    judged_steps=4,
    traced_steps=2,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One workload, or one dense batch of the sweep.

    Attributes:
        name: In results.
        load: What is kept up.
        is_sweep: Whether at most two modes are compared: where nothing is cut there is but one.
        has_controls: Whether controls are measured too, and operations timed.
    """

    name: str
    load: Load
    is_sweep: bool = False
    has_controls: bool = False


def cases(scale: Scale) -> Iterator[Case]:
    """All there is to measure, in the order in which it is."""
    controlled = next((one for one in scale.lengths if one.decoded), None)
    for one in scale.lengths:
        load = Load(lengths=one, dense_batch=scale.dense_batch)
        yield Case(name=str(one), load=load, has_controls=one is controlled)
    for tokens in scale.sweep:
        load = Load(lengths=scale.sweep_lengths, dense_batch=tokens)
        yield Case(name=ablation_sweep.case_name(tokens), load=load, is_sweep=True)


def read_lengths(texts: list[str]) -> tuple[Lengths, ...]:
    """Lengths of workloads from PROMPT/OUTPUT, each once.

    Raises:
        ValueError: One has another form.
    """
    try:
        return tuple(dict.fromkeys(steady_state.parse_lengths(text) for text in texts))
    except ValueError as error:
        raise ValueError(f"--lengths: {error}") from None


def read_batches(texts: list[str]) -> tuple[int, ...]:
    """Dense batches of the sweep, each once.

    Raises:
        ValueError: One is no number of tokens, or too few for a decode row and a chunk.
    """
    for text in texts:
        if not text.isdecimal() or int(text) < 2:
            raise ValueError(f"--sweep: {text!r} is no number of tokens from 2 on")
    return tuple(dict.fromkeys(map(int, texts)))
