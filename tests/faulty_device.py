"""A device that fails some steps of an engine."""

import jax

MESSAGE = "INTERNAL: made up by the test"


class FaultyDevice:
    """Fails the steps of an engine whose requests a rule names, as XLA would.

    Attributes:
        num_failed: How many steps failed.
    """

    def __init__(self, monkeypatch, engine, rule, *, where="forward"):
        self.num_failed = 0
        self._rule = rule
        self._runner = engine._runner
        self._launched = {}
        self._names = []
        self._sequences = engine._sequences
        plan = engine._scheduler.plan

        def plan_and_note():
            found = plan()
            keys = [row.request_id for row in found.rows] if found else []
            self._names = [self._sequences[key].request.request_id for key in keys]
            return found

        forward, sample, collect = (
            self._runner.forward,
            self._runner.sample,
            self._runner.collect,
        )

        def try_forward(inputs):
            if where == "forward":
                self._judge(self._names)
            return forward(inputs)

        def try_sample(forwarded, inputs):
            if where == "sample":
                self._judge(self._names)
            launched = sample(forwarded, inputs)
            self._launched[id(launched)], self._names = self._names, []
            return launched

        def try_collect(launched):
            names = self._launched.pop(id(launched), [])  # [] if launched before
            if where == "collect":
                self._judge(names)
            return collect(launched)

        monkeypatch.setattr(engine._scheduler, "plan", plan_and_note)
        monkeypatch.setattr(self._runner, "forward", try_forward)
        monkeypatch.setattr(self._runner, "sample", try_sample)
        monkeypatch.setattr(self._runner, "collect", try_collect)

    def _judge(self, names):
        if not self._rule(names):
            return
        self.num_failed += 1
        self._names = []
        for array in jax.tree.leaves(self._runner.state):
            array.delete()  # they were donated to the step
        raise jax.errors.JaxRuntimeError(MESSAGE)
