"""Writes the tables of the pages, and the picture of accuracy by depth.

They come from bench/results and from the table of activations.

python -m bench.tables [--check]
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fusedshape.activations import ACTIVATIONS
from fusedshape.bench import records, text
from fusedshape.bench.records import Record, Row
from fusedshape.files import ContentError, expect, read_json, without_checksum, write_text
from fusedshape.kernels.roofline import ROOFS
from fusedshape.machine import headline
from fusedshape.timing import paired_ratios, percentiles
from fusedshape.train.demo import final_runs, plot_sweep

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"


def _load(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    data = read_json(path)
    expect(data, {"rows": [dict, ...], ...: object}, str(path))
    return without_checksum(data, f"{path}, which `git checkout` restores,")


def _source(data: Mapping[str, Any]) -> str:
    return f"{headline(data)}; `{data['command']}`"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def activations() -> str:
    """The names of all activations."""
    return f"{', '.join(ACTIVATIONS)}."


def saved() -> str:
    """What backward needs for each activation, besides the input of the layer."""
    output = [row for row in ACTIVATIONS.values() if row.saves == "output"]
    piecewise = ", ".join(row.name for row in output if row.homogeneous)
    smooth = ", ".join(row.name for row in output if not row.homogeneous)
    others = ", ".join(row.name for row in ACTIVATIONS.values() if row.saves == "input")
    rows = [
        [f"{piecewise} with δ = 0 and a slope of 0 or more", "output", "output"],
        [f"leaky_relu with δ ≠ 0 and a positive slope; {smooth}", "output", "pre-activation"],
        [
            "relu with δ ≠ 0, leaky_relu with a falling branch, or a flat one and δ ≠ 0; " + others,
            "pre-activation",
            "pre-activation",
        ],
    ]
    lines = [["", "float32, float64", "bfloat16, float16"], ["---"] * 3, *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def _find(group: str, device: str = "cpu") -> tuple[Record, list[Row]] | None:
    """The record that has rows of a group, and its rows that are ok; None if there is none."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        data = read_json(path)
        if isinstance(data, dict) and data.get("kind") == records.KIND:
            record = records.load(path)
            if record["device"].startswith(device) and any(records.rows(record, group)):
                found.append((path.name, record))
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise SystemExit(f"{group} stands in {names}; delete all but the one to be quoted")
    if not found:
        return None
    record = found[0][1]
    return record, [row for row in records.rows(record, group) if row["status"] == "ok"]


def _recorded(group: str) -> tuple[Record, list[Row]]:
    found = _find(group)
    if found is None:
        raise SystemExit(f"no record in {RESULTS} has the group {group}")
    return found


def _mean(rows: Iterable[Row], ratio: str) -> float:
    return statistics.geometric_mean(row["ratios"][ratio][1] for row in rows)


def _ms(row: Row, name: str) -> float:
    return row["candidates"][name]["ms"][1]


def _paired(row: Row, of: str, to: str) -> list[float]:
    """Ratios round by round; empty if either was not timed."""
    times = (row["candidates"].get(name, {}).get("samples_ms", []) for name in (of, to))
    return paired_ratios(*times)


def sweep() -> str:
    """The test accuracy of every arm at every depth."""
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
        f"Test accuracy in %: the mean, and in brackets the lowest and highest, of the seeds "
        f"{', '.join(map(str, seeds))}; then the learning rate. The rate was chosen on seed 0 by "
        f"training loss: the best two of {', '.join(f'{r:.0e}' for r in rates)} after a quarter of "
        f"the epochs, then the better of them after all {epochs}. Width 32, Adam, label smoothing "
        "0.1; the smoothing was picked by the test accuracy of TAT with seed 0. Chance is 10%. "
        f"{_source(data['headers'][-1])}."
    )
    head = ["arm", *(f"{depth} layers" for depth in runs)]
    return f"{_table(head, rows)}\n\n{note}"


def demo() -> str:
    """The result of `make demo`."""
    data = _load("demo")
    arms = [
        f"{row['arm']} reaches {100 * row['final_accuracy']:.1f} % test accuracy in "
        f"{len(row['epochs'])} epochs and {row['seconds']:.0f} s"
        for row in data["rows"]
    ]
    return f"The demo on 2 CPU cores: {', '.join(arms)} ({_source(data['header'])})."


