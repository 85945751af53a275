"""Which plan is sought: of a model, some devices and requests of one kind."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from nanoflow_jax.cost import layer_work, serving
from nanoflow_jax.cost.datasheets import Datasheet
from nanoflow_jax.cost.steady_state import Mix
from nanoflow_jax.models import architecture, huggingface, presets
from nanoflow_jax.nanobatch import builders
from nanoflow_jax.nanobatch.operations import LayerShape
from nanoflow_jax.nanobatch.plan import GRANULE
from nanoflow_jax.search import candidates, interference, measured, plan_search, profiles

# NanoFlow's dense batch; with more tokens products gain little.
_USUAL_TOKENS = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked.

    Attributes:
        config: The model.
        cluster: Where it runs.
        mix: The requests.
        dense_batch: Tokens of a step; None for the usual ones, or fewer where memory feeds fewer.
        most_tokens: Where times are known of no more; None where they are known of any number.
    """

    config: architecture.ModelConfig
    cluster: serving.Cluster
    mix: Mix
    dense_batch: float | None = None
    most_tokens: int | None = None

    @property
    def tokens(self) -> int:
        """Of the dense batch, a multiple of the granule.

        Raises:
            ValueError: The weights do not fit, or there is no such dense batch.
        """
        largest = float(_USUAL_TOKENS)
        if self.mix.output_len:
            sizes = serving.sizes(self.config)
            largest = serving.largest_batch(sizes, self.cluster, self.mix)[1]
        usual = min(_USUAL_TOKENS, largest, self.most_tokens or _USUAL_TOKENS)
        wanted = usual if self.dense_batch is None else self.dense_batch
        if self.mix.output_len and wanted > largest:
            raise ValueError(
                f"--dense_batch={wanted:g} is more than memory can feed, which is {largest:,.0f}"
            )
        tokens = int(wanted) // GRANULE * GRANULE
        if tokens < 2 * GRANULE or (self.dense_batch is not None and tokens != wanted):
            raise ValueError(
                f"--dense_batch={wanted:g} cannot be split: give a multiple of {GRANULE}, from "
                f"{2 * GRANULE} on"
            )
        return tokens

    @property
    def decode_rows(self) -> int:
        return self.mix.decode_rows(self.tokens)

    @property
    def sheet(self) -> Datasheet:
        """Of each device.

        Raises:
            ValueError: Nobody says how many SMs it has.
        """
        found = self.cluster.accelerator
        if not isinstance(found, Datasheet):
            raise ValueError(
                f"--device={found.name} does not say how many SMs it has, which a plan shares out; "
                "take one of those without paper:"
            )
        return found

    @property
    def load(self) -> layer_work.Load:
        """Of a step."""
        return layer_work.Load(
            tokens=self.tokens,
            decode_rows=self.decode_rows,
            context_len=self.mix.decode_context,
            prefix_len=self.mix.prefix,
        )

    @property
    def shape(self) -> LayerShape:
        """Of a layer on the devices of one stage."""
        return dataclasses.replace(self.config.layer_shape, num_devices=self.cluster.group_size)


def profile(asked: Question, *, from_paper: bool = False) -> profiles.Profile:
    """Times of operations: of datasheets, or as NanoFlow's authors measured them.

    Raises:
        ValueError: See `Question`; or the paper has no such times.
    """
    if from_paper:
        paper = huggingface.read_config(presets.load("llama-2-70b"))
        known = (paper, 8, "A100 SXM 80 GB", profiles.PAPER_70B.tokens)
        if known != (asked.config, asked.cluster.group_size, asked.sheet.name, asked.tokens):
            raise ValueError(
                "--profile=paper has times of llama-2-70b on 8 of a100-80g with 2048 tokens alone; "
                "ask for these, or take --profile=datasheet"
            )
        return profiles.PAPER_70B
    return profiles.Roofline(
        config=asked.config,
        num_devices=asked.cluster.group_size,
        sheet=asked.sheet,
        load=asked.load,
    )


def speeds(asked: Question) -> interference.Speeds:
    """What is known of sharing such a device; of an A100 the paper measured it."""
    return interference.of_device(asked.sheet.name)


def answer(
    asked: Question,
    profile: profiles.Profile,
    speeds: interference.Speeds,
    *,
    seconds: float,
) -> plan_search.Outcome:
    """The best plan that an engine can load.

    Args:
        asked: What is asked.
        profile: Times of operations.
        speeds: Of shares of a device.
        seconds: Time to search.

    Raises:
        ValueError: See `Question`.
    """
    return plan_search.search(
        candidates.splits(asked.shape, num_tokens=asked.tokens, granule=GRANULE),
        profile,
        speeds,
        shape=asked.shape,
        num_tokens=asked.tokens,
        num_sms=asked.sheet.num_sms,
        seconds=seconds,
        least_gain=uncertainty(asked, profile),
        near=candidates.near,
    )


def uncertainty(asked: Question, profile: profiles.Profile) -> float:
    """Of the time of a layer, by how much samples of its operations were spread; 0 if unmeasured.

    Raises:
        ValueError: See `Question`.
    """
    if not isinstance(profile, measured.Measured):
        return 0.0
    names = [nano.operation for nano in builders.one(asked.shape, num_tokens=asked.tokens).order]
    variance = sum(profile.spread_s(name, asked.tokens) ** 2 for name in names)
    whole = sum(profile.seconds(name, asked.tokens) for name in names)
    return math.sqrt(variance) / whole


def sizes(asked: Question) -> tuple[int, ...]:
    """Dense batches to look at: doubled from the smallest that can be split to that asked for."""
    most, found = asked.tokens, [2 * GRANULE]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return tuple(found if found[-1] == most else [*found, most])


def by_size(
    asked: Question,
    *,
    seconds: float,
    times: Callable[[Question], profiles.Profile],
    speeds: interference.Speeds,
) -> dict[int, plan_search.Outcome]:
    """The best plan of each of `sizes`.

    Args:
        asked: With the largest dense batch.
        seconds: Time to search, in all.
        times: Of operations.
        speeds: Of shares of a device.

    Raises:
        ValueError: See `Question`.
    """
    questions = {tokens: dataclasses.replace(asked, dense_batch=tokens) for tokens in sizes(asked)}
    each = seconds / len(questions)
    return {
        tokens: answer(one, times(one), speeds, seconds=each) for tokens, one in questions.items()
    }


def gate(found: Mapping[int, plan_search.Outcome]) -> int | None:
    """The smallest dense batch from which on splitting always wins; None if it does not."""
    smallest = None
    for tokens in sorted(found, reverse=True):
        if found[tokens].plan.name == "one":
            break
        smallest = tokens
    return smallest
