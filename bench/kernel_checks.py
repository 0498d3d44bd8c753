"""Holds each kernel of the GPU against float64, the most doubtful first; one row a configuration.

python -m bench.kernel_checks FILE [--seconds 120] [--pattern '3x3*'] [--share 1/8]

A row is written as "running" before its kernel starts and again when it has ended, so that a kernel
that kills the process is named in the file. Started again, the program goes on behind that row.
Most of the time is the compiler's, so that several processes with a share each are faster.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fusedshape import reference
from fusedshape.bench.cases import SHAPED, spec_of
from fusedshape.files import expect, read_json, with_checksum, without_checksum, write_json
from fusedshape.kernels import tuned
from fusedshape.machine import provenance
from fusedshape.ops.engines import ATEN, BACKENDS, ENGINES
from fusedshape.ops.passes import Kernels
from fusedshape.ops.problem import Direction, Problem
from fusedshape.spec import saves_output
from fusedshape.tuning.contest import difference_of
from fusedshape.tuning.problems import Operands, operands, terms_of

TRITON, TRITON_PASSES = ENGINES["triton"], BACKENDS["triton"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}


class Layer(NamedTuple):
    """The shapes of a layer: input, weight, stride and padding of both dimensions."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: int = 1
    padding: int = 0


#: One of each kind of code path; sizes are no multiples of the tiles.
LAYERS = {
    "3x3": Layer((4, 72, 29, 28), (80, 72, 3, 3), 1, 1),
    "3x3-strided": Layer((4, 64, 29, 28), (64, 64, 3, 3), 2, 1),
    "5x5": Layer((2, 40, 15, 14), (48, 40, 5, 5), 1, 2),
    "stem": Layer((2, 3, 61, 60), (40, 3, 7, 7), 2, 3),
    "1x1": Layer((4, 72, 29, 28), (136, 72, 1, 1)),
    "1x1-strided": Layer((4, 72, 29, 28), (80, 72, 1, 1), 2),
    "linear": Layer((1000, 264), (200, 264)),
    "linear-odd": Layer((130, 77), (33, 77)),
}
#: Exit code where the process cannot use its GPU any more, and another one can.
LOST = 3
#: The shape of a pass without a product.
_SHAPE = (4, 72, 29, 28)
_DIRECTIONS: tuple[Direction, ...] = ("fprop", "dgrad", "dgrad_act", "wgrad")
#: Kernels of these have been miscompiled in other projects.
_DOUBTED: tuple[tuple[Direction, str], ...] = (
    ("wgrad", "tf32"),
    ("fprop", "bf16"),
    ("dgrad_act", "bf16"),
)


class Outcome(NamedTuple):
    """What a kernel gave, twice, and what it should have given, in float64."""

    got: Sequence[Tensor]
    again: Sequence[Tensor]
    truth: Sequence[Tensor]


class Check(Protocol):
    """One computation, by any of the configurations of its kernel."""

    @property
    def name(self) -> str:
        """Its name in the file."""

    def configurations(self) -> Iterator[Any]:
        """The configurations that its kernel may take."""

    def run(self, config: Any) -> Outcome:
        """Compute with one of them.

        Raises:
            ValueError: the kernel does not do this.
        """

    @property
    def terms(self) -> int:
        """Numbers that are added up for an element of the result."""


