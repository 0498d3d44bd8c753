"""What diagnose costs beside a forward pass: python bench/bench_diagnose.py [--rounds N].

Round by round, each in turn: one forward pass; the measuring pass, which is that with everything
measured on the way; and all of diagnose, with prediction, the second pass on a few inputs, and the
verdict. Medians in seconds, and of the ratios to the forward pass of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusedshape import convert
from fusedshape.diagnose import diagnose
from fusedshape.diagnose.measure import sample
from fusedshape.diagnose.tape import Tape
from fusedshape.models.vanilla import vanilla_convnet, vanilla_mlp


def _converted(net: nn.Module) -> nn.Module:
    convert(net)
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "50 convolutions, 64 channels": (
        lambda: _converted(vanilla_convnet(50, 64, in_channels=3)),
        (32, 3, 32, 32),
    ),
    "100 convolutions, 64 channels": (
        lambda: _converted(vanilla_convnet(100, 64, in_channels=3)),
        (8, 3, 32, 32),
    ),
    "50 convolutions, 64 channels, plain": (
        lambda: vanilla_convnet(50, 64, in_channels=3),
        (32, 3, 32, 32),
    ),
    "50 linear layers, 1024 wide": (
        lambda: _converted(vanilla_mlp(50, 1024, in_features=1024)),
        (256, 1024),
    ),
    "100 linear layers, 64 wide": (
        lambda: _converted(vanilla_mlp(100, 64, in_features=64)),
        (32, 64),
    ),
}


def _steps(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    known: dict[Any, Any] = {}

    def measuring() -> None:
        Tape(model, len(x), sample, known).run(x)

    return {"forward": lambda: model(x), "measuring": measuring, "all": lambda: diagnose(model, x)}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"{'model':<36}{'input':<18}{'forward':>9}{'measuring':>16}{'all of it':>16}")
    for name, (make, shape) in CASES.items():
        steps = _steps(make(), torch.randn(shape))
        seconds: dict[str, list[float]] = {step: [] for step in steps}
        with torch.no_grad():
            for round_ in range(args.rounds + 1):
                for step, run in steps.items():
                    start = time.perf_counter()
                    run()
                    if round_:
                        seconds[step].append(time.perf_counter() - start)
        line = f"{name:<36}{'×'.join(map(str, shape)):<18}"
        line += f"{statistics.median(seconds['forward']):>8.3f}s"
        for step in ("measuring", "all"):
            pairs = zip(seconds[step], seconds["forward"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            line += f"{statistics.median(seconds[step]):>8.3f}s{ratio:>6.2f}×"
        print(line)


if __name__ == "__main__":
    main()
