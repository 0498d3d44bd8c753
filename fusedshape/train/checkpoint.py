"""The checkpoint of a training run, and the checks before a run resumes from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusedshape.files import ContentError, expect, load_checkpoint, quoted, save_checkpoint
from fusedshape.train.config import TrainConfig

Result = dict[str, Any]

KIND = "fusedshape train"
#: Rises when a reader of the old form would misread the new one. Files of schema 0 have neither
#: this number nor a checksum.
SCHEMA = 1
WAY_OUT = "remove that file to start anew, or choose another folder"

#: What a result records of each epoch; null if the loss was not finite.
EPOCH = {
    "train_loss": (float, None),
    "test_loss": (float, None),
    "test_accuracy": (float, None),
    "seconds": float,
}
_RESULT = {
    "config": dict,
    "status": ("running", "done", "diverged"),
    "epochs": [EPOCH, ...],
    **dict.fromkeys(("final_accuracy?", "best_accuracy?", "final_train_loss?"), (float, None)),
    "seconds?": float,
}
_STATE = {
    "result": _RESULT,
    "model": dict,
    "optimiser": {"state": dict, "param_groups": [dict]},
    "rng": Tensor,
}
#: What an optimiser keeps for each parameter: scalars, or tensors of its shape.
_SLOTS = {"adam": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}


def keep(path: Path, result: Result, model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Write everything that `resume` needs, in one piece.

    Args:
        path: the file.
        result: the result so far.
        model: the network.
        optimiser: its optimiser.

    Raises:
        OSError: the file cannot be written; names `path`, the reason, the room on the disk, and
            which checkpoint is left.
    """
    state = {
        "result": result,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "rng": torch.get_rng_state(),
    }
    device = torch.device(result["config"]["device"])
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    epoch = len(result["epochs"])
    try:
        save_checkpoint(path, state, KIND, SCHEMA)
    except OSError as error:
        before = f"the checkpoint of epoch {epoch - 1} is as it was, and " if path.exists() else ""
        raise OSError(
            error.errno,
            f"{error.strerror}. The run stops behind epoch {epoch}: {before}the same call goes on "
            f"with epoch {epoch if before else 1} once this is mended",
            error.filename,
        ) from None


def resume(
    path: Path, config: TrainConfig, model: nn.Module, optimiser: torch.optim.Optimizer
) -> Result:
    """Load what `keep` wrote into model and optimiser, after checking all of it.

    Args:
        path: the file.
        config: configuration of this run.
        model: the model that `config` builds.
        optimiser: optimiser of the model.

    Returns:
        The result so far.

    Raises:
        ValueError: the file is damaged, or of another run; names `path`, the key and a way out.
        OSError: it cannot be read.
    """
    values = model.state_dict().values()
    tensors = sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
    try:
        # The limit: weights, two moments, and room for names and epochs.
        state = load_checkpoint(path, KIND, SCHEMA, 4 * tensors + (64 << 20))
        shape = _STATE | ({"cuda_rng": Tensor} if _on_gpu(config) else {"cuda_rng?": Tensor})
        try:
            expect(state, shape, "its content")
            _check_config(state["result"]["config"], config)
            _check_result(state["result"], config)
            diverged = state["result"]["status"] == "diverged"
            _check_model(state["model"], model, diverged)
            _check_optimiser(state["optimiser"], optimiser, config, diverged)
            _check_generator(state["rng"], torch.get_rng_state(), "rng")
        except ContentError as error:
            raise ContentError(f"{path} is of no use to this run: {error}") from None
    except ContentError as error:
        raise ContentError(f"{error}; {WAY_OUT}") from None
    try:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
        if _on_gpu(config):
            torch.cuda.set_rng_state(state["cuda_rng"], config.device)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ContentError(f"{path} cannot be gone on with ({what}); {WAY_OUT}") from error
    result: Result = state["result"]
    return result


def _on_gpu(config: TrainConfig) -> bool:
    return torch.device(config.device).type == "cuda"


