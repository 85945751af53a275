"""The devices that an engine runs on: those of each replica, or of each process."""

import jax

from nanoflow_jax import config as config_lib


def replicas_of(section: config_lib.ParallelSection) -> list[list[jax.Device]]:
    """The devices of each replica.

    Raises:
        ValueError: There are fewer than the knobs ask for.
    """
    found, size = jax.devices(), section.tensor_parallel
    wanted = size * section.data_parallel
    if wanted > len(found):
        raise ValueError(
            f"--tensor_parallel={size} and --data_parallel={section.data_parallel} need {wanted} "
            f"devices and there are {len(found)}; on a CPU "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes as many"
        )
    return [found[i : i + size] for i in range(0, wanted, size)]


def shared(config: config_lib.EngineConfig) -> list[jax.Device]:
    """As many devices of each process, in their order.

    Raises:
        ValueError: A process has too few.
    """
    size, count = config.parallel.tensor_parallel, config.processes.num_processes
    found: list[jax.Device] = []
    for i in range(count):
        own = [device for device in jax.devices() if device.process_index == i]
        if len(own) < size // count:
            raise ValueError(
                f"--tensor_parallel={size} needs {size // count} devices of each of "
                f"--num_processes={count}, and process {i} has {len(own)}"
            )
        found += own[: size // count]
    return found


def name(kind: str, config: config_lib.EngineConfig) -> str:
    """What an engine runs on, for people; `kind` is what one device is called."""
    section, count = config.parallel, config.processes.num_processes
    text = kind if section.tensor_parallel == 1 else f"{section.tensor_parallel} x {kind}"
    text += "" if count == 1 else f" in {count} processes"
    each = "" if section.data_parallel == 1 else f"{section.data_parallel} replicas, each "
    return each + text
