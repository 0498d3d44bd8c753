"""What a call costs before any arithmetic, and what importing the package adds.

python -m bench.bench_overhead [--json bench/results/NAME.json]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.common import interleaved, print_header, ratio, write
from fusedshape import ActSpec, shaped_act

SPEC = ActSpec("leaky_relu", negative_slope=0.4, output_scale=1.3)
CALLS = 1000


def _steps() -> dict[str, Any]:
    x = torch.randn(4, requires_grad=True)
    grad = torch.ones(4)

    def repeat(f: Any) -> Any:
        def run() -> None:
            for _ in range(CALLS):
                torch.autograd.grad(f(x), x, grad)

        return run

    return {
        "shaped_act": repeat(lambda x: shaped_act(x, SPEC)),
        "leaky_relu": repeat(lambda x: F.leaky_relu(x, 0.4)),
    }


def import_seconds(code: str) -> float:
    """Wall time of `code` in a fresh interpreter, measured inside it."""
    program = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return float(done.stdout)


def test_call_overhead(benchmark: Any) -> None:
    x = torch.randn(4, requires_grad=True)
    benchmark(lambda: torch.autograd.grad(shaped_act(x, SPEC).sum(), x))


@pytest.mark.parametrize("name", ["shaped_act", "leaky_relu"])
def test_thousand_calls(benchmark: Any, name: str) -> None:
    benchmark.pedantic(_steps()[name], rounds=3)


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_header()
    times = interleaved(_steps(), args.rounds)
    micro = {name: 1e6 * statistics.median(t) / CALLS for name, t in times.items()}
    calls = ratio(times, "shaped_act", "leaky_relu")
    print(f"forward + backward of 4 numbers: shaped_act {micro['shaped_act']:.1f} µs, ", end="")
    print(f"F.leaky_relu {micro['leaky_relu']:.1f} µs, median of paired ratios {calls:.2f}")
    inside = "import torch; t = time.perf_counter(); import fusedshape"
    added = [1e3 * import_seconds(inside) for _ in range(9)]
    alone = [1e3 * import_seconds("import torch") for _ in range(3)]
    print(
        f"import fusedshape after import torch: {statistics.median(added):.1f} ms "
        f"(import torch: {statistics.median(alone):.0f} ms)"
    )
    row = {"microseconds": micro, "ratio": calls, "import_ms": statistics.median(added)}
    write(args.json, [row])


if __name__ == "__main__":
    main()
