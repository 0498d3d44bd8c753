"""conv_act, forward and backward, over ResNet-50's convolutions on this machine's CPU.

Providers: bare (the convolution with its bias and no activation at all), eager (convolution,
F.leaky_relu, times γ), folded (convolution, F.leaky_relu: the stock form once γ is in the weights),
compiled (torch.compile of eager), fused (fusedshape.conv_act).

    python -m bench.bench_conv [--rounds 15] [--batch 8] [--json bench/results/NAME.json]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import interleaved, print_header, ratio, write
from fusedshape import ActSpec, conv_act

# (in channels, out channels, kernel, stride, input size): each distinct convolution of ResNet-50.
RESNET50 = [
    (3, 64, 7, 2, 224),
    (64, 64, 1, 1, 56),
    (64, 64, 3, 1, 56),
    (64, 256, 1, 1, 56),
    (256, 64, 1, 1, 56),
    (256, 128, 1, 1, 56),
    (128, 128, 3, 2, 56),
    (128, 512, 1, 1, 28),
    (256, 512, 1, 2, 56),
    (512, 128, 1, 1, 28),
    (128, 128, 3, 1, 28),
    (512, 256, 1, 1, 28),
    (256, 256, 3, 2, 28),
    (256, 1024, 1, 1, 14),
    (512, 1024, 1, 2, 28),
    (1024, 256, 1, 1, 14),
    (256, 256, 3, 1, 14),
    (1024, 512, 1, 1, 14),
    (512, 512, 3, 2, 14),
    (512, 2048, 1, 1, 7),
    (1024, 2048, 1, 2, 14),
    (2048, 512, 1, 1, 7),
    (512, 512, 3, 1, 7),
]
SPEC = ActSpec("leaky_relu", negative_slope=0.4259, output_scale=1.301119175166785)
Step = Callable[[], tuple[Tensor, ...]]


def providers(shape: tuple[int, int, int, int, int], batch: int, compiled: bool) -> dict[str, Step]:
    """One training step of a layer, forward and backward, in each form."""
    cin, cout, k, stride, size = shape
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, cin, size, size, generator=generator)
    x = image.to(memory_format=torch.channels_last).requires_grad_(cin != 3)
    w = torch.randn(cout, cin, k, k, generator=generator) / (cin * k * k) ** 0.5
    w = w.to(memory_format=torch.channels_last).requires_grad_()
    b = torch.zeros(cout, requires_grad=True)
    gamma, slope = SPEC.output_scale, SPEC.negative_slope
    conv = {"stride": stride, "padding": k // 2}

    def bare() -> Tensor:
        return F.conv2d(x, w, b, **conv)

    def eager() -> Tensor:
        return gamma * F.leaky_relu(F.conv2d(x, w, b, **conv), slope)

    def folded() -> Tensor:
        return F.leaky_relu(F.conv2d(x, w, b, **conv), slope)

    def fused() -> Tensor:
        return conv_act(x, w, b, SPEC, **conv)

    forms: dict[str, Callable[[], Tensor]] = {
        "bare": bare,
        "fused": fused,
        "eager": eager,
        "folded": folded,
    }
    if compiled:
        torch._dynamo.reset()
        forms["compiled"] = torch.compile(eager, fullgraph=True)
    leaves = [t for t in (x, w, b) if t.requires_grad]
    out = bare()
    grad = torch.randn(out.shape, generator=generator).to(memory_format=torch.channels_last)

    def step(form: Callable[[], Tensor]) -> Step:
        def run() -> tuple[Tensor, ...]:
            y = form()
            return (y.detach(), *torch.autograd.grad(y, leaves, grad))

        return run

    return {name: step(form) for name, form in forms.items()}


def agrees(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Whether two float32 results differ by no more than the rounding of their sums explains."""
    return all(
        (g - w).abs().amax() <= 1e-4 * w.abs().amax() for g, w in zip(got, want, strict=True)
    )


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print_header()
    names = ["eager", "folded"] + ([] if args.no_compile else ["compiled"])
    print(
        f"forward + backward, batch {args.batch}, channels_last, float32; median of paired ratios"
    )
    print(
        f"{'layer':24} {'bare ms':>8} {'fused/bare':>10}", *(f"{n + '/fused':>14}" for n in names)
    )
    rows: list[dict[str, Any]] = []
    for shape in RESNET50:
        steps = providers(shape, args.batch, not args.no_compile)
        if not agrees(steps["fused"](), steps["eager"]()):
            print(f"{shape}: fused and eager disagree; no time is reported")
            rows.append({"shape": shape, "correct": False})
            continue
        times = interleaved(steps, args.rounds)
        row: dict[str, Any] = {
            "shape": shape,
            "correct": True,
            "ms": {name: 1e3 * statistics.median(t) for name, t in times.items()},
            "fused/bare": ratio(times, "fused", "bare"),
            **{f"{n}/fused": ratio(times, n, "fused") for n in names},
        }
        rows.append(row)
        cin, cout, k, stride, size = shape
        layer = f"{cin}→{cout} {k}×{k}/{stride} {size}²"
        cells = (f"{row[f'{n}/fused']:14.3f}" for n in names)
        print(f"{layer:24} {row['ms']['bare']:8.2f} {row['fused/bare']:10.3f}", *cells, flush=True)
    keys = ["fused/bare", *(f"{n}/fused" for n in names)]
    good = [row for row in rows if row["correct"]]
    means = {key: statistics.geometric_mean(row[key] for row in good) for key in keys}
    print(f"{'geometric mean':24} {'':8} {means['fused/bare']:10.3f}", end="")
    print("", *(f"{means[f'{n}/fused']:14.3f}" for n in names))
    write(args.json, rows, geometric_mean=means)


if __name__ == "__main__":
    main()
