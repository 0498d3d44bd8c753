"""The benchmarks' records: what is written is read again, and what is broken is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from fusedshape.bench import records
from fusedshape.cli import main
from tests.support.benchmarks import ROOT, broken


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
