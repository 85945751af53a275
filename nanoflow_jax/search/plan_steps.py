"""How long steps take whose layers run by given plans: for the simulator of the serving loop.

Operations take what the simulator has them take one after another; the plan says which parts of
them run beside each other and on which share of a device. So what a plan gains over the sequential
layer is what its order and its shares gain, less what smaller products and cutting cost.
"""

from collections.abc import Mapping

from nanoflow_jax.cost import serving, timeline
from nanoflow_jax.models import architecture
from nanoflow_jax.nanobatch.dependencies import Dependencies
from nanoflow_jax.nanobatch.plan import Plan, TokenRange
from nanoflow_jax.search import plan_search
from nanoflow_jax.search.interference import Speeds
from nanoflow_jax.search.profiles import COLLECTIVE_SHARES
from nanoflow_jax.simulator import step_time
from nanoflow_jax.simulator.step_time import Mode, Reached, StepTime, StepWork

# Of the simulator's operations, those that have another name in a layer. What is between operations
# it counts with products: here, with the first that comes after a norm.
_NAMES = {"norm_kqv": ("kqv",), "up_gate": ("up_gate", step_time.OTHER)}


class PlanSteps:
    """Steps of dense batches for which there are plans; others run one operation after another.

    Layers that differ, such as dense ones among sparse ones, count as so many alike.
    """

    def __init__(
        self,
        config: architecture.ModelConfig,
        cluster: serving.Cluster,
        reached: Reached,
        *,
        plans: Mapping[int, Plan],
        speeds: Speeds,
    ) -> None:
        """See `simulator.step_time.Reached`.

        Args:
            config: The model.
            cluster: The devices.
            reached: What operations reach.
            plans: By tokens of the dense batch, of this model's layers.
            speeds: Of shares of a device.

        Raises:
            ValueError: The devices are several stages.
        """
        self._plain = step_time.Roofline(config, cluster, reached, Mode.SEQUENTIAL)
        self._num_layers, self._reached, self._speeds = config.num_layers, reached, speeds
        self._plans = {
            tokens: Dependencies(plan, [plan.graph] * config.num_layers)
            for tokens, plan in plans.items()
        }

    def predict(self, work: StepWork) -> StepTime:
        """How long a step takes."""
        plain, dependencies = self._plain.predict(work), self._plans.get(work.tokens)
        if dependencies is None:
            return plain
        durations_s = self._durations_s(dependencies.plan, work)
        layers_s = max(end for _, end in timeline.times_s(dependencies, durations_s))
        head_s = self._plain.operations_s(work)["head"]
        return StepTime(device_s=layers_s + head_s, busy_s=plain.busy_s)

    def _durations_s(self, plan: Plan, work: StepWork) -> dict[str, float]:
        """Of each nano-operation of a layer, on its share of the device, by its key."""
        known: dict[TokenRange, dict[str, float]] = {}
        found = {}
        for place, (key, nano) in enumerate(zip(plan.keys, plan.order, strict=True)):
            if nano.tokens not in known:
                known[nano.tokens] = self._alone_s(plan, nano.tokens, work)
            name = nano.operation.removesuffix("_columns")
            seconds = sum(known[nano.tokens].get(one, 0.0) for one in _NAMES.get(name, (name,)))
            if name in COLLECTIVE_SHARES:
                seconds = known[nano.tokens].get("collectives", 0.0) * COLLECTIVE_SHARES[name]
            found[key] = seconds / plan_search.speed(plan, place, self._speeds)
        return found

    def _alone_s(self, plan: Plan, tokens: TokenRange, work: StepWork) -> dict[str, float]:
        """Of the simulator's operations over some tokens of a layer, on all of the device."""
        rows = plan.decode_share(tokens)
        decode_rows = work.decode_rows * rows
        prompts = (tokens.length - decode_rows) / max(work.tokens - work.decode_rows, 1)
        part = StepWork(
            tokens=tokens.length,
            decode_rows=round(decode_rows),
            decode_context=work.decode_context * rows,
            chunk_pairs=work.chunk_pairs * max(prompts, 0.0),
        )
        found = self._plain.operations_s(part)
        if any(nano.tokens.length < plan.num_tokens for nano in plan.order):
            share = tokens.length / plan.num_tokens
            found[step_time.OTHER] += self._reached.cut_s * self._num_layers * share
        return {name: seconds / self._num_layers for name, seconds in found.items()}
