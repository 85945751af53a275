"""The server of a measured link, in a process of its own: a gateway that tells what it spent.

Reads lines of JSON: first what to build, then anything to be told the counts of now. Writes a line
for each.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from nanoflow_jax.bench import split_ends
from nanoflow_jax.engine.engine import Counters
from nanoflow_jax.serve import keys
from nanoflow_jax.split import engine as engine_lib
from nanoflow_jax.split import gateway, identity, settings, transport

SCRIPT = Path(__file__)


def main() -> None:
    """Serves until its input ends."""
    asked = json.loads(sys.stdin.buffer.readline())
    asked["grid"] = tuple(asked["grid"])
    config = split_ends.EndConfig(**asked)
    engine_config, source = config.engine_config(), split_ends.source_of(config.model)
    engine = engine_lib.build_split_engine(engine_config, source, grid=config.grid)
    served = gateway.Gateway(
        metered := split_ends.MeteredEngine(engine),
        identity.of(engine_config.model, source, engine.held.dtype),
        limits=settings.GatewaySection(patience_s=config.patience_s),
        keys=keys.ApiKeys([]),
        borders=config.grid,
    )
    asyncio.run(_serve(served, metered, engine.engine.counters))
    engine.close()


async def _serve(
    served: gateway.Gateway, engine: split_ends.MeteredEngine, counters: Counters
) -> None:
    async with served.serving(transport.Endpoint(host="127.0.0.1", port=0)):
        _tell({"port": served.port})
        while await asyncio.to_thread(sys.stdin.buffer.readline):
            _tell(
                {
                    "busy_s": engine.busy_s,
                    "cpu_s": time.process_time(),
                    "steps": counters.steps,
                }
            )


def _tell(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
