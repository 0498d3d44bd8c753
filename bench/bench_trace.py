"""How long it takes to read a model's wiring and to solve for it: python bench/bench_trace.py.

The median of several runs, of reading alone and of reading and solving, in seconds; TAT for
leaky_relu.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fusedshape import theory

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import zoo


class Loop(nn.Module):
    """A chain called layer by layer in its own forward, the slow way to be read."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers, self.act = nn.ModuleList(nn.Linear(1, 1) for _ in range(depth)), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """x: (…, 1) → (…, 1)."""
        for layer in self.layers:
            x = self.act(layer(x))
        return x


def chain(depth: int) -> nn.Module:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(1, 1), nn.ReLU())))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50 v2, shortcut weight 0.5": lambda: zoo.ResNet(50, 2, 0.5),
    "ResNet-152 v1, shortcut weight 0.5": lambda: zoo.ResNet(152, 1, 0.5),
    "ResNet-152 v2, shortcut weight 0.5": lambda: zoo.ResNet(152, 2, 0.5),
    "chain of 1,000 layers": lambda: chain(1_000),
    "chain of 10,000 layers": lambda: chain(10_000),
    "chain of 10,000 layers, in a loop": lambda: Loop(10_000),
}


def main(runs: int = 5) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    theory.solve("TAT", "leaky_relu", depth=16)  # imports SciPy
    print(f"{'model':<36}{'reading':>10}{'and solving':>13}")
    for name, make in MODELS.items():
        model, reading, whole = make(), [], []
        for _ in range(runs):
            start = time.perf_counter()
            wiring = theory.trace_wiring(model)
            reading.append(time.perf_counter() - start)
            theory.solve("TAT", "leaky_relu", subnet_max=wiring)
            whole.append(time.perf_counter() - start)
        print(f"{name:<36}{statistics.median(reading):>9.3f}s{statistics.median(whole):>12.3f}s")


if __name__ == "__main__":
    main()
