"""How long steps take by a profile, one operation after another: for the simulator."""

from nanoflow_jax.cost import serving
from nanoflow_jax.nanobatch import operations
from nanoflow_jax.search.given_profile import Given
from nanoflow_jax.simulator import step_time
from nanoflow_jax.simulator.step_time import Mode, StepTime, StepWork


class ProfileSteps:
    """Steps of a model of equal layers, and the head of rows that draw a token."""

    def __init__(self, given: Given, cluster: serving.Cluster) -> None:
        """See `simulator.step_time.Roofline` for what keeps resources busy.

        Args:
            given: The profile.
            cluster: Its device.
        """
        self._given, self._config = given, given.config
        self._busy = step_time.Roofline(given.config, cluster, step_time.DATASHEET, Mode.SEQUENTIAL)
        graph = operations.layer_graph(given.config.layer_shape)
        self._names = [op.name for op in graph.operations]

    def predict(self, work: StepWork) -> StepTime:
        """How long a step takes.

        Raises:
            ValueError: It is larger than what was measured.
        """
        return StepTime(
            device_s=sum(self.operations_s(work).values()),
            busy_s=self._busy.predict(work).busy_s,
        )

    def operations_s(self, work: StepWork) -> dict[str, float]:
        """Of each operation of all layers.

        Raises:
            ValueError: As `predict`.
        """
        times, layers = self._given.times, self._config.num_layers
        chunk_tokens = max(work.tokens - work.decode_rows, 0) if work.chunk_pairs else 0
        found = {}
        for name in self._names:
            tokens, context = work.tokens, 0.0
            if name == "decode_attention":
                tokens = work.decode_rows
                context = work.decode_context / max(tokens, 1)
            elif name == "prefill_attention":
                tokens, context = chunk_tokens, work.chunk_pairs / max(chunk_tokens, 1)
            found[name] = layers * times.seconds(name, tokens, context)
        # Of chunks, only the last of a prompt draws a token: few, beside the rows that decode.
        found["head"] = times.seconds("head", work.decode_rows or 1)
        return found