_RATIOS = ("fused/bare", "eager/fused", "folded/fused", "inplace/fused", "compiled/fused")


def conv() -> str:
    """Step times over ResNet-50's convolutions, by stage."""
    record, rows = _recorded("conv_act")
    names = [name for name in _RATIOS if all(name in row["ratios"] for row in rows)]
    head = ["convolutions", "bare ms", *(name.replace("/", " ÷ ") for name in names)]
    body = []
    for size in dict.fromkeys(row["parameters"]["shape"][-1] for row in rows):
        found = [row for row in rows if row["parameters"]["shape"][-1] == size]
        total = sum(_ms(row, "bare") for row in found)
        cells = [f"{total:.0f}", *(f"{_mean(found, name):.2f}" for name in names)]
        body.append([f"{len(found)} with {size}×{size} inputs", *cells])
    means = [f"**{_mean(rows, name):.2f}**" for name in names]
    body.append([f"**all {len(rows)}**", "", *means])
    inplace = "*inplace* has the activation in place; " if "inplace/fused" in names else ""
    lowest = min(row["ratios"]["eager/fused"][1] for row in rows)
    note = (
        "Forward and backward of ResNet-50's distinct convolutions with a leaky ReLU, batch 8, "
        "channels_last, float32: the sum of the times, and geometric means of medians of paired "
        "ratios. *Bare* is the convolution with its bias and without an activation; *eager* is "
        "convolution, F.leaky_relu and scale; *folded* is the same without the scale; "
        f"{inplace}*compiled* is torch.compile of eager. "
        f"The smallest gain over eager on any one of them is {lowest:.2f}×. "
        f"{_source(record)}."
    )
    return f"{_table(head, body)}\n\n{note}"


def accuracy(dtype: str) -> str:
    """Errors in half precision."""
    record, _ = _recorded("accuracy")
    inputs: dict[str, None] = {}
    body: dict[str, list[str]] = {}
    for row in records.rows(record, "accuracy", dtype=dtype):
        parameters = row["parameters"]
        inputs[parameters["input"]] = None
        name = f"{parameters['method']} {parameters['activation']}"
        for part in ("y", "dx"):
            fused, eager = (row["candidates"][c]["error"][part] for c in ("fused", "eager"))
            body.setdefault(name, []).append(f"{fused:.1e} ({eager / fused:.1f}×)")
    head = [f"{column}, {part}" for column in inputs for part in ("value", "gradient")]
    note = (
        f"Relative root-mean-square error of the fused operation in {dtype} against float64. The "
        "number in brackets says how many times larger the error of eager PyTorch is, which "
        "computes op by op in the same dtype. The constants are for 50 layers. Inputs of the given "
        "distribution enter the activation alone; the last two columns are a 1×1 convolution that "
        f"a residual of weight 0.8 joins. {_source(record)}."
    )
    table = _table(["constants", *head], [[name, *cells] for name, cells in body.items()])
    return f"{table}\n\n{note}"


def solver() -> str:
    """The cost of the solver and of a call, as sentences."""
    record, rows = _recorded("constants")
    both = [row["ratios"]["dks/fused"][1] for row in rows if "dks/fused" in row["ratios"]]
    median = statistics.median(_ms(row, "fused") for row in rows)
    (call, *_), (load, *_) = (_recorded(group)[1] for group in ("overhead", "import"))
    return (
        "The solvers meet every condition of the 159 reference cases to 1e-9. Over one case of "
        f"each activation and method their median time is {median:.0f} ms. google-deepmind's `dks` "
        f"0.1.2 takes {statistics.median(both):.0f} times as long in the median and at least "
        f"{min(both):.0f} times, over the {len(both)} cases that it solves ({_source(record)}).\n\n"
        f"A call of `{call['case'].rpartition('/')[2]}` on 4 numbers costs "
        f"{1e3 * _ms(call, 'fused'):.0f} µs forward and backward, "
        f"{1 / call['ratios']['folded/fused'][1]:.2f} times a call of the stock `F.leaky_relu`. "
        f"`import fusedshape` adds {_ms(load, 'fused'):.0f} ms to `import torch`."
    )


Maker = Callable[[Record, list[Row]], str]


