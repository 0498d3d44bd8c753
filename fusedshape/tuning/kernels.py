"""A kernel's configuration as the cache keeps it: kernel, problem and configuration."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any, NamedTuple

import torch

from fusedshape.kernels.tuned import Tunable, family_of
from fusedshape.tuning.cache import Record
from fusedshape.tuning.problems import bucket

#: What each kernel calls its problem.
_KERNELS = {"conv": "Convolution", "gemm": "Product"}


class KernelConfig(NamedTuple):
    """One configuration of a kernel.

    Attributes:
        tunable: the kernel's choice of a configuration.
        args: what it is asked with; the last but one is the kernel's problem, the last the GPU.
        config: the answer.
    """

    tunable: Tunable
    args: tuple[Any, ...]
    config: Any

    def to_json(self) -> dict[str, Any]:
        """JSON data, without the GPU, which is the environment's."""
        *before, problem, _ = self.args
        return {
            "kernel": self.tunable.name,
            "before": before,
            "problem": {k: _encoded(v) for k, v in dataclasses.asdict(problem).items()},
            "config": dataclasses.asdict(self.config),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], device: torch.device) -> KernelConfig:
        """Inverse of `to_json`, on a device of the same kind.

        Raises:
            ValueError: a kernel, problem or configuration that is not to be had.
            ImportError: the kernels' Triton is not installed.
        """
        name = data.get("kernel")
        if name not in _KERNELS:
            raise ValueError(f"unknown kernel {name!r}; known: {', '.join(_KERNELS)}")
        module = importlib.import_module(f"fusedshape.kernels.{name}")
        host = importlib.import_module("fusedshape.kernels.host")
        try:
            kind = getattr(module, _KERNELS[name])
            problem = kind(**{k: _decoded(v) for k, v in data["problem"].items()})
            args = (*data["before"], problem, host.gpu_of(device))
            candidates = module.config_for.candidates(*args)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no problem of kernel {name}: {error}") from None
        for config in candidates:
            if dataclasses.asdict(config) == data.get("config"):
                return cls(module.config_for, args, config)
        raise ValueError(f"kernel {name} has no configuration {data.get('config')}")

    def pin(self, size: int) -> None:
        """Pin the configuration for the whole bucket of `size`, where it was measured."""
        # The kernel may count rows where `size` counts images, several rows for each.
        each = family_of(self.args)[1] // size
        high = bucket(size)
        self.tunable.pin(self.args, (high // 2 + 1) * each, high * each, self.config)


def adopt(record: Record, device: torch.device) -> str:
    """Pin the recorded configuration and return the record's engine.

    A configuration that is pinned already, by the same shapes under another activation, stays.

    Raises:
        ValueError, ImportError: as `KernelConfig.from_json`.
    """
    if record.kernel is not None:
        own = KernelConfig.from_json(record.kernel, device)
        if own.tunable.pinned(*own.args) is None:
            own.pin(record.size)
    return record.engine


def _encoded(value: Any) -> Any:
    return str(value) if isinstance(value, torch.dtype) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and value.startswith("torch."):
        return getattr(torch, value.removeprefix("torch."))
    return value
