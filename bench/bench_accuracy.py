"""Error of the fused op and of eager op by op against float64, for each activation and half dtype.

Constants are those a 50-layer network gets: DKS for smooth activations, TAT for leaky_relu. Eager
is what one writes without this library, γ(φ(αx + β) + δ) in the tensor's dtype, differentiated by
autograd. Errors are root mean squares over standard normal inputs, relative to the truth's.

    python -m bench.bench_accuracy [--json bench/results/NAME.json]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import print_header, write
from fusedshape import ACTIVATIONS, ActSpec, shaped_act, theory

DEPTH = 50


def constants(name: str) -> ActSpec | None:
    """Realistic constants, or None where no method has any for this activation."""
    for method in ("TAT", "DKS") if name == "leaky_relu" else ("DKS",):
        try:
            return theory.solve(method, name, depth=DEPTH)
        except ValueError:
            continue
    return None


def eager(x: Tensor, spec: ActSpec) -> Tensor:
    """The transform, one rounding an operation."""
    v = spec.row.value(spec.input_scale * x + spec.input_shift, spec.negative_slope)
    return spec.output_scale * (v + spec.output_shift)


def errors(spec: ActSpec, dtype: torch.dtype, n: int = 1 << 20) -> dict[str, float]:
    """Relative root-mean-square errors of value and gradient, fused and eager."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(n, generator=generator).to(dtype) for _ in range(2))

    def both(f: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = f(leaf, spec)
        return y.detach().double(), torch.autograd.grad(y, leaf, grad.to(dtype))[0].double()

    truth, fused, plain = (
        both(eager, torch.float64),
        both(shaped_act, dtype),
        both(eager, dtype),
    )
    row = {}
    for i, part in enumerate(("value", "gradient")):
        scale = truth[i].square().mean().sqrt()
        for name, got in (("fused", fused[i]), ("eager", plain[i])):
            row[f"{part} {name}"] = float((got - truth[i]).square().mean().sqrt() / scale)
    return row


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_header()
    print(f"{'':12} {'':9} {'γ':>7} {'value error':>25} {'gradient error':>33}")
    cells = f"{'fused':>10} {'eager':>9} {'×':>6}"
    print(f"{'activation':12} {'dtype':9} {'':7} {cells}   {cells}")
    rows = []
    for name in ACTIVATIONS:
        spec = constants(name)
        if spec is None:
            continue
        for dtype in (torch.bfloat16, torch.float16):
            row = errors(spec, dtype)
            rows.append({"dtype": str(dtype)[6:], **spec.to_dict(), **row})
            line = f"{name:12} {str(dtype)[6:]:9} {spec.output_scale:7.2f}"
            for part in ("value", "gradient"):
                fused, plain = row[f"{part} fused"], row[f"{part} eager"]
                line += f" {fused:10.2e} {plain:9.2e} {plain / fused:6.1f}  "
            print(line)
    write(args.json, rows)


if __name__ == "__main__":
    main()
