"""Python reads this at its start where a test puts the folder on the path of a server.

The wall clock of the server jumps to and fro, and the device of its engine gives up any step that
holds a certain token: what no request can bring about, and no switch of the product either.
"""

import os
import random
import sys
import time
from typing import Any

_JUMP_S = 86_400.0


def _let_clock_jump() -> None:
    real, drawn = time.time, random.Random(0)
    time.time = lambda: real() + drawn.uniform(-_JUMP_S, _JUMP_S)


def _break_device(token: int) -> None:
    import jax

    from nanoflow_jax.engine import runner

    forward = runner.Runner.forward

    def fail_or_forward(self: runner.Runner, inputs: runner.ForwardInputs) -> runner.Forwarded:
        token_ids: Any = inputs.vector[: inputs.bucket.tokens]
        if token in token_ids:
            for array in jax.tree.leaves(self._caches):
                array.delete()  # it was donated to the step
            raise jax.errors.JaxRuntimeError("INTERNAL: made up by the test")
        return forward(self, inputs)

    runner.Runner.forward = fail_or_forward  # type: ignore[method-assign]


_program = " ".join(sys.orig_argv)
if "nanoflow_jax.serve" in _program:
    _let_clock_jump()  # not in the engine: JAX times by this clock what is worth keeping
if "nanoflow_jax.engine_process" in _program:
    _break_device(int(os.environ["NANOFLOW_TEST_BAD_TOKEN"]))
