"""A program: a gateway of the toy model, and a slow way to it; says both ports."""

import asyncio
import sys

import shaping_proxy
import split_runs


async def _serve():
    async with split_runs.ends() as ends, shaping_proxy.ShapingProxy(ends.gateway.port) as slow:
        slow.delay_s = 0.1
        sys.stdout.write(f"{ends.gateway.port} {slow.port}\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve())
