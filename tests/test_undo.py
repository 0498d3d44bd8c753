"""UndoLog: everything is put back, whatever raises, and whenever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusedshape.undo import UndoLog, all_or_nothing, why_not_written
from tests.support.interrupting import interrupted_at, state


class Noisy(nn.Linear):
    """A class to swap to."""


def change(log: UndoLog, model: nn.Sequential) -> None:
    """Write once in every way that the log must undo."""
    for name, module in model.named_modules():
        log.module(module, name)
    for name, tensor in model.state_dict(keep_vars=True).items():
        log.tensor(tensor, name)
    log.generator(torch.default_generator)
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias = nn.Parameter(torch.full((3,), torch.nan))
    model[0].__class__ = Noisy
    model._modules["0"] = nn.Identity()
    model.add_module("more", nn.ReLU())
    model[1].inplace = True
    del model[2].bias
    model[2].notes.append(3)
    model.zero_grad_hooks = {}  # type: ignore[assignment]


def make() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].notes = [1, 2]  # type: ignore[assignment]
    return model


def test_an_interrupt_at_any_line_leaves_all_as_it_was() -> None:
    model = make()
    before = state(model)
    for step in range(1, 10**4):
        stopped = interrupted_at(
            step,
            lambda: all_or_nothing(lambda log: change(log, model)),
            lambda c: c is change.__code__,
        )
        if not stopped:
            break
        assert state(model) == before, step
    assert step > 20
    assert state(model) != before


def test_an_interrupt_while_putting_back_loses_no_step() -> None:
    model = make()
    before = state(model)

    def failing(log: UndoLog) -> None:
        change(log, model)
        raise ValueError

    for step in range(1, 10**4):
        try:
            stopped = interrupted_at(
                step,
                lambda: all_or_nothing(failing),
                lambda c: (
                    c.co_filename.endswith("undo.py")
                    and c.co_name in ("_refill", "_write", "_set_class")
                ),
            )
        except ValueError:
            break
        assert stopped
        assert state(model) == before, step
    assert step > 20


def test_a_step_that_fails_does_not_stop_the_others() -> None:
    values = [1, 2]

    def failing(log: UndoLog) -> None:
        log.contents(values, "the values")
        log.save("the door", lambda: 1 / 0)
        values.clear()
        raise ValueError("first")

    with pytest.raises(ValueError, match="first") as caught:
        all_or_nothing(failing)
    assert values == [1, 2]
    (note,) = caught.value.__notes__
    assert "the door (ZeroDivisionError" in note
    assert "the values" not in note


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(2, 2)


def test_what_cannot_be_written_is_told_apart(tmp_path: Any) -> None:
    np.save(tmp_path / "a.npy", np.ones((64, 64), np.float32))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    with pytest.warns(UserWarning, match="not writable"):
        read_only = torch.from_numpy(mapped)
    bad = {
        "share one place": torch.zeros(1, 3).expand(4, 3),
        "expanded": torch.zeros(8).as_strided((3, 3), (2, 1)),
        "inference": inference(),
        "read-only": read_only,
        "meta": torch.empty(2, device="meta"),
        "layout": torch.eye(3).to_sparse(),
    }
    for word, tensor in bad.items():
        assert word in why_not_written(tensor)
    good = [torch.zeros(3, 4), torch.zeros(3, 4).T, torch.zeros(8)[::2], torch.zeros(0, 3)]
    good += [torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.tensor(1.0)]
    assert [why_not_written(tensor) for tensor in good] == [""] * len(good)


def test_what_was_not_changed_is_not_written() -> None:
    class Locked(nn.Linear):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise RuntimeError("locked")
            super().__setattr__(name, value)

    layer = Locked(2, 2)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-0.0, torch.nan]))
    versions = [p._version for p in layer.parameters()]
    log = UndoLog()
    log.module(layer)
    for name, parameter in layer.named_parameters():
        log.tensor(parameter, name)
    log.undo()
    assert log.failed == []
    assert [p._version for p in layer.parameters()] == versions


def test_the_sign_of_zero_is_put_back() -> None:
    zero = torch.tensor([-0.0])
    log = UndoLog()
    log.tensor(zero, "zero")
    zero.abs_()
    log.undo()
    assert zero.signbit().all()


def test_other_threads_never_find_a_module_without_its_attributes() -> None:
    module, missing = nn.Linear(2, 2), list[str]()
    own = set(vars(module))

    class Watching:
        """Looks at the module when undo takes it off."""

        def __del__(self) -> None:
            missing.extend(own - set(vars(module)) - moved)

    log = UndoLog()
    log.module(module)
    moved: set[str] = set()
    module.eval()
    vars(module)["watching"] = Watching()
    log.undo()
    assert "watching" not in vars(module)
    assert not missing

    log = UndoLog()
    log.module(module)
    module.training, moved = Watching(), {"training"}  # type: ignore[assignment]
    vars(module)["_parameters"] = vars(module).pop("_parameters")  # the order is another one
    order = list(vars(nn.Linear(2, 2)))
    log.undo()
    assert list(vars(module)) == order
    assert not missing
