"""Memory throughput of the CPU kernels: every activation, beside eager torch and a plain pass.

`add_` is torch's own x.add_(1), what one pass over memory costs. Eager runs the same function as
one torch operation after the other, the bias included. Bytes counted are those a single pass has
to move, whatever the provider moves: GB/s are comparable across a row.

    python -m bench.bench_native [--shape 32 64 56 56] [--channels-last] [--dtype bfloat16]
                                 [--threads 2] [--json results.json]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import print_header, write
from fusedshape import ACTIVATIONS, ActSpec, native, reference

OPS = torch.ops.fusedshape

EAGER: dict[str, Callable[[Tensor, float], Tensor]] = {
    # what a user would write, where torch has it in one operation; else the table's
    "relu": lambda u, a: F.relu(u),
    "leaky_relu": F.leaky_relu,
    "softplus": lambda u, a: F.softplus(u),
    "elu": lambda u, a: F.elu(u),
    "selu": lambda u, a: F.selu(u),
    "softsign": lambda u, a: F.softsign(u),
    "swish": lambda u, a: F.silu(u),
    "gelu": lambda u, a: F.gelu(u, approximate="tanh"),
    "gelu_exact": lambda u, a: F.gelu(u),
}


def best_seconds(
    calls: list[Callable[[], object]], before: Callable[[], object], rounds: int
) -> list[float]:
    """Fastest of `rounds` for each call, each after an untimed `before`; calls take turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds + 1):  # one to warm up
        for i, call in enumerate(calls):
            before()
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def eager_forward(x: Tensor, bias: Tensor, spec: ActSpec) -> Tensor:
    u = spec.input_scale * (x + bias.view(-1, *[1] * (x.ndim - 2))) + spec.input_shift
    phi = EAGER.get(spec.activation, spec.row.value)
    return spec.output_scale * (phi(u, spec.negative_slope) + spec.output_shift)


def measure(x: Tensor, rounds: int) -> list[dict[str, float | str]]:
    """One result per activation, in GB/s."""
    bias = torch.randn(x.shape[1]).to(x.dtype)
    grad = torch.randn_like(x)
    scratch = torch.randn_like(x)
    size = x.numel() * x.element_size()
    results: list[dict[str, float | str]] = []
    for name, row in ACTIVATIONS.items():
        spec = ActSpec(name, 0.9, 0.1, -0.2, 1.1, 0.3 if row.has_slope else 0.0)
        args = (1, *spec.kernel_args)
        y = OPS.native_bias_act(x, bias, *args)
        saved, b = (y, None) if spec.saves_output else (x, bias)
        leaf = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            out = eager_forward(leaf, bias.clone().requires_grad_(), spec)

        calls: list[Callable[[], object]] = [
            lambda: scratch.add_(1),
            lambda args=args: OPS.native_bias_act_(scratch, bias, *args),
            lambda args=args: OPS.native_bias_act(x, bias, *args),
            lambda spec=spec: eager_forward(x, bias, spec),
            lambda args=args, saved=saved, b=b, spec=spec: OPS.native_act_grad(
                grad, saved, b, *args, spec.saves_output, True
            ),
            lambda spec=spec, saved=saved, b=b: reference.channel_sum(
                reference.act_grad(grad, saved, b, spec, 1), 1
            ),
            lambda out=out: out.backward(grad, retain_graph=True),
        ]
        # in place, a function applied again and again would run into its fixed points
        add, inplace, fresh, eager, bwd, plain_bwd, eager_bwd = best_seconds(
            calls, lambda: scratch.copy_(x), rounds
        )
        results.append(
            {
                "activation": name,
                "add_": 2 * size / add / 1e9,
                "native_": 2 * size / inplace / 1e9,
                "native": 2 * size / fresh / 1e9,
                "eager": 2 * size / eager / 1e9,
                "native grad": 3 * size / bwd / 1e9,
                "reference grad": 3 * size / plain_bwd / 1e9,
                "eager grad": 3 * size / eager_bwd / 1e9,
            }
        )
        del out
    return results


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs="+", default=[32, 64, 56, 56])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not native.available():
        parser.error(f"the CPU kernels are not to be had: {native.why_not()}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.shape).to(getattr(torch, options.dtype))
    if options.channels_last:
        x = x.to(memory_format=torch.channels_last)
    layout = "channels_last" if options.channels_last else "contiguous"
    print_header()
    print(f"{options.dtype} {tuple(x.shape)} {layout}, fastest of {options.rounds} rounds, GB/s")
    with torch.no_grad():
        results = measure(x, options.rounds)
    columns = [key for key in results[0] if key != "activation"]
    print(f"{'':12}" + "".join(f"{column:>16}" for column in columns))
    for result in results:
        print(f"{result['activation']:12}" + "".join(f"{result[c]:16.1f}" for c in columns))
    write(options.json, results, shape=list(x.shape), layout=layout, dtype=options.dtype)


if __name__ == "__main__":
    main()
