"""fusedshape bench compare: two revisions are measured in turns."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fusedshape.bench import records
from fusedshape.cli import main
from fusedshape.files import with_checksum
from tests.support.benchmarks import CPU, git, synthetic


def test_two_revisions_are_measured_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The repository holds a library that logs which revision runs and writes a record."""
    log, repository = tmp_path / "log", tmp_path / "repository"
    package = repository / "fusedshape"
    (package / "bench").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "bench/command.py").touch()
    record = records.new("smoke", CPU, 0)
    git(repository, "init")
    for version, ms in (("one", 2.0), ("two", 1.0)):
        made = synthetic(record, {"fused": [ms] * 4, "eager": [1.0] * 4})
        (package / "record.json").write_text(json.dumps(with_checksum(made)))
        (package / "__main__.py").write_text(
            "import os, pathlib, signal, sys, time\n"
            f"open({str(log)!r}, 'a').write(f'{version} {{sys.argv[1]}}\\n')\n"
            "here = pathlib.Path(__file__).parent\n"
            "if 'nothing' in sys.argv:\n"
            "    sys.exit('no case matches')\n"
            "if 'stop' in sys.argv:\n"
            "    os.kill(os.getppid(), signal.SIGTERM)\n"
            "    time.sleep(60)\n"
            "assert os.environ['FUSEDSHAPE_TUNING'] == 'off'\n"
            "if sys.argv[1] == 'bench':\n"
            "    pathlib.Path(sys.argv[-1]).write_bytes((here / 'record.json').read_bytes())\n"
        )
        git(repository, "add", "-A")
        git(repository, "commit", "-m", version)
        git(repository, "tag", version)
    monkeypatch.chdir(repository)
    assert main(["bench", "compare", "one", "two", "--suite", "smoke"]) == 0
    shown = capsys.readouterr()
    assert "faster" in shown.out.split("under 1 is faster")[1]
    assert [line.split()[0] for line in shown.err.splitlines()] == [f"[{i}/8]" for i in range(1, 9)]
    built = ["one build", "two build"]
    ran = [f"{name} bench" for name in ("one", "two", "two", "one") * 2]
    assert log.read_text().splitlines() == built + ran
    done = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    assert main(["bench", "compare", "one", "three"]) == 1
    assert "three" in capsys.readouterr().err
    (package / "__init__.py").write_text("x = 1")
    assert main(["bench", "compare", "one", "two", "--case", "nothing"]) == 1
    shown = capsys.readouterr().err
    assert "one: no case matches" in shown
    assert "changes that are not committed belong to no revision" in shown
    assert main(["bench", "compare", "one", "two", "--case", "stop"]) == 143
    done = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 1
    git(repository, "rm", "fusedshape/bench/command.py")
    git(repository, "commit", "-m", "old")
    assert main(["bench", "compare", "one", "HEAD"]) == 1
    assert "has no fusedshape bench" in capsys.readouterr().err
