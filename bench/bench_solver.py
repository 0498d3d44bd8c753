"""Seconds to solve for the constants of an activation: fusedshape beside the package dks 0.1.2.

python -m bench.bench_solver [--json bench/results/NAME.json] [--limit N] [--rounds R] [--timeout S]

fusedshape solves every case of tests/theory/vectors/dks_reference.json. dks solves the subset made
of the first case of every pair (activation, method), --limit of them, each in a fresh process after
a first integral has loaded its nodes, and with --timeout seconds at most: a case that takes longer
counts as that long. Ratios are of the same case on both sides; import time counts for neither.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.common import ROOT, print_header, write
from fusedshape import theory

VECTORS = ROOT / "tests/theory/vectors/dks_reference.json"
NETS: dict[str, theory.SubnetMax] = {
    "resnet50_w0": theory.resnet(50),
    "resnet101_w0.6": theory.resnet(101, 0.6),
    "mlp20": theory.chain(20),
    "mlp100": theory.chain(100),
}
OURS = {
    "c_slope_1_target": "zeta",
    "local_q_slope_target": "q_slope",
    "c_val_0_target": "eta",
    "c_curve_target": "tau",
}


def cases() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(VECTORS.read_text())["cases"]
    return found


def subset(limit: int | None = None) -> list[dict[str, Any]]:
    """The first case of every (activation, method)."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for case in cases():
        first.setdefault((case["activation"], case["method"]), case)
    return list(first.values())[:limit]


def ours(case: dict[str, Any]) -> Callable[[], object]:
    targets = {OURS[name]: value for name, value in case["targets"].items()}
    net = NETS[case["net"]]
    return lambda: theory.solve(case["method"], case["activation"], subnet_max=net, **targets)


def dks_worker(text: str) -> None:
    """In a process of its own: solve one case with dks and print the seconds it took."""
    import numpy as np
    from dks.base import activation_transform as dks

    case = json.loads(text)
    dks._estimate_gaussian_mean(np.tanh)
    targets = {f"{case['method'].lower()}_params": case["targets"]}
    start = time.perf_counter()
    dks._get_activations_params(
        [case["activation"]],
        method=case["method"],
        subnet_max_func=NETS[case["net"]],
        **targets,
    )
    print(time.perf_counter() - start)


def theirs(case: dict[str, Any], timeout: float) -> tuple[float, str]:
    """Seconds, and what became of it: solved, timeout or failed."""
    command = [sys.executable, "-m", "bench.bench_solver", "--worker", json.dumps(case)]
    # One thread on both sides; main() sees to its own.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=env
        )
    except subprocess.TimeoutExpired:
        return timeout, "timeout"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        if "ModuleNotFoundError" in last:
            raise SystemExit(f"dks cannot be imported: {last}; pip install dks==0.1.2 absl-py")
        return float("nan"), f"failed: {last}"
    return float(done.stdout.split()[-1]), "solved"


def seconds(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.parametrize("case", subset(), ids=lambda c: f"{c['activation']}-{c['method']}")
def test_solve(benchmark: Any, case: dict[str, Any]) -> None:
    benchmark.pedantic(ours(case), rounds=3, warmup_rounds=1)


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="solves per case, ours")
    parser.add_argument("--limit", type=int, help="cases of the subset to give dks; 0 for none")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for a case of dks")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        return dks_worker(args.worker)
    import torch

    torch.set_num_threads(1)
    print_header()
    ours(cases()[0])()  # imports of the first call
    every = [seconds(ours(case), args.rounds) for case in cases()]
    print(
        f"fusedshape, {len(every)} cases: median {1e3 * statistics.median(every):.1f} ms, "
        f"slowest {1e3 * max(every):.1f} ms"
    )
    rows: list[dict[str, Any]] = []
    for case in subset(args.limit):
        own = seconds(ours(case), args.rounds)
        other, outcome = theirs(case, args.timeout)
        name = {key: case[key] for key in ("net", "activation", "method", "targets")}
        rows.append({**name, "fusedshape_s": own, "dks_s": other, "dks": outcome})
        print(
            f"{case['net']:<15} {case['activation']:<11} {case['method']}  "
            f"fusedshape {1e3 * own:7.1f} ms  dks {1e3 * other:9.1f} ms  "
            f"ratio {other / own:7.1f}  {outcome}",
            flush=True,
        )
    ratios = [row["dks_s"] / row["fusedshape_s"] for row in rows if row["dks_s"] == row["dks_s"]]
    summary = {
        "all_cases_median_ms": 1e3 * statistics.median(every),
        "all_cases_max_ms": 1e3 * max(every),
        "median_ratio": statistics.median(ratios) if ratios else None,
    }
    if ratios:
        print(
            f"median of {len(ratios)} paired ratios dks / fusedshape: {summary['median_ratio']:.1f}"
        )
    write(args.json, rows, **summary)
    return None


if __name__ == "__main__":
    main()
