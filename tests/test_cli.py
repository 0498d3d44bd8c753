"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from fusedshape import ACTIVATIONS, ActSpec, machine, theory
from fusedshape.cli import commands, main
from fusedshape.init import Method
from fusedshape.train import TrainConfig


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_constants(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "constants", "tat", "leaky_relu", "--depth", "49", "--json")
    assert (code, err) == (0, "")
    row = json.loads(out)
    assert row.pop("method") == "TAT"
    assert ActSpec.from_dict(row) == theory.solve("TAT", "leaky_relu", depth=49)
    code, out, _ = run(capsys, "constants", "EOC", "relu")
    assert code == 0
    assert float(out.split("sigma_w")[1].split()[0]) == pytest.approx(2**0.5)


def test_constants_for_a_users_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wired.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    layers = [m for _ in range(20) for m in (nn.Linear(8, 8), nn.ReLU())]\n"
        "    return nn.Sequential(*layers, nn.BatchNorm1d(8))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    argv = ("constants", "--model", "wired:net", "--json")
    code, _, err = run(capsys, *argv)
    assert code == 1
    assert "'40' cannot be read: BatchNorm1d" in err
    code, out, _ = run(capsys, *argv, "--strip-batchnorm")
    assert code == 0
    row = json.loads(out)
    assert row["depth"] == 20
    assert row["notes"] == []
    expected = theory.solve("TAT", "leaky_relu", depth=20)
    assert row["negative_slope"] == pytest.approx(expected.negative_slope, rel=1e-12)
    for how in (("DKS", "tanh"), ("--method", "DKS", "--activation", "tanh")):
        code, out, _ = run(capsys, *argv, "--strip-batchnorm", *how)
        assert json.loads(out)["origin"] == "DKS zeta=1.5, depth=20"
    code, _, err = run(capsys, *argv, "--depth", "3")
    assert code == 1
    assert "drop --depth" in err


