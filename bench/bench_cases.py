"""Benchmarks of the host for pytest-benchmark: layers and networks on a CPU, calls, constants.

    pytest bench/ --benchmark-only

Cases, providers and checks are those of `fusedshape bench`, which times candidates in turns. Here
each is timed by itself, for the statistics and comparisons of pytest-benchmark.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedshape.bench import runner
from fusedshape.bench.cases import CASES, Case, Setting

GROUPS = ("overhead", "pointwise", "linear_act", "conv_act", "chain", "net", "constants")
HOST = [case for case in CASES if "smoke" in case.suites and case.group in GROUPS]
PROVIDERS = ("bare", "fused", "fused chain", "eager", "folded", "inplace")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", HOST, ids=lambda case: case.name)
def test_case(benchmark: Any, case: Case, provider: str) -> None:
    problem = case.build(Setting(torch.device("cpu")))
    if provider not in problem.candidates:
        pytest.skip(f"{provider} cannot do it")
    candidate = problem.candidates[provider]
    # A provider that fails its check is not timed.
    named = {n: c for n, c in problem.candidates.items() if c.yardstick or n == provider}
    results: dict[str, Any] = {name: {"status": "ok"} for name in named}
    runner.check(problem, named, results)
    assert results[provider]["status"] == "ok", results[provider]["why"]
    benchmark.group = case.name
    benchmark.pedantic(
        candidate.run, setup=lambda: ((candidate.prepare(),), {}), rounds=100, warmup_rounds=5
    )
