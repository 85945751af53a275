"""Compiles one program in a process of its own, whose flags are no other program's.

The folder in its command line holds `module` (MLIR bytecode) and `request.json`; it gets `hlo.txt`,
`memory.json` and a folder `dump`. What XLA and ptxas say goes to standard error.
"""

import json
import pathlib
import sys
from typing import Any

# Tells the plugin where the runtime of Mosaic kernels lies; without it none can be compiled.
import jax.experimental.mosaic.gpu  # noqa: F401
import numpy as np
from jax._src import compiler
from jax._src.interpreters import mlir
from jax._src.lib import _jax
from jax._src.lib.mlir import ir
from jax.experimental import topologies

# From 0.11 on PTX is dumped only if asked for by name.
_DUMPED: dict[str, Any] = {"xla_dump_hlo_as_text": True, "xla_dump_emitter_re": "ptx"}
_MEMORY = ("argument", "output", "alias", "temp")


def compile_folder(folder: pathlib.Path) -> None:
    """Compiles what lies in the folder and leaves there what came of it."""
    request = json.loads((folder / "request.json").read_text())
    num_devices = request["num_devices"]
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=request["target_config"],
        topology=f"1x1x{num_devices}",
    )
    executable = _compile(
        (folder / "module").read_bytes(),
        topology.devices,
        options=request["options"] | {"xla_dump_to": str(folder / "dump")},
    )
    (module,) = executable.hlo_modules()
    (folder / "hlo.txt").write_text(module.to_string())
    stats = executable.get_compiled_memory_stats()
    memory = {f"{name}_bytes": getattr(stats, f"{name}_size_in_bytes") for name in _MEMORY}
    (folder / "memory.json").write_text(json.dumps(memory))


def _compile(bytecode: bytes, devices: list[Any], *, options: dict[str, Any]) -> Any:
    with mlir.make_ir_context():
        module = ir.Module.parse(bytecode)
    settings = compiler.get_compile_options(
        num_replicas=1,
        num_partitions=len(devices),
        device_assignment=np.arange(len(devices))[None],
        env_options_overrides=_DUMPED | options,
    )
    return compiler.backend_compile_and_load(
        devices[0].client, module, _jax.DeviceList(tuple(devices)), settings, []
    )


if __name__ == "__main__":
    compile_folder(pathlib.Path(sys.argv[1]))
