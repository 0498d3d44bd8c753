"""The benchmarks' records: what is written is read again, and what is broken is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedshape.bench import records
from fusedshape.cli import main
from tests.support.benchmarks import broken
from tests.support.places import ROOT


def test_record_says_where_it_comes_from(smoke: Path) -> None:
    record = records.load(smoke)
    assert record["machine"]["torch"] == torch.__version__
    assert record["seed"] == 0
    assert record["device"] == "cpu"
    assert set(record["ceilings"]) == {
        "copy GB/s",
        "matmul float32 TFLOP/s",
    }


def test_round_trip(smoke: Path, tmp_path: Path) -> None:
    record = records.load(smoke)
    records.save(tmp_path / "again.json", record)
    assert records.load(tmp_path / "again.json") == record
    assert os.listdir(tmp_path) == ["again.json"]


BROKEN = {
    "cut off": (lambda text: text[: len(text) // 2], "not JSON"),
    "not a record": (lambda text: '{"rows": []}', "not a record of fusedshape bench"),
    "a list": (lambda text: "[]", "not a record of fusedshape bench"),
    "old": (broken(lambda r: r.update(schema=0)), "run its suite again"),
    "newer": (broken(lambda r: r.update(schema=99)), "install the fusedshape that wrote it"),
    "no rows": (broken(lambda r: r.pop("rows")), "lacks ['rows']"),
    "unknown field": (broken(lambda r: r.update(speed=2)), "unknown ['speed']"),
    "text for a number": (broken(lambda r: r.update(seed="0")), "record.seed is '0'"),
    "a boolean for a number": (broken(lambda r: r.update(seed=True)), "record.seed is True"),
    "a state": (broken(lambda r: r["rows"][0].update(status="fine")), "rows[0].status is 'fine'"),
    "two percentiles": (
        broken(lambda r: r["rows"][0]["candidates"]["fused"]["ms"].pop()),
        "has 2 entries, expected 3",
    ),
    "a checksum that is gone": (broken(lambda r: r.pop("sha256")), "lost its checksum"),
    "a row twice": (broken(lambda r: r["rows"].append(r["rows"][0])), "there twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(
    smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    change, message = BROKEN[name]
    path = tmp_path / "broken.json"
    path.write_text(change(smoke.read_text()))
    with pytest.raises(records.RecordError) as caught:
        records.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert main(["bench", "show", str(path)]) == 1
    assert message in capsys.readouterr().err


def numbers(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to the numbers of a record."""
    if isinstance(data, float) and data > 0:
        yield path
    pairs = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, list)
        else ()
    )
    for key, value in pairs:
        yield from numbers(value, (*path, key))


@pytest.mark.parametrize("name", ["cpu", "scaling"])
def test_a_number_that_was_edited_is_found_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text = (ROOT / f"bench/results/{name}.json").read_text()
    path = tmp_path / "edited.json"
    places = list(numbers(json.loads(text)))
    assert len(places) > 1000
    for place in places[:: len(places) // 7]:
        record = json.loads(text)
        *above, last = place
        found = record
        for key in above:
            found = found[key]
        found[last] *= 1 + 1e-12
        path.write_text(json.dumps(record))
        with pytest.raises(records.RecordError, match=r"edited\.json is damaged or was edited"):
            records.load(path)
    assert main(["bench", "show", str(path)]) == 1
    assert f"restore it, or run its suite again: --suite {name}" in capsys.readouterr().err


def test_the_layout_of_a_record_may_change(tmp_path: Path) -> None:
    written = ROOT / "bench/results/cpu.json"
    record = json.loads(written.read_text())
    path = tmp_path / "laid out.json"
    path.write_text(json.dumps(dict(reversed(record.items())), indent=4).replace("\n", "\r\n"))
    assert records.load(path) == records.load(written)


def test_a_record_of_an_older_revision_has_no_checksum(tmp_path: Path) -> None:
    written = ROOT / "bench/results/cpu.json"
    record = json.loads(written.read_text())
    del record["sha256"]
    path = tmp_path / "older.json"
    path.write_text(json.dumps({**record, "schema": 1}))
    assert records.load(path) == records.load(written)


def test_claims_of_the_unchecked_are_refused(smoke: Path, tmp_path: Path) -> None:
    record = records.load(smoke)
    row = next(row for row in record["rows"] if "eager/fused" in row["ratios"])
    row["candidates"]["fused"]["status"] = "wrong"
    with pytest.raises(records.RecordError, match="'fused' is wrong, yet has a time"):
        records.save(tmp_path / "record.json", record)
    for key in ("ms", "samples_ms"):
        del row["candidates"]["fused"][key]
    with pytest.raises(records.RecordError, match="of a candidate that is not ok"):
        records.save(tmp_path / "record.json", record)
    assert not list(tmp_path.iterdir())


def test_committed_records_load() -> None:
    found = [
        path
        for path in (ROOT / "bench/results").glob("*.json")
        if json.loads(path.read_text()).get("kind") == records.KIND
    ]
    assert found
    for path in found:
        assert records.load(path)["rows"]
