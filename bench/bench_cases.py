"""pytest-benchmark over the cases that cost the host: layers on a CPU, call overhead, constants.

    pytest bench/ --benchmark-only

Cases and providers are those of `fusedshape bench`, which times them in turns and checks them; here
each stands by itself, for pytest-benchmark's own statistics and comparisons.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusedshape.bench.cases import CASES, Case, Setting

GROUPS = ("overhead", "pointwise", "linear_act", "conv_act", "constants")
HOST = [case for case in CASES if "smoke" in case.suites and case.group in GROUPS]


@pytest.mark.parametrize("provider", ["bare", "fused", "eager", "folded", "inplace"])
@pytest.mark.parametrize("case", HOST, ids=lambda case: case.name)
def test_case(benchmark: Any, case: Case, provider: str) -> None:
    candidate = case.build(Setting(torch.device("cpu"))).candidates.get(provider)
    if candidate is None:
        pytest.skip(f"{provider} cannot do it")
    benchmark.group = case.name
    benchmark.pedantic(
        candidate.run, setup=lambda: ((candidate.prepare(),), {}), rounds=100, warmup_rounds=5
    )
