"""Solvers as candidates: this library's own, and the package dks if it is installed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fusedshape import theory
from fusedshape.bench.providers import Task
from fusedshape.spec import ActSpec
from fusedshape.theory import maps
from fusedshape.timing import Candidate

ZETA, ETA, TAU = 1.5, 0.9, 0.3
#: Seconds that dks may take for one case.
PATIENCE = 60.0

# dks runs in a process of its own, so that nothing it caches helps the next case. One integral is
# computed before the clock starts, because the first one loads the nodes of the quadrature. The
# network is a chain of `depth` nonlinear layers.
_DKS = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
from dks.base import activation_transform as dks
method, activation, depth, targets = json.loads(sys.argv[1])
def net(x, r):
    for _ in range(depth):
        x = r(x)
    return x
dks._estimate_gaussian_mean(np.tanh)
start = time.perf_counter()
found = dks._get_activations_params(
    [activation], method=method, subnet_max_func=net, **{method.lower() + "_params": targets}
)
seconds = time.perf_counter() - start
print(json.dumps([seconds, {key: float(value) for key, value in found[activation].items()}]))
"""


@dataclass(frozen=True)
class _Dks:
    method: str
    activation: str
    depth: int

    @cached_property
    def answer(self) -> tuple[float, dict[str, float]]:
        """The seconds that dks takes, and the constants that it finds."""
        targets = (
            {"c_slope_1_target": ZETA}
            if self.method == "DKS"
            else {"c_val_0_target": ETA, "c_curve_target": TAU}
        )
        case = json.dumps([self.method, self.activation, self.depth, targets])
        try:
            done = subprocess.run(
                [sys.executable, "-c", _DKS, case],
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no answer after {PATIENCE:.0f} s") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            if "ModuleNotFoundError" in last:
                last += "; install it with: pip install dks==0.1.2 absl-py"
            raise RuntimeError(last)
        seconds, constants = json.loads(done.stdout.strip().splitlines()[-1])
        return seconds, constants

    def check(self) -> dict[str, Tensor]:
        return {"conditions": achieved(self.method, self._spec(), self.depth)[0]}

    def run(self, _: object) -> float:
        return self.answer[0]

    def _spec(self) -> ActSpec:
        return ActSpec.from_dict({"activation": self.activation, **self.answer[1]})


def achieved(method: str, spec: ActSpec, depth: int, eta: float = ETA) -> tuple[Tensor, Tensor]:
    """Values of a method's conditions in a chain of `depth` layers, and their targets."""
    q = maps.q_map(spec, 1.0)
    if method == "TAT" and spec.activation == "leaky_relu":
        c = 0.0
        for _ in range(depth):
            c = maps.c_map(spec, c)
        pairs = [(q, 1.0), (c, eta)]
    elif method == "TAT":
        curve = depth * maps.c_curve(spec, corners=False)
        slopes = [maps.q_slope(spec), maps.c_slope(spec)]
        pairs = [(q, 1.0), (curve, TAU), *((s, 1.0) for s in slopes)]
    else:
        slope = math.exp(depth * math.log(maps.c_slope(spec)))
        pairs = [(q, 1.0), (slope, ZETA), (maps.c_map(spec, 0.0), 0.0)]
        # relu has one effective constant less than the others, so Q′(1) cannot be chosen.
        pairs += [] if spec.activation == "relu" else [(maps.q_slope(spec), 1.0)]
    found, wanted = zip(*pairs, strict=True)
    return torch.tensor(found, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)


def constants(
    method: str, activation: str, depth: int, *, eta: float = ETA, beside: bool = True
) -> Task:
    """Solve for the constants of one activation in a plain chain, beside dks.

    Both are checked against the conditions of the method to 1e-3, because dks meets some of them
    to 1e-4 only.
    """

    def solve() -> ActSpec:
        if method == "DKS":
            return theory.dks(activation, depth=depth, zeta=ZETA)
        return theory.tat(activation, depth=depth, eta=eta, tau=TAU)

    def check() -> dict[str, Tensor]:
        return {"conditions": achieved(method, solve(), depth, eta)[0]}

    candidates = {"fused": Candidate(lambda _: solve(), check=check, claims=True)}
    if beside:
        dks = _Dks(method, activation, depth)
        candidates["dks"] = Candidate(dks.run, check=dks.check, self_timed=True, most=1)
    return Task(
        candidates,
        lambda: {"conditions": achieved(method, solve(), depth, eta)[1]},
        tolerance=1e-3,
    )


def importing() -> Task:
    """Seconds that importing this library adds to importing torch, and those of torch.

    The bytecode of both is cached first, as it is after an installation.
    """
    bytecode = tempfile.TemporaryDirectory()

    def seconds(before: str, code: str) -> Candidate:
        clock = "time.perf_counter()"
        program = f"import time; {before}; t = {clock}; {code}; print({clock} - t)"

        def run(_: object) -> float:
            command = [sys.executable, "-c", program]
            env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
            env["PYTHONPYCACHEPREFIX"] = bytecode.name
            done = subprocess.run(command, capture_output=True, check=True, text=True, env=env)
            return float(done.stdout)

        return Candidate(run, self_timed=True)

    fused = replace(seconds("import torch", "import fusedshape"), claims=True)
    return Task({"fused": fused, "bare": seconds("pass", "import torch")})
