"""`Diagnosis`: a row for each layer and the findings, as text, JSON or figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fusedshape.columns import aligned
from fusedshape.diagnose.measure import QUANTILES
from fusedshape.machine import provenance, write_json

_MOST_ROWS = 40


@dataclass(frozen=True)
class Layer:
    """One layer, sum or other step, predicted and measured.

    Predictions start at the network's input; nan means not predicted or not measured.

    Attributes:
        path: its place in the model, as in `fusedshape.theory.Node.path`.
        op: "input", "affine", "nonlinear", "sum", "concat", "norm", "pool", "dropout", "unknown".
        name: what is computed: "conv", "tanh", "add", …
        channels: number of channels.
        q: predicted mean square over channels, averaged over inputs and locations.
        q_near: q predicted from the measurement one step before.
        q_spread: standard deviation of ln q that finite width explains.
        q_measured: measured q.
        q_quantiles: 5, 25, 50, 75 and 95 % quantiles of q over inputs and locations.
        q_channels: the same quantiles over channels.
        c: predicted cosine of pairs of inputs at one location, averaged over pairs and locations.
        c_spread: standard deviation of c that finite width explains.
        c_measured: measured c.
        c_quantiles: 5, 25, 50, 75 and 95 % quantiles of c over pairs and locations.
        slope: C′(1) of a nonlinear layer at the predicted q.
        sensitivity: predicted ‖x − x′‖² / q of two close inputs, relative to its value at the
            network's input: the product of C′(1) along the path.
        sensitivity_measured: sensitivity to a small random change of some inputs.
        q_off: ln(q_measured / q_near), in standard deviations that finite width explains.
        c_off: c_measured minus the c predicted from the step before, likewise.
        note: why nothing is predicted.
    """

    path: str
    op: str
    name: str
    channels: int
    q: float
    q_near: float
    q_spread: float
    q_measured: float
    q_quantiles: tuple[float, ...]
    q_channels: tuple[float, ...]
    c: float
    c_spread: float
    c_measured: float
    c_quantiles: tuple[float, ...]
    slope: float
    sensitivity: float
    sensitivity_measured: float
    q_off: float
    c_off: float
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One deviation from theory.

    Attributes:
        cause: one of `fusedshape.diagnose.CAUSES`.
        paths: the places where it was found, in the order of the forward pass.
        text: what was found and what to do about it.
    """

    cause: str
    paths: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        more = f" (and {len(self.paths) - 1} more)" if len(self.paths) > 1 else ""
        return f"{self.cause} at {self.paths[0]!r}{more}: {self.text}"


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; print it.

    Attributes:
        layers: the rows, in the order of the forward pass.
        findings: the first is the earliest and the likely cause of the others; empty if theory and
            measurement agree.
        notes: other things that the user should know.
        sigma_w: the assumed standard deviation of weights, times √fan_in.
        sigma_b: the assumed standard deviation of biases.
        inputs: number of inputs that were measured.
    """

    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    sigma_w: float
    sigma_b: float
    inputs: int

    @property
    def agrees(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def cause(self) -> str | None:
        """The first finding's cause."""
        return self.findings[0].cause if self.findings else None

    @property
    def path(self) -> str | None:
        """The first place where theory and measurement differ."""
        return self.findings[0].paths[0] if self.findings else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON; numbers that are not finite become None."""
        rows = [
            {f.name: _plain(getattr(row, f.name)) for f in fields(Layer)} for row in self.layers
        ]
        found = [{**vars(f), "paths": list(f.paths)} for f in self.findings]
        return {
            "agrees": self.agrees,
            "findings": found,
            "notes": list(self.notes),
            "sigma_w": _plain(self.sigma_w),
            "sigma_b": _plain(self.sigma_b),
            "inputs": self.inputs,
            "quantiles": list(QUANTILES),
            "layers": rows,
        }

    def save(self, path: str | Path) -> None:
        """Write `to_dict` and a description of the machine as JSON; the file is replaced whole.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(Path(path), {**provenance(), **self.to_dict()})

    def plot(self, path: str | Path, title: str = "") -> None:
        """Draw q, c and C′(1) over depth, theory and measurement.

        Args:
            path: file; its suffix decides the format.
            title: over the figure.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: a format that matplotlib does not know.
        """
        from fusedshape.diagnose.plot import plot

        plot(self, path, title)

    def table(self, rows: int | None = None) -> str:
        """The layers as text.

        Args:
            rows: about the most rows to show; layers without findings are left out evenly. None
                shows all.
        """
        kept = list(range(len(self.layers)))
        if rows is not None and len(kept) > rows:
            places = {path for f in self.findings for path in f.paths[:3]}
            told = [i for i in kept if self.layers[i].op != "affine"]
            step = math.ceil(len(told) / rows)
            told = [*told[::step], kept[-1]]
            kept = [i for i in kept if i in told or self.layers[i].path in places]
        lines = [_HEAD, *(_cells(self.layers[i]) for i in kept)]
        return aligned(lines, left=2)

    @property
    def verdict(self) -> str:
        """One line."""
        if self.agrees:
            return "theory and measurement agree"
        return str(self.findings[0])

    def __str__(self) -> str:
        table = self.table(_MOST_ROWS)
        shown, whole = table.count("\n"), len(self.layers)
        left_out = f"({shown} of {whole} layers; table() has all)" if shown < whole else ""
        findings = [f"{number}. {f}" for number, f in enumerate(self.findings, 1)]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([table, left_out, *(findings or [self.verdict]), *notes])


_HEAD = ["layer", "", "", "q", "measured", "5…95 %", "c", "measured", "5…95 %"]
_HEAD += ["C'(1)", "sensitivity", "measured", "off"]


def _cells(row: Layer) -> list[str]:
    off = max(abs(row.q_off), abs(row.c_off)) if math.isfinite(row.q_off + row.c_off) else math.nan
    label = row.name if row.op in row.name or row.op in ("input", "nonlinear") else ""
    return [
        row.path or "(model)",
        label or row.name,
        f"{row.channels}",
        _short(row.q if row.op != "input" else math.nan),
        _short(row.q_measured),
        f"{_short(row.q_quantiles[0])}…{_short(row.q_quantiles[-1])}",
        _short(row.c if row.op != "input" else math.nan, signed=True),
        _short(row.c_measured, signed=True),
        f"{_short(row.c_quantiles[0], signed=True)}…{_short(row.c_quantiles[-1], signed=True)}",
        _short(row.slope),
        _short(row.sensitivity),
        _short(row.sensitivity_measured),
        "" if math.isnan(off) else f"{off:.1f}σ",
    ]


def _short(x: float, signed: bool = False) -> str:
    if math.isnan(x):
        return "–"
    if signed:
        return f"{x:.3f}"
    return f"{x:.3g}" if x != 0 and not 1e-3 <= abs(x) < 1e4 else f"{x:.3f}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