def _optional(
    group: str, command: str, device: str = "cpu"
) -> Callable[[Maker], Callable[[], str]]:
    """Make a table that names the command for its record as long as there is none."""

    def decorate(make: Maker) -> Callable[[], str]:
        def table() -> str:
            found = _find(group, device)
            if found is None:
                return f"Not measured yet. The record is made by `{command}`."
            record, rows = found
            return f"{make(record, rows)}\n\n{_source(record)}."

        return table

    return decorate


_CPU = "fusedshape bench run --suite cpu --out runs/cpu.json"
_SCALING = "fusedshape bench run --suite scaling --out runs/scaling.json"
_GPU = "fusedshape bench run --suite gpu-quick --out runs/gpu.json"


def bound() -> str:
    """The largest possible gain of fusing, by channels."""
    roof = ROOFS["H200"]
    widths = (64, 128, 256, 512)
    rows = []
    for name, passes in (("eager", 11), ("folded, in place", 7), ("torch.compile", 4)):
        gains = [passes * 2 * roof.half / (54 * c * roof.bandwidth) for c in widths]
        rows.append([f"over {name}, {passes} passes", *(f"{gain:.2f}" for gain in gains)])
    note = (
        f"The gain of a perfectly fused layer relative to the time of its convolution, at "
        f"{roof.bandwidth / 1e12:.1f} TB/s and {roof.half / 1e12:.0f} TFLOP/s ({roof.name}, "
        f"{roof.source.partition(';')[0]}). It is an estimate and an upper bound, because "
        "convolutions do not reach the rate of large products."
    )
    return f"{_table(['gain at most', *(f'C = {c}' for c in widths)], rows)}\n\n{note}"


def layers() -> str:
    """Every single convolution with its spread, also those that lose."""
    record, rows = _recorded("conv_act")
    names = [name for name in _RATIOS if all(name in row["ratios"] for row in rows)]
    head = ["layer", "fused ms", *(name.replace("/", " ÷ ") for name in names)]
    body = []
    for row in rows:
        cin, cout, k, stride, size = row["parameters"]["shape"]
        cells = [f"{_ms(row, 'fused'):.1f}", *(text.ratio(row["ratios"][name]) for name in names)]
        body.append([f"{cin}→{cout} {k}×{k}/{stride} {size}²", *cells])
    lost = sum(row["ratios"]["eager/fused"][1] < 1 for row in rows)
    aten = [pairs for row in rows if (pairs := _paired(row, "fused", "fused aten"))]
    misled = sum(percentiles(pairs)[0] > 1 for pairs in aten)
    beaten = sum(row["ratios"]["folded/fused"][1] < 1 for row in rows)
    note = (
        f"Fused is slower than eager on {lost} of {len(rows)} convolutions, and slower than the "
        f'stock form with folded weights on {beaten}. The engine that "auto" takes is slower than '
        f"torch's convolution with one pass after it (`fused aten`) on {misled} of {len(aten)}, "
        "judged by the 20th percentile of their paired ratios. Brackets hold the 20th and 80th "
        f"percentile of the paired ratios where they are known. {_source(record)}."
    )
    return f"{_table(head, body)}\n\n{note}"


@_optional("chain", _CPU)
def memory(record: Record, rows: list[Row]) -> str:
    """Bytes kept for backward."""
    rows = [*rows, *(row for row in records.rows(record, "net") if row["status"] == "ok")]
    names = list(
        dict.fromkeys(
            name
            for row in rows
            for name, result in row["candidates"].items()
            if "saved_bytes" in result
        )
    )
    body = []
    for row in rows:
        saved = [row["candidates"].get(name, {}).get("saved_bytes") for name in names]
        cells = ["" if s is None else f"{s / 1e6:.2f}" for s in saved]
        body.append([row["case"], *cells])
    return f"{_table(['MB saved for backward', *names], body)}"


@_optional("net", _CPU)
def nets(record: Record, rows: list[Row]) -> str:
    """Steps of whole networks."""
    return _ratios(rows)


@_optional("linear_act", _CPU)
def others(record: Record, rows: list[Row]) -> str:
    """Linear layers and chains."""
    chains = [row for row in records.rows(record, "chain") if row["status"] == "ok"]
    return _ratios([*rows, *chains])


