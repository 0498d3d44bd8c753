"""Questions about a value's type are answered as a tensor answers, or refused, by every route."""

from __future__ import annotations

import collections.abc
import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape import convert, fold, reference, reweight_shortcuts
from fusedshape.faithful import inputs_for, leaving_no_trace
from fusedshape.undo import UndoLog


@functools.singledispatch
def dispatched(y: object) -> bool:
    return False


@dispatched.register
def _(y: Tensor) -> bool:
    return True


def matched(y: object) -> bool:
    match y:
        case Tensor():
            return True
    return False


def tried(y: Any) -> bool:
    try:
        return len(y) > 0
    except Exception:
        return False


def is_tensor_in_a_helper(y: object) -> bool:
    return type(y) is Tensor


ASKED: dict[str, Callable[[Any], Any]] = {
    "isinstance": lambda y: isinstance(y, Tensor),
    "not isinstance": lambda y: isinstance(y, (list, tuple)),
    "isinstance of a call": lambda y: isinstance(torch.where(y > 0, y, 1.0), Tensor),
    "isinstance of an abstract class": lambda y: isinstance(y, collections.abc.Sequence),
    "isinstance of a parameter": lambda y: isinstance(y, nn.Parameter),
    "isinstance of a shape": lambda y: isinstance(y.shape, tuple),
    "torch.is_tensor": torch.is_tensor,
    "torch.jit.isinstance": lambda y: torch.jit.isinstance(y, Tensor),
    "is_tensor_like": torch.overrides.is_tensor_like,
    "has_torch_function": lambda y: not torch.overrides.has_torch_function((y,)),
    "type is": lambda y: type(y) is Tensor,
    "type ==": lambda y: type(y) == Tensor,  # noqa: E721
    "type in": lambda y: type(y) in (Tensor, nn.Parameter),
    "issubclass": lambda y: issubclass(type(y), Tensor),
    "in a helper": is_tensor_in_a_helper,
    "__class__": lambda y: y.__class__ is Tensor,
    "getattr": lambda y: y.__class__ is Tensor,
    "singledispatch": dispatched,
    "match": matched,
    "hasattr": lambda y: hasattr(y, "sample"),
    "getattr with a default": lambda y: getattr(y, "sample", None) is None,
    "hasattr of a tensor": lambda y: hasattr(y, "dim"),
    "callable": callable,
    "None": lambda y: y is None,
    "is_floating_point": torch.is_floating_point,
    "is_complex": lambda y: y.is_complex(),
    "dtype": lambda y: y.dtype == torch.float64,
    "device": lambda y: y.device.type == "cpu",
    "is_cuda": lambda y: y.is_cuda,
    "requires_grad": lambda y: y.requires_grad,
    "is_grad_enabled": lambda y: torch.is_grad_enabled(),
    "is_scripting": lambda y: not torch.jit.is_scripting(),
    "is_tracing": lambda y: not torch.jit.is_tracing(),
    "is_compiling": lambda y: not torch.compiler.is_compiling(),
    "_get_tracing_state": lambda y: torch._C._get_tracing_state() is None,
    "try len": tried,
    "truth": lambda y: bool(y.sum() != 0),
}


class Asking(nn.Module):
    """Doubles what it gives if the answer is yes."""

    def __init__(self, question: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer, self.question = nn.Linear(6, 6), question

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.layer(x))
        return 2 * y if self.question(y) else y


class AskingItself(Asking):
    """A model that asks for the type of its input in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.layer(x))
        return 2 * y if type(y) is Tensor and not callable(y) else y


@pytest.mark.parametrize("question", [*ASKED, ""])
@pytest.mark.parametrize("what", ["convert", "fold", "reweight"])
def test_a_question_is_answered_as_for_a_tensor_or_refused(question: str, what: str) -> None:
    part = Asking(ASKED[question]) if question else AskingItself(bool)
    plain = nn.Sequential(part, nn.Linear(6, 6)).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    model = copy.deepcopy(plain)
    refusal = ""
    try:
        if what == "convert":
            spec = convert(model, depth=20, init=None).spec
        elif what == "fold":
            model = fold(model)
        else:
            model = nn.Sequential(Skipping(model[0]), model[1])
            plain = copy.deepcopy(model)
            reweight_shortcuts(model, 0.5**0.5)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert question
        assert "cannot be traced" in refusal or "cannot be followed" in refusal
        return
    with torch.no_grad():
        want = plain(x)
        if what == "convert":
            y = plain[0].layer(x)
            factor = 2 if bool(part(x).eq(2 * F.relu(y)).all()) else 1
            want = plain[1](factor * reference.shaped_act(y, spec))
        elif what == "reweight":
            want = plain[1]((x + plain[0].inner(x)) * 0.5**0.5)
        got = model(x)
    torch.testing.assert_close(got, want)


class Skipping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_other_threads_see_nothing_of_a_trace() -> None:
    errors: list[BaseException] = []
    stop = threading.Event()
    layer, other = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(*(Asking(torch.is_tensor) for _ in range(12)))
    x, row = torch.ones(2, 4), torch.ones(2, 6)
    with torch.no_grad():
        want = layer(x), other(x), model(row)

    def use() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.enable_grad():
                    pass
                with torch.no_grad():
                    got = layer(x), other(x), model(row)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
                assert type(layer.weight) is nn.Parameter
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            convert(model, depth=20, dry_run=True, init=None)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_trial_run_leaves_no_trace() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.calls = nn.Linear(4, 4), nn.BatchNorm1d(4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            with torch.no_grad():
                self.layer.weight.mul_(0.5)
            return F.dropout(self.norm(self.layer(x)))

    model = Writing()
    seen: list[int] = []
    model.layer.register_forward_hook(lambda *_: seen.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    args = inputs_for(model)
    assert args is not None
    leaving_no_trace(model, lambda: model.train()(*args))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (model.calls, seen, len(model.layer._forward_hooks)) == (0, [], 1)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (2, 12)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(16)), (2, 3, 32, 32)),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), (2, 2)),
        (nn.Sequential(nn.ConvTranspose1d(3, 4, 3)), (2, 3, 8)),
    ],
)
def test_finds_an_input(model: nn.Module, shape: tuple[int, ...]) -> None:
    found = inputs_for(model)
    assert found is not None
    assert found[0].shape == shape


def test_says_if_no_input_was_found() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layer(x.view(7, 6)))

    made = [nn.Sequential(Shaped(), nn.Linear(6, 6)) for _ in range(2)]
    assert "no input was found" in str(convert(made[0], depth=20))
    assert "no input was found" not in str(convert(made[1], depth=20, example=torch.ones(42)))


class Clamping(nn.Linear):
    """Writes to a parameter in its forward, as critics with clipped weights do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.01, 0.01)
        return super().forward(x)


def test_only_what_is_written_to_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Clamping(4, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved: list[str] = []
    save = UndoLog.tensor

    def noting(log: UndoLog, tensor: torch.Tensor, name: str) -> None:
        saved.append(name)
        save(log, tensor, name)

    monkeypatch.setattr(UndoLog, "tensor", noting)
    output = leaving_no_trace(model, lambda: model(torch.ones(3, 4)))
    assert output.shape == (3, 4)
    assert set(saved) == {"2.weight", *(name for name, _ in model.named_buffers())}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
