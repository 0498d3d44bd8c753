"""The providers of a case: wrong ones are found, and each computes what its name says."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fusedshape import timing
from fusedshape.bench import cases, providers, runner
from fusedshape.bench.cases import CASES, Setting
from fusedshape.models import vanilla_resnet
from fusedshape.ops import conv_act
from fusedshape.timing import Candidate
from tests.support.benchmarks import CPU


def test_wrong_providers_are_found() -> None:
    """The check of a layer sees a wrong value and a wrong gradient of each leaf."""
    case = next(
        case for case in CASES if case.name.startswith("conv_act") and case.suites[0] == "smoke"
    )
    made = case.build(Setting(CPU))
    assert made.truth is not None
    truth = made.truth()
    for name, candidate in made.candidates.items():
        if name == "bare":
            assert candidate.check is None
            continue
        assert candidate.check is not None
        found = candidate.check()
        assert max(runner.errors(found, truth).values()) < 1e-5
        for key in truth:
            spoiled = {**found, key: found[key] * 1.01}
            results: dict[str, Any] = {"fused": {"status": "ok"}, "eager": {"status": "ok"}}
            trial = {
                "fused": Candidate(lambda _: None, check=lambda s=spoiled: s, claims=True),
                "eager": made.candidates["eager"],
            }
            runner.check(made, trial, results)
            assert results["fused"]["status"] == "wrong"
            assert results["fused"]["why"].startswith(key)


def test_networks_are_measured_as_one_node_too() -> None:
    case = next(case for case in CASES if case.group == "net" and "smoke" in case.suites)
    made = case.build(Setting(CPU))
    results: dict[str, Any] = {name: {"status": "ok"} for name in made.candidates}
    runner.check(made, made.candidates, results)
    assert {name for name, result in results.items() if result["status"] == "ok"} == {
        *("fused", "fused chain", "eager", "folded", "inplace")
    }
    chained, fused = (made.candidates[name] for name in ("fused chain", "fused"))
    assert chained.claims
    nodes = [
        timing.saved_bytes(c.graph, made.leaves) for c in (chained, fused) if c.graph is not None
    ]
    assert nodes[0] == nodes[1] > 0

    def count(candidate: Candidate) -> int:
        """Count the nodes of the autograd graph."""
        assert candidate.graph is not None
        seen: set[Any] = set()
        left: list[Any] = [candidate.graph().grad_fn]  # type: ignore[attr-defined]
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                left += [before for before, _ in node.next_functions]
        return len([node for node in seen if "AccumulateGrad" not in node.name()])

    assert count(chained) < count(fused) / 2


def test_a_gradient_that_a_network_lacks_is_found() -> None:
    """The missing gradient is that of one bias, a small part of the whole."""
    net = partial(vanilla_resnet, 50, num_classes=10, width=8)
    made = providers.network(net, (2, 3, 32, 32), providers.How(0, CPU))
    spoiled = made.candidates["fused chain"]
    model = spoiled.check.__self__.model  # type: ignore[union-attr]
    name, bias = next((n, p) for n, p in model.named_parameters() if n.endswith("bias"))
    results: dict[str, Any] = {"fused chain": {"status": "ok"}, "eager": {"status": "ok"}}
    trial = {"fused chain": spoiled, "eager": made.candidates["eager"]}
    runner.check(made, trial, results)
    assert results["fused chain"]["status"] == "ok"
    bias.register_hook(torch.zeros_like)
    runner.check(made, trial, results)
    assert results["fused chain"]["status"] == "wrong"
    assert results["fused chain"]["why"].startswith(f"d{name} ")


def test_what_is_saved() -> None:
    """One activation a layer for ours, in either form; two for eager, whose γ is a product."""
    depth, shape = 5, (2, 8, 6)
    made = providers.chain(cases.spec_of("leaky_relu"), depth, shape, providers.How(0, CPU))
    one = 4 * 2 * 8 * 6 * 6
    saved = {
        name: timing.saved_bytes(c.graph, made.leaves)
        for name, c in made.candidates.items()
        if c.graph is not None
    }
    assert saved["fused"] == saved["fused chain"] == saved["inplace"] == depth * one
    # The input of each leaky_relu, and what the next convolution reads: but for the last, γ·φ.
    assert saved["eager"] == (2 * depth - 1) * one


def test_providers_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    names = {"fused", "fused aten", "fused triton", "reference"}
    assert set(providers.asked(conv_act, gpu)) == names
    assert set(providers.asked(conv_act, CPU)) == {"fused", "fused aten", "reference"}


def test_no_gradient_where_rounding_decides() -> None:
    z = torch.tensor([0.0, 1e-7, -1e-7, 1e-3, -1.0, 1.0])
    spec = cases.spec_of("leaky_relu")
    assert providers._undecided(z, spec).tolist() == [True] * 3 + [False] * 3
    assert not providers._undecided(z, cases.spec_of("tanh")).any()