class Product(NamedTuple):
    """One direction of a layer in one arithmetic with one activation."""

    layer: str
    direction: Direction
    arithmetic: str
    activation: str = "leaky_relu"

    @property
    def name(self) -> str:
        """Its name in the file."""
        return "/".join(self)

    @property
    def terms(self) -> int:
        """Numbers that are added up for an element of the result."""
        return terms_of(self.direction, self._problem("cuda"))

    def configurations(self) -> Iterator[Any]:
        """Those among which the kernel's own choice is made, or None where it cannot run."""
        try:
            tunable, asked = self._asked(self._made())
        except (ValueError, RuntimeError):  # `run` meets it again, and says why
            yield None
        else:
            yield from tunable.candidates(*asked)

    def run(self, config: Any) -> Outcome:
        """Compute the direction twice with a configuration, and in float64."""
        given = self._made()
        tunable, asked = self._asked(given)
        with tunable.trying(asked, config):
            got, again = self._call(given), self._call(given)
        wide = tree_map_only(Tensor, Tensor.double, given)
        return Outcome(got, again, wide.call(ATEN, self.direction))

    def _problem(self, device: str) -> Problem:
        x, weight, *both = LAYERS[self.layer]
        stride, padding = ((n, n) for n in both)
        dtype, convolves = _DTYPES[self.arithmetic], len(weight) > 2
        moves = (stride, padding, (1, 1)) if convolves else ((), (), ())
        spec = spec_of(self.activation)
        saves = saves_output(spec, dtype)
        return Problem(device, None, dtype, x, weight, True, *moves, 1, self.activation, saves)

    def _made(self) -> Operands:
        return operands(self._problem(DEVICE.type), ATEN, DEVICE)

    def _asked(self, given: Operands) -> tuple[Any, tuple[Any, ...]]:
        """Whose choice the configuration is, and the arguments of the choice."""
        reason = TRITON.why_not(given.x, given.layer)
        if reason is not None:
            raise ValueError(reason)
        with tuned.asked() as log:
            self._call(given)
        return log[0]

    def _call(self, given: Operands) -> Sequence[Tensor]:
        """Let Triton compute, in the check's arithmetic."""
        for switch in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
            switch.fp32_precision = "tf32" if self.arithmetic == "tf32" else "ieee"
        with torch.no_grad():
            return given.call(TRITON, self.direction)


class Pass(NamedTuple):
    """Bias and activation, and their gradients, in a pass without a product."""

    activation: str
    arithmetic: str
    layout: str

    @property
    def name(self) -> str:
        """Its name in the file."""
        return f"pass/{'/'.join(self)}"

    @property
    def terms(self) -> int:
        """Numbers that are added up for the gradient of a bias."""
        return math.prod(_SHAPE) // _SHAPE[1]

    def configurations(self) -> Iterator[Any]:
        """None: a pass has no configurations."""
        yield None

    def run(self, config: Any) -> Outcome:
        """Compute y, the input's and the bias's gradient twice, and in float64."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        dtype = _DTYPES[self.arithmetic]

        def draw(*shape: int) -> Tensor:
            t = torch.randn(shape, generator=generator, device=DEVICE).to(dtype)
            last = self.layout == "channels_last" and t.ndim == 4
            return t.to(memory_format=torch.channels_last) if last else t

        x, bias, grad = draw(*_SHAPE), draw(_SHAPE[1]), draw(*_SHAPE)
        spec = spec_of(self.activation)
        from_output = saves_output(spec, dtype)

        def compute(kernels: Kernels) -> tuple[list[Tensor], Tensor]:
            y = kernels.bias_act(x, bias, spec, 1)
            saved = y if from_output else x
            dx, sums = kernels.act_grad(grad, saved, bias, spec, 1, bias_grad=True)
            assert sums is not None
            return [y, dx, sums], saved

        (got, saved), (again, _) = compute(TRITON_PASSES), compute(TRITON_PASSES)
        wide = x.double(), bias.double()
        # Backward starts from what was saved, so that both are on the same side of a kink.
        dx = reference.act_grad(grad.double(), saved.double(), wide[1], spec, 1, from_output)
        truth = [reference.bias_act(*wide, spec, 1), dx, reference.channel_sum(dx, 1)]
        return Outcome(got, again, truth)


def checks() -> Iterator[Check]:
    """All of them, the most doubtful first."""
    for activation in ("leaky_relu", "tanh", "softplus", "swish"):
        yield Pass(activation, "bf16", "channels_last")
    for direction, arithmetic in _DOUBTED:
        for layer in LAYERS:
            yield Product(layer, direction, arithmetic)
    for arithmetic in _DTYPES:
        for layer in LAYERS:
            for way in _DIRECTIONS:
                yield Product(layer, way, arithmetic)
    for activation in ("tanh", "softplus", "swish"):
        for layer in ("3x3", "1x1", "linear"):
            yield Product(layer, "fprop", "bf16", activation)
            yield Product(layer, "dgrad_act", "bf16", activation)
    for activation in SHAPED:
        for arithmetic in ("bf16", "fp16", "fp32"):
            for layout in ("channels_last", "contiguous"):
                yield Pass(activation, arithmetic, layout)


def main() -> int:
    """Run the program; 1 if a kernel is wrong, `LOST` if one has cost the process its GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="record, which is written after every row")
    parser.add_argument("--seconds", type=float, default=120.0, help="begin nothing after these")
    parser.add_argument("--pattern", default="*", help="shell pattern of the names of checks")
    parser.add_argument("--share", type=share, default=(1, 1), metavar="I/N", help="the I-th of N")
    args = parser.parse_args()
    if DEVICE.type not in TRITON.devices:
        parser.error("needs an NVIDIA GPU; or Triton's interpreter, by TRITON_INTERPRET=1")
    book = Book(args.file)
    end = time.monotonic() + args.seconds
    own, shares = args.share
    named = {check.name: check for check in checks()}
    wanted = fnmatch.filter(named, args.pattern)
    for name in wanted[own - 1 :: shares]:
        for config in named[name].configurations():
            if time.monotonic() > end:
                print(f"no time for {name} and what follows", flush=True)
                return book.verdict()
            book.check(named[name], config)
            if is_lost():
                print("the GPU is lost to this process; start it again to go on", flush=True)
                return LOST
    return book.verdict()


