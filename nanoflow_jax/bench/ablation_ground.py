"""Which model runs on which device, before anything is loaded."""

import dataclasses
from typing import Any

import jax
import numpy as np

from nanoflow_jax import config as config_lib
from nanoflow_jax.bench.ablation_modes import Mode
from nanoflow_jax.engine import build, executors, kernel_choice, model_source
from nanoflow_jax.models import operations as operation_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ground:
    """What is known before anything is loaded.

    Attributes:
        config: The knobs.
        source: The opened model.
        device: The one it will run on.
    """

    config: config_lib.EngineConfig
    source: model_source.ModelSource
    device: jax.Device

    def __post_init__(self) -> None:
        section, processes = self.config.parallel, self.config.processes
        if section.tensor_parallel * section.data_parallel * processes.num_processes > 1:
            raise ValueError(
                "ablation compares modes on one device; leave out --tensor_parallel, "
                "--data_parallel and --num_processes"
            )
        if self.config.plans.executor is not config_lib.Executor.AUTO:
            raise ValueError(
                f"--executor={self.config.plans.executor}: ablation compares all executors that "
                "run here; leave it out"
            )
        if self.config.batch.batch_invariant:
            raise ValueError(
                "ablation compares modes that change last bits; leave out --batch_invariant, whose "
                "cost python -m nanoflow_jax.bench invariance measures"
            )

    @property
    def on_gpu(self) -> bool:
        """Whether the device is one."""
        return self.device.platform == "gpu"

    @property
    def machine(self) -> kernel_choice.Machine:
        """Where it will run."""
        return kernel_choice.machine_of(self.device)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the model as it will run."""
        return model_source.run_dtype(
            self.config.model.dtype, self.source.stored_dtype, self.device.platform
        )

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self.config.cache.page_size or build.defaults_of(self.device).page_size

    @property
    def served(self) -> kernel_choice.Served:
        """What kernels are asked about."""
        return kernel_choice.Served(
            config=self.source.config, dtype=self.dtype, page_size=self.page_size
        )

    def choices(self, mode: Mode) -> kernel_choice.Choices:
        """What a mode's operations are made of.

        Raises:
            ValueError: They cannot be had here.
        """
        return kernel_choice.choose(
            mode.kernels, self.machine, self.served, caps_products=mode.caps_products
        )

    def operations(self, mode: Mode) -> operation_lib.Operations:
        """What a mode's layers are made of, attention left out.

        Raises:
            ValueError: They cannot be had here.
        """
        return executors.operations(mode.executor, self.choices(mode), self.served.config)