@_optional("overhead", _CPU)
def overhead(record: Record, rows: list[Row]) -> str:
    """The time that a call costs the host."""
    head = ["call on 4 numbers, forward and backward", "µs", "of stock PyTorch's"]
    body = []
    for row in rows:
        ratio = 1 / row["ratios"]["folded/fused"][1]
        name = row["case"].rpartition("/")[2]
        body.append([f"`{name}`", f"{1e3 * _ms(row, 'fused'):.0f}", f"{ratio:.2f}×"])
    return _table(head, body)


@_optional("diagnose", _CPU)
def diagnosis(record: Record, rows: list[Row]) -> str:
    """The time that diagnose takes."""
    body = [
        [
            row["case"].rpartition("/")[2],
            "×".join(map(str, row["parameters"]["shape"])),
            f"{_ms(row, 'bare'):.0f}",
            f"{_ms(row, 'fused'):.0f}",
            f"{row['ratios']['fused/bare'][1]:.2f}",
        ]
        for row in rows
    ]
    return _table(["network", "input", "forward ms", "diagnose ms", "ratio"], body)


@_optional("scaling", _SCALING)
def scaling(record: Record, rows: list[Row]) -> str:
    """The fitted exponents of growth."""
    head = ["series", "by", "sizes", "exponent at the three largest", "at most linear"]
    body = [
        [
            f"{fit['series']}, {fit['candidate']}",
            "ms" if fit["metric"] == "ms" else "bytes saved",
            f"{fit['sizes'][0]:,.0f} … {fit['sizes'][-1]:,.0f}",
            f"{fit['exponent']:.2f}",
            "yes" if fit["holds"] else "**no**",
        ]
        for fit in record["fits"]
        if fit["candidate"].startswith(("fused", "eager"))
    ]
    return _table(head, body)


@_optional("conv_act", _GPU, "cuda")
def gpu(record: Record, rows: list[Row]) -> str:
    """Layers and networks on a GPU."""
    groups = ("pointwise", "linear_act", "chain", "net")
    more = [r for g in groups for r in records.rows(record, g) if r["status"] == "ok"]
    return _ratios([*rows, *more])


def _ratios(rows: list[Row]) -> str:
    owns = list(dict.fromkeys(n for row in rows for n in row["candidates"] if text.is_ours(n)))
    others = [
        name
        for name in text.OTHERS
        if any(f"{name}/{own}" in row["ratios"] for row in rows for own in owns)
    ]
    head = ["case", "ours", "ms", *(f"{name} ÷ ours" for name in others)]
    body = []
    for row in rows:
        for own in owns:
            if "ms" in row["candidates"].get(own, {}):
                cells = [text.ratio(row["ratios"].get(f"{name}/{own}")) for name in others]
                body.append([row["case"], own, f"{_ms(row, own):.3g}", *cells])
    return _table(head, body)


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "docs/training.md": {"sweep": sweep, "demo": demo},
    "docs/constants.md": {"activations": activations, "solver": solver},
    "docs/precision.md": {
        "bfloat16": partial(accuracy, "bfloat16"),
        "float16": partial(accuracy, "float16"),
    },
    "docs/performance.md": {
        "saved": saved,
        "conv": conv,
        "bound": bound,
        "layers": layers,
        "others": others,
        "nets": nets,
        "memory": memory,
        "overhead": overhead,
        "diagnose": diagnosis,
        "scaling": scaling,
        "gpu": gpu,
    },
}


def written(page: str, name: str) -> str:
    """The text of a page with its tables made from the records."""
    for table, make in PAGES[name].items():
        begin, end = f"<!-- table: {table} -->\n", "<!-- end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise SystemExit(f"{name} must hold {begin.strip()} … {end} once")
        block = f"{begin}{make()}\n{end}"
        page = pattern.sub(lambda _, block=block: block, page)
    return page


def main() -> None:
    """Write the pages, or check them."""
    try:
        _main()
    except (ContentError, OSError) as error:
        sys.exit(f"bench.tables: {error}")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if a page is out of date")
    args = parser.parse_args()
    stale = []
    for name in PAGES:
        page = (ROOT / name).read_text()
        new = written(page, name)
        if new != page:
            stale.append(name)
            if not args.check:
                write_text(ROOT / name, new)
    if not args.check:
        plot_sweep(_load("sweep"), RESULTS / "sweep.json")
    if args.check and stale:
        sys.exit(f"{', '.join(stale)}: not what bench/results says; run python -m bench.tables")


if __name__ == "__main__":
    main()