def test_constants_from_a_users_wiring(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wiring.py").write_text("def chain(x, r):\n    return r(r(r(x)))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    argv = ("constants", "DKS", "tanh", "--json")
    code, out, _ = run(capsys, *argv, "--subnet-max", "wiring:chain")
    assert code == 0
    _, chain, _ = run(capsys, *argv, "--depth", "3")
    for name in ("input_scale", "input_shift", "output_scale", "output_shift"):
        assert json.loads(out)[name] == pytest.approx(json.loads(chain)[name], rel=1e-9)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("constants", "TAT", "leaky_relu", "--depth", "5"), "reach"),
        (("constants", "TAT", "reul", "--depth", "5"), "unknown activation 'reul'"),
        (("constants", "EOC", "softplus"), "softplus"),
        (("constants", "EOC", "relu", "--depth", "3"), "takes --sigma-b only"),
        (("constants", "DKS", "tanh", "--depth", "3", "--sigma-b", "1"), "not at --sigma-b"),
        (
            ("constants", "TAT", "relu", "--depth", "50", "--zeta", "2"),
            "aims at eta, not at --zeta 2",
        ),
        (("convert", "json:JSONDecoder", "--method", "DKS", "--tau", "1"), "not an nn.Module"),
        (("convert", "builtins:iter"), "builtins:iter raised TypeError"),
        (("convert", "nowhere"), "pkg.module:name"),
        (("convert", "no_such_module:net"), "no_such_module"),
        (("convert", "json:nothing"), "has no 'nothing'"),
        (("convert", "builtins:dict"), "not an nn.Module"),
        (("train", "missing.json"), "give demo, sweep, or a JSON file"),
        (("bench", "show", "missing.json"), "missing.json: No such file"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert out == ""
    assert err.startswith("fusedshape: error: ")
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("train", "missing.json", "--epochs", "3"),
            "train run: error: unrecognized arguments: --e",
        ),
        (("train", "demo", "--jobs", "3"), "train demo: error: unrecognized arguments: --jobs"),
        (("train",), "train run: error: the following arguments are required: FILE"),
        (("train", "race"), "choose from 'run', 'demo', 'sweep'"),
        (("bench", "show", "r.json", "--seed", "1"), "bench show: error: unrecognized arguments"),
        (("bench", "race"), "choose from 'run', 'list', 'show', 'compare', 'plot'"),
        (("constants", "SHAPE", "relu"), "choose from 'TAT', 'DKS', 'EOC'"),
        (("constants", "TAT", "relu"), "give the network once: --depth"),
        (("convert", "torch.nn:ReLU", "--chain", "0"), "no positive integer, nor 'all'"),
        (("convert", "torch.nn:ReLU", "--init", "zeros"), "choose from 'suo', 'suo_full'"),
    ],
)
def test_each_command_knows_its_own_options_only(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    # Newer versions of Python list choices without quotes.
    assert message.replace("'", "") in capsys.readouterr().err.replace("'", "")


def test_every_option_has_a_line_of_help() -> None:
    parsers = list(commands().parsers())
    assert len(parsers) == 1 + 8 + 3 + 5
    for parser in parsers:
        assert parser.description
        assert "exit codes: 0" in parser.format_help()
        for action in parser._actions:
            about = action.help or ""
            name = f"{parser.prog} {action.dest}"
            if action.nargs == argparse.PARSER:
                continue
            assert len(about.split()) > 1, f"{name} has no help"
            # What can be read by itself begins with no preposition and is no name of a default.
            first = about.split()[0]
            assert first not in ("of", "with", "as", "default", "instead"), f"{name}: {about}"


NETS = """
import torch
from torch import nn

def chain(activation, layers):
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(8, 8), activation())))

def shallow():
    return chain(nn.ReLU, 2)

def deep():
    return chain(nn.ReLU, 20)

def silu():
    return chain(nn.SiLU, 20)

def normed():
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())

class Branch(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x)) if x.sum() > 0 else x

def branch():
    return Branch(8, 8)

class Gate(nn.Linear):
    def forward(self, x):
        return torch.relu(super().forward(x)) * torch.tanh(x)

def gate():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Gate(8, 8))

number = 3
"""

#: Bad input → what the message has to say, in the words of the shell.
BAD = {
    "constants TAT leaky_relu --depth 5": "--eta 0.9 is out of reach for --depth 5",
    "constants TAT leaky_relu --depth 0": "--depth must be at least 1",
    "constants TAT leaky_relu --depth 50 --eta 1.5": "--eta must be in (0, 1), got 1.5",
    "constants DKS tanh --depth 50 --q-slope 2": "--q-slope must be in (0, 1]",
    "constants DKS tanh --depth 50 --sigma-b 1": "not at --sigma-b 1",
    "constants DKS tanh --depth 9999999999999": "--depth 9999999999999 is beyond",
    "constants EOC relu --sigma-b 1": "pass --sigma-b 0",
    "constants EOC tanh --clamp": "not at --clamp",
    "constants EOC tanh --negative-slope 0.1": "tanh takes no --negative-slope",
    "constants TAT tanh --subnet-max nets:number": "--subnet-max must be called as f(x, r), got 3",
    "constants --model nets:normed": "pass --strip-batchnorm",
    "constants --model nets:gate": "pass --depth or --subnet-max",
    "constants --model nets:deep --depth 3": "drop --depth",
    "convert nets:shallow --eta 0.9": "or --clamp",
    "convert nets:normed": "Pass --strip-batchnorm to take",
    "convert nets:branch": "pass --on-untraceable report",
    "convert nets:silu": "pass --replace torch.nn:SiLU",
    "convert nets:deep --depth 0": "--depth must be at least 1",
    "convert nets:deep EOC relu --depth 3": "EOC knows no depth",
    "convert nets:deep --replace torch.nn:Linear": "parameters would be lost",
    "diagnose nets:deep --sigma-w 0": "--sigma-w 0 would leave nothing",
    "diagnose nets:deep --batches 0": "--batches must be a positive int",
    "tune nets:deep --input 4,8": "no fused layers",
    "info --model nets:deep --input 4,8": "no fused layers",
    "train demo --depth 0": "--depth 0 must be finite and in 1",
    "train demo --eta 2": "--eta must be in (0, 1)",
    "train sweep --jobs 0": "--jobs must be at least 1",
    "train sweep --depths 0": "--depths 0 must be finite",
    "train run bad.json": '"batch_size": 0 must be',
    "train run shallow.json": 'or "clamp": true',
    "bench run --suite smoke --seed -1": "--seed must be in 0",
    "bench run --suite smoke --limit 0": "--limit must be above 0 seconds",
}


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "bad.json").write_text('{"depth": 3, "batch_size": 0}')
    (tmp_path / "shallow.json").write_text('{"depth": 3, "eta": 0.9}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield
    sys.modules.pop("nets", None)


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize("line", BAD)
def test_messages_speak_the_language_of_the_shell(
    capsys: pytest.CaptureFixture[str], line: str
) -> None:
    code, _, err = run(capsys, *line.split())
    said = err.splitlines()[-1]
    assert code == 1
    assert said.startswith("fusedshape: error: ")
    assert BAD[line] in said
    assert not re.search(r"\w=|\b(True|False|None)\b", said), said
    values = {*ACTIVATIONS, *get_args(Method), "fused_layers"}
    fields = {field.name for field in dataclasses.fields(TrainConfig)} if ".json" in line else set()
    snakes = set(re.findall(r"[a-z]+_[a-z_]+", said)) - values - fields
    assert not snakes, said


def test_convert_says_what_it_would_do(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    layers = [m for _ in range(20) for m in (nn.Linear(8, 8), nn.ReLU())]\n"
        "    return nn.Sequential(*layers, nn.Linear(8, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    code, out, err = run(capsys, "convert", "mine:net")
    assert (code, err) == (0, "")
    assert "20" in out
    code, out, _ = run(capsys, "convert", "mine:net", "--json")
    assert json.loads(out)
    code, out, _ = run(capsys, "convert", "mine:net", "--no-fuse", "--keep", "1*", "--init", "none")
    assert code == 0
    assert out.count("not fused: --no-fuse") == 14  # 1, 11, 13, 15, 17 and 19 are kept
    assert "initialised" not in out
    code, out, _ = run(capsys, "convert", "mine:net", "DKS", "tanh", "--q-slope", "0.99", "--json")
    recipe = {"method": "DKS", "activation": "tanh", "zeta": 1.5, "q_slope": 0.99, "clamp": False}
    assert json.loads(out)["recipe"] == recipe
    code, out, _ = run(capsys, "convert", "mine:net", "--chain", "8")
    assert (code, "ShapedChain" in out) == (0, True)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "--json")
    assert code == 0
    row = json.loads(out)
    assert row["torch"] == torch.__version__
    assert row["cpu_tensors"] in ("native", "reference")
    assert run(capsys, "info")[0] == 0


def test_nothing_is_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["constants", "DKS", "tanh", "--method", "TAT", "--depth", "5"])
    assert caught.value.code == 2
    assert "method is given twice, as DKS and as TAT" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fusedshape {machine.version()}\n"