def share(text: str) -> tuple[int, int]:
    """The type of an option like 3/8.

    Example:
        >>> share("3/8")
        (3, 8)
    """
    try:
        own, shares = map(int, text.split("/"))
    except ValueError:
        own, shares = 0, 0
    if not 1 <= own <= shares:
        raise argparse.ArgumentTypeError(f"{text!r} is no share like 3/8")
    return own, shares


class Book:
    """The file: a row for each configuration of each check."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.head = provenance()
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            data = read_json(path)
            expect(data, {"rows": dict, ...: object}, str(path))
            self.rows = without_checksum(data, str(path))["rows"]

    def check(self, check: Check, config: Any) -> None:
        """Add the row of a check and a configuration, unless it is there."""
        values = [] if config is None else asdict(config).items()
        name = "/".join([check.name, ",".join(f"{k}={v}" for k, v in values)]).rstrip("/")
        if name not in self.rows:
            self._write(name, {"status": "running"})
            row = result(check, config)
            print(f"{row['status']:8}{name} {row.get('why', '')}".rstrip(), flush=True)
            self._write(name, row)

    def verdict(self) -> int:
        """Say how it went; 1 if a kernel is wrong."""
        counts = Counter(row["status"] for row in self.rows.values())
        print(", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing ran")
        bad = [n for n, row in self.rows.items() if row["status"] not in ("ok", "refused")]
        for name in bad:
            print(f"{self.rows[name]['status']:8}{name}")
        return int(bool(bad))

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        write_json(self.path, with_checksum({**self.head, "rows": self.rows}))


def result(check: Check, config: Any) -> dict[str, Any]:
    """Run a check and compare its outcome with float64, and its two runs with each other."""
    try:
        got, again, truth = check.run(config)
        rounded = [t.to(g.dtype) for t, g in zip(truth, got, strict=True)]
        why = difference_of(got, rounded, check.terms, tf32="/tf32" in check.name)
        if why is None and not all(map(torch.equal, got, again)):
            why = "two runs differ"
        most = max(_error(g, t) for g, t in zip(got, truth, strict=True))
    except ValueError as error:
        return {"status": "refused", "why": str(error)}
    except Exception as error:  # whatever a compiler or a driver may raise
        return {"status": "failed", "why": f"{type(error).__name__}: {error}"[:400]}
    row = {"status": "wrong" if why else "ok", "error": most if math.isfinite(most) else None}
    return row | ({"why": why} if why else {})


def is_lost() -> bool:
    """Whether this process cannot use its GPU any more, as after an illegal access."""
    try:
        torch.zeros(1, device=DEVICE).item()
    except RuntimeError:
        return True
    return False


def _error(got: Tensor, truth: Tensor) -> float:
    """Root mean square of the difference, by that of the truth."""
    scale = truth.square().mean().sqrt()
    return float((got.double() - truth).square().mean().sqrt() / scale)


if __name__ == "__main__":
    sys.exit(main())
