"""Writes the README's tables from the files in bench/results; with --check, only compares.

python -m bench.tables [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

from bench.common import ROOT
from fusedshape.machine import headline
from fusedshape.train.demo import final_runs

README = ROOT / "README.md"
RESULTS = ROOT / "bench/results"


def _load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _source(data: dict[str, Any]) -> str:
    return f"{headline(data)}; `{data['command']}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sweep() -> str:
    """Accuracy of every arm and depth."""
    data = _load("sweep")
    runs = dict(sorted(final_runs(data).items()))
    arms = list(dict.fromkeys(arm for by_arm in runs.values() for arm in by_arm))
    seeds = sorted({row["seed"] for row in data["rows"]})
    rates = sorted({row["lr"] for row in data["rows"] if row["purpose"] == "rate"})
    rows = []
    for arm in arms:
        cells = [arm]
        for by_arm in runs.values():
            found = by_arm.get(arm, [])
            values = sorted(100 * (row["final_accuracy"] or 0.0) for row in found)
            mean = f"{statistics.mean(values):.1f}" if values else "not run"
            spread = f" ({values[0]:.1f}–{values[-1]:.1f}) @ {found[0]['lr']:.0e}" if values else ""
            cells.append(mean + spread)
        rows.append(cells)
    epochs = max(row["config"]["epochs"] for row in data["rows"])
    note = (
        f"Test accuracy in %, mean (lowest–highest) over seeds {seeds}, @ learning rate: of "
        f"{', '.join(f'{r:.0e}' for r in rates)} the two with the lowest training loss after a "
        f"quarter of the epochs, and of these the lower after all {epochs}, on seed 0. "
        "scikit-learn's digits, width 32, Adam, label smoothing 0.1, which was picked by the test "
        "accuracy of TAT with seed 0. Chance is 10. "
        f"{_source(data['headers'][-1])}."
    )
    head = ["arm", *(f"{depth} layers" for depth in runs)]
    return f"{_table(head, rows)}\n\n{note}"


def demo() -> str:
    """What `make demo` gave."""
    data = _load("demo")
    arms = [
        f"{row['arm']} reaches {100 * row['final_accuracy']:.1f} % test accuracy in "
        f"{len(row['epochs'])} epochs and {row['seconds']:.0f} s"
        for row in data["rows"]
    ]
    return f"The demo on 2 CPU cores: {', '.join(arms)} ({_source(data['header'])})."


def conv() -> str:
    """Step times over ResNet-50's convolutions."""
    data = _load("conv")
    names = ["fused/bare", "eager/fused", "folded/fused", "compiled/fused"]
    head = ["convolutions", "bare ms", "fused ÷ bare", "eager ÷ fused"]
    head += ["folded ÷ fused", "compiled ÷ fused"]
    rows = []
    for size in dict.fromkeys(row["shape"][-1] for row in data["rows"]):
        found = [row for row in data["rows"] if row["shape"][-1] == size]
        total = sum(row["ms"]["bare"] for row in found)
        means = [statistics.geometric_mean(row[name] for row in found) for name in names]
        cells = [f"{total:.0f}", *(f"{mean:.2f}" for mean in means)]
        rows.append([f"{len(found)} with {size}×{size} inputs", *cells])
    means = [data["geometric_mean"][name] for name in names]
    rows.append([f"**all {len(data['rows'])}**", "", *(f"**{mean:.2f}**" for mean in means)])
    lowest = min(row["eager/fused"] for row in data["rows"])
    note = (
        "Forward and backward of ResNet-50's distinct convolutions with a leaky ReLU, batch 8, "
        "channels_last, float32: sum of times, and geometric means of medians of paired ratios. "
        "Bare is the convolution with its bias and no activation, eager convolution, F.leaky_relu "
        "and scale, folded the same without the scale, compiled torch.compile of eager. "
        f"The least gain over eager on any one is {lowest:.2f}×. "
        f"{_source(data)}."
    )
    return f"{_table(head, rows)}\n\n{note}"


def accuracy() -> str:
    """Errors in half precision."""
    data = _load("accuracy")
    head = ["activation", "γ"]
    head += [f"{dtype} {part}" for dtype in ("bf16", "fp16") for part in ("value", "gradient")]
    rows: dict[str, list[str]] = {}
    for row in data["rows"]:
        cells = rows.setdefault(row["activation"], [f"{row['output_scale']:.2f}"])
        for part in ("value", "gradient"):
            fused, eager = row[f"{part} fused"], row[f"{part} eager"]
            cells.append(f"{fused:.1e} ({eager / fused:.1f}×)")
    note = (
        "Relative root-mean-square error of the fused op against float64, and how many times "
        "larger that of eager PyTorch is, op by op in the same dtype. DKS constants for 50 layers "
        f"(TAT for leaky_relu), standard normal inputs. {_source(data)}."
    )
    return f"{_table(head, [[name, *cells] for name, cells in rows.items()])}\n\n{note}"


def solver() -> str:
    """Solver and call overhead, as sentences."""
    data, calls = _load("solver"), _load("overhead")
    solved = [row["dks_s"] / row["fusedshape_s"] for row in data["rows"] if row["dks"] == "solved"]
    call = calls["rows"][0]
    return (
        f"The solvers meet every condition of the 159 reference cases to 1e-9, in a median of "
        f"{data['all_cases_median_ms']:.0f} ms. Beside google-deepmind's `dks` 0.1.2, on one case "
        f"of each activation and method, they are a median of {statistics.median(solved):.0f}× "
        f"faster, and at least {min(solved):.0f}× ({len(solved)} cases that dks solves; "
        f"{_source(data)}).\n\n"
        f"A call of `shaped_act` on 4 numbers costs {call['microseconds']['shaped_act']:.0f} µs "
        f"forward and backward, {call['ratio']:.2f}× that of `F.leaky_relu`; `import fusedshape` "
        f"adds {call['import_ms']:.0f} ms to `import torch`."
    )


TABLES: dict[str, Callable[[], str]] = {
    "sweep": sweep,
    "demo": demo,
    "conv": conv,
    "accuracy": accuracy,
    "solver": solver,
}


def written(text: str) -> str:
    """The README with its tables as the results say."""
    for name, make in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise SystemExit(f"README.md must hold {begin.strip()} … {end} once")
        block = f"{begin}{make()}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the README is out of date")
    args = parser.parse_args()
    text = README.read_text()
    new = written(text)
    if not args.check:
        README.write_text(new)
    elif new != text:
        sys.exit("README.md is not what bench/results says; run python -m bench.tables")


if __name__ == "__main__":
    main()