def test_train_from_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.py").write_text(
        "import torch\n"
        "from fusedshape.train import Data\n"
        "def data():\n"
        "    x, y = torch.ones(8, 1, 4, 4), torch.arange(8) % 2\n"
        "    return Data(x, y, x, y, num_classes=2)\n"
        "def poison(in_channels, num_classes):\n"
        "    class Net(torch.nn.Linear):\n"
        "        def forward(self, x):\n"
        "            return super().forward(x.flatten(1)) * float('nan')\n"
        "    return Net(16 * in_channels, num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    config = {"model": "mlp", "data": "small:data", "depth": 30, "width": 8, "epochs": 1}
    Path("my config.json").write_text(json.dumps(config))
    code, out, err = run(capsys, "train", "my config.json", "--out", "a b")
    assert (code, err) == (0, "")
    assert out.startswith("1 epochs, ")
    assert Path("a b/result.json").exists()
    config |= {"model": "small:poison", "depth": None, "method": None, "pln": False}
    Path("my config.json").write_text(json.dumps(config))
    code, out, err = run(capsys, "train", "my config.json", "--out", "c")
    assert (code, out) == (1, "")
    assert "epoch 1 is not finite" in err
    sys.modules.pop("small", None)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")
def test_whoever_reads_may_stop() -> None:
    bench = f"{sys.executable} -m fusedshape bench list --suite cpu"
    done = subprocess.run(
        ["bash", "-c", f"{bench} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    # 0 if all of it went into the pipe's buffer before head left.
    assert done.stdout.splitlines()[1] in ("0", "141")
    done = subprocess.run(["bash", "-c", f"{bench} > /dev/full"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "fusedshape: error: [Errno 28] No space left on device\n"


def test_a_terminal_that_knows_no_greek() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusedshape", "bench", "show", "bench/results/cpu.json"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"bare" in done.stdout


def test_as_a_program() -> None:
    program = [sys.executable, "-m", "fusedshape"]
    done = subprocess.run([*program, "constants"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr
    done = subprocess.run([*program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "constants" in done.stdout