def _check_config(theirs: Mapping[str, Any], config: TrainConfig) -> None:
    default = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    mine = config.to_dict()
    names = sorted(map(str, {*mine, *theirs}))
    # A field that is newer than the file had its default value.
    other = [n for n in names if n not in mine or mine[n] != theirs.get(n, default[n])]
    if other:
        raise ContentError(
            f"it holds a run of another configuration (different: {', '.join(other)})"
        )


def _check_result(result: Result, config: TrainConfig) -> None:
    epochs, status = result["epochs"], result["status"]
    finite = [None not in epoch.values() for epoch in epochs]
    wrong = (
        not 1 <= len(epochs) <= config.epochs
        or not all(finite[:-1])
        or (status == "diverged") == finite[-1]
        or (status == "done" and len(epochs) < config.epochs)
        or (status == "running" and len(epochs) == config.epochs)
    )
    if wrong:
        raise ContentError(f"result: {len(epochs)} epochs of {config.epochs}, yet it is {status!r}")
    for i, epoch in enumerate(epochs):
        accuracy = epoch["test_accuracy"]
        if epoch["seconds"] < 0 or not (accuracy is None or 0 <= accuracy <= 1):
            raise ContentError(f"result.epochs[{i}] holds what no epoch gives: {quoted(epoch)}")


def _check_model(theirs: Mapping[Any, Any], model: nn.Module, diverged: bool) -> None:
    own = model.state_dict()
    missing = [key for key in own if key not in theirs]
    foreign = [key for key in theirs if key not in own]
    if missing or foreign:
        raise ContentError(
            f"model lacks {quoted(missing)} and has {quoted(foreign)}, which the configuration's "
            "network does not have"
        )
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, value in own.items():
        if isinstance(value, Tensor):
            _check_tensor(theirs[key], value, f"model[{key!r}]", key in learned and not diverged)


def _check_optimiser(
    theirs: Mapping[str, Any],
    optimiser: torch.optim.Optimizer,
    config: TrainConfig,
    diverged: bool,
) -> None:
    (own,) = optimiser.state_dict()["param_groups"]
    (group,) = theirs["param_groups"]
    for key in ("params", "lr"):
        if key not in group:
            raise ContentError(f"optimiser.param_groups[0] lacks {key!r}")
    # The learning rate is set at every step. Keys of another version of torch are left to torch.
    strange = [k for k in own if k in group and k != "lr" and not _same(group[k], own[k])]
    if strange:
        key = strange[0]
        raise ContentError(
            f"optimiser.param_groups[0][{key!r}] is {quoted(group[key])}, expected "
            f"{quoted(own[key])}"
        )
    parameters = optimiser.param_groups[0]["params"]
    for index, slots in theirs["state"].items():
        where = f"optimiser.state[{quoted(index)}]"
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ContentError(f"{where} is of no parameter")
        if not isinstance(slots, dict):
            raise ContentError(f"{where} is {quoted(slots)}, expected dict")
        wanted = _SLOTS[config.optimiser] if slots or config.optimiser == "adam" else set()
        if set(slots) != wanted:
            raise ContentError(f"{where} has {quoted(sorted(map(str, slots)))}, expected {wanted}")
        for name, value in _slots(slots):
            like = parameters[index]
            if name == "step":
                like = torch.zeros((), dtype=torch.float32)
            _check_tensor(value, like, f"{where}[{name!r}]", not diverged)


def _slots(slots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in slots.items():
        # SGD stores None without momentum and before the first step.
        if not (name == "momentum_buffer" and value is None):
            yield name, value


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _check_tensor(value: Any, like: Tensor, where: str, number: bool) -> None:
    if not isinstance(value, Tensor):
        raise ContentError(f"{where} is {quoted(value)}, expected a tensor")
    if value.shape != like.shape or value.dtype != like.dtype or value.layout != like.layout:
        raise ContentError(
            f"{where} is {value.dtype} of shape {tuple(value.shape)}, expected {like.dtype} of "
            f"shape {tuple(like.shape)}"
        )
    if number and value.isnan().any():
        raise ContentError(f"{where} holds NaN")


def _check_generator(value: Tensor, like: Tensor, where: str) -> None:
    if value.dtype != like.dtype or value.shape != like.shape:
        raise ContentError(f"{where} is no state of torch's random numbers")
