"""The training loop: build, train, evaluate, checkpoint, resume."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedshape.convert import convert
from fusedshape.files import quoted, remove_leftovers, write_json
from fusedshape.init import init_module_
from fusedshape.kinds import kind_of
from fusedshape.loading import make, make_model
from fusedshape.models import vanilla_convnet, vanilla_mlp
from fusedshape.nn import PerLocationNorm
from fusedshape.theory import EOC
from fusedshape.train.checkpoint import Result, keep, resume
from fusedshape.train.config import TrainConfig
from fusedshape.train.data import Data, digits
from fusedshape.train.plot import plot_curves
from fusedshape.validate import find_device, instance

WARM_UP = 0.3  # share of the steps in which the learning rate rises
START, END = 1 / 25, 1 / 250_000  # first and last learning rate, relative to the peak
CHECK_EVERY = 16  # steps between checks of the loss, because each check makes the GPU wait
EVAL_BATCH = 512


def run(config: TrainConfig, out_dir: str | Path) -> Result:
    """Train as configured into a folder, and resume an earlier run of the same configuration.

    Writes `result.json` and `checkpoint.pt` after every epoch, each in one piece, and `curves.png`
    at the end if matplotlib is there. An interrupt (Ctrl-C) keeps the finished epochs.

    Args:
        config: what to train.
        out_dir: folder, made if missing.

    Returns:
        The content of `result.json`: config, status ("done", "diverged" or, while not finished,
        "running"), epochs (per epoch: train_loss, test_loss, test_accuracy, seconds), final and
        best test accuracy.

    Raises:
        ValueError: the folder holds a run of another configuration or a damaged checkpoint, the
            device does not exist, torchrun has started several processes, or `convert` refuses the
            model.
        OSError: a file cannot be read or written; the last checkpoint stays as it was.

    Example:
        >>> result = run(TrainConfig(depth=30), "runs/thirty")  # doctest: +SKIP
    """
    instance("run", "config", config, TrainConfig)
    demand_one_process()
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)

    def save(result: Result) -> None:
        write_json(out / "result.json", result)

    result = fit(config, checkpoint=out / "checkpoint.pt", on_epoch=save, bar=sys.stderr.isatty())
    save(result)
    with suppress(ImportError):  # matplotlib is an extra; the numbers are in result.json
        plot_curves({config.activation: [result]}, out / "curves.png")
    return result


def demand_one_process() -> None:
    """Raise if torchrun has started several processes, because training runs in one.

    Raises:
        ValueError: several processes, or a variable of torchrun that is no number.

    Example:
        >>> demand_one_process()
    """
    processes = _variable("WORLD_SIZE", 1, math.inf)
    if processes is not None and processes > 1:
        raise ValueError(
            f"train runs in one process, and torchrun has started {processes}; start it by itself, "
            "or convert a model and train it in a distributed loop of your own"
        )
    for name in ("RANK", "LOCAL_RANK"):
        _variable(name, 0, 0)
    _variable("MASTER_PORT", 0, 65535)


def _variable(name: str, low: int, high: float) -> int | None:
    """A whole number from the environment; None if the variable is not set."""
    text = os.environ.get(name)
    if text is None:
        return None
    whole = text.isascii() and text.isdecimal() and len(text) < 20
    if not (whole and low <= int(text) <= high):
        limits = f"in {low} … {high}" if high < math.inf and high > low else f"{low}"
        limits = limits if high < math.inf else f"at least {low}"
        raise ValueError(
            f"{name}={quoted(text)} in the environment must be a whole number, {limits} for the "
            "one process that train runs in; unset it"
        )
    return int(text)


def fit(
    config: TrainConfig,
    *,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Result], None] | None = None,
    bar: bool = False,
) -> Result:
    """Train as configured and return the result; `run` adds the files.

    Args:
        config: what to train.
        checkpoint: file to resume from, if it exists, and to write after every epoch.
        on_epoch: called after every epoch with the result so far.
        bar: show progress on stderr, if tqdm is installed.

    Returns:
        As `run`.

    Raises:
        ValueError: as `run`.
    """
    device = find_device(config.device)
    with _threads(config.threads), torch.random.fork_rng([device] if device.type == "cuda" else []):
        # For dropout and factories; fork_rng restores the generators. torch.manual_seed would
        # also seed all other GPUs.
        torch.default_generator.manual_seed(config.seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(config.seed)
        data = load_data(config)
        model = build(config, data).to(device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimiser = _optimiser(config, model)
        result: Result = {"config": config.to_dict(), "status": "running", "epochs": []}
        if checkpoint is not None and os.path.lexists(checkpoint):
            result = resume(checkpoint, config, model, optimiser)
            _summarise(result)
        x, y = data.train_x.to(device), data.train_y.to(device)
        test_x, test_y = data.test_x.to(device), data.test_y.to(device)
        if bar and (tqdm := _tqdm()) is not None:
            rounds = tqdm(range(len(result["epochs"]), config.epochs), unit="epoch")
        else:
            rounds = range(len(result["epochs"]), config.epochs)
        for epoch in rounds:
            if result["status"] != "running":
                break
            start = time.perf_counter()
            train_loss = _train_epoch(config, epoch, model, optimiser, x, y)
            test_loss, accuracy = evaluate(model, test_x, test_y, config)
            finite = math.isfinite(train_loss) and math.isfinite(test_loss)
            result["epochs"].append(
                {
                    "train_loss": train_loss if finite else None,
                    "test_loss": test_loss if finite else None,
                    "test_accuracy": accuracy if finite else None,
                    "seconds": time.perf_counter() - start,
                }
            )
            if not finite:
                result["status"] = "diverged"
            elif epoch + 1 == config.epochs:
                result["status"] = "done"
            _summarise(result)
            if checkpoint is not None:
                keep(checkpoint, result, model, optimiser)
            if on_epoch is not None:
                on_epoch(result)
    return result


def build(config: TrainConfig, data: Data) -> nn.Module:
    """Build the network as configured: converted, initialised, with PLN before it.

    Args:
        config: what to build.
        data: its shapes determine the sizes of the input and of the head.

    Returns:
        A module (N, C, *spatial) → (N, num_classes) on the CPU.

    Raises:
        ValueError: `convert` or `init_module_` refuses the model.
        TypeError: the factory returns no module.
        RuntimeError: the factory raised something.
    """
    shape = list(data.train_x.shape[1:])
    shape[0] += config.pln
    if config.model == "convnet":
        assert config.depth is not None
        model: nn.Module = vanilla_convnet(config.depth, config.width, shape[0], data.num_classes)
    elif config.model == "mlp":
        assert config.depth is not None
        model = vanilla_mlp(config.depth, config.width, math.prod(shape), data.num_classes)
    else:
        model = make_model(config.model, in_channels=shape[0], num_classes=data.num_classes)
    generator = torch.Generator().manual_seed(config.seed)
    recipe = config.recipe
    if recipe is not None:
        depth = None if isinstance(recipe, EOC) else config.depth
        convert(model, recipe, depth=depth, init=config.init, generator=generator)
    elif config.init is not None:
        for module in model.modules():
            if kind_of(module) is not None:
                init_module_(module, config.init, config.gain, generator=generator)
    return nn.Sequential(PerLocationNorm(), model) if config.pln else model


def load_data(config: TrainConfig) -> Data:
    """Load the data as configured.

    Raises:
        ImportError: "digits" without scikit-learn.
        TypeError: the factory returns no `Data`.
        RuntimeError: the factory raised something.
    """
    if config.data == "digits":
        return digits()
    data = make(config.data)
    if not isinstance(data, Data):
        raise TypeError(f"{config.data} returned {type(data).__name__}, not a Data")
    return data


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, config: TrainConfig) -> tuple[float, float]:
    """Mean cross entropy (natural logarithm, no smoothing) and accuracy (0 … 1).

    Args:
        model: the network.
        x: (N, C, *spatial), on the model's device.
        y: (N,) labels.
        config: configures autocast and memory format.

    Returns:
        (loss, accuracy).
    """
    model.eval()
    loss, right = 0.0, 0
    for part, labels in zip(x.split(EVAL_BATCH), y.split(EVAL_BATCH), strict=True):
        with _autocast(config):
            logits = model(_layout(part, config)).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += int((logits.argmax(1) == labels).sum())
    return loss / len(y), right / len(y)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of one step.

    Args:
        config: configures peak and schedule.
        step: 0 … steps − 1.
        steps: number of steps of the run.

    Returns:
        The rate.

    Example:
        >>> [learning_rate(TrainConfig(depth=1, lr=1.0), s, 11) for s in (0, 3)]
        [0.04, 1.0]
    """
    if config.schedule == "constant":
        return config.lr
    top = max(WARM_UP * (steps - 1), 1e-9)
    if step <= top:
        low, share = START, step / top
    else:
        low, share = END, (steps - 1 - step) / (steps - 1 - top)
    return config.lr * (low + (1 - low) * 0.5 * (1 - math.cos(math.pi * share)))


def _train_epoch(
    config: TrainConfig,
    epoch: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
) -> float:
    """Train for one epoch; return the mean loss, or the first sum of losses that is not finite."""
    model.train()
    # Each epoch has its own generator, so that a resumed run sees the same order.
    generator = torch.Generator().manual_seed(2**32 * (epoch + 1) + config.seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    batches = order.split(config.batch_size)
    total = torch.zeros((), device=x.device)
    for i, batch in enumerate(batches):
        rate = learning_rate(config, epoch * len(batches) + i, config.epochs * len(batches))
        for group in optimiser.param_groups:
            group["lr"] = rate
        with _autocast(config):
            logits = model(_layout(x[batch], config)).float()
        loss = F.cross_entropy(logits, y[batch], label_smoothing=config.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += loss.detach() * len(batch)
        if i % CHECK_EVERY == 0 and not math.isfinite(total.item()):
            break
    return total.item() / len(x)


def _optimiser(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    # One call for all tensors: at depth 300 there are hundreds of small ones.
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    if config.optimiser == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(
            model.parameters(), momentum=momentum, nesterov=momentum > 0, **options
        )
    return torch.optim.AdamW(model.parameters(), **options)


def _layout(x: Tensor, config: TrainConfig) -> Tensor:
    if config.channels_last and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _autocast(config: TrainConfig) -> Any:
    if config.amp is None:
        return nullcontext()
    return torch.autocast(torch.device(config.device).type, getattr(torch, config.amp))


def _summarise(result: Result) -> None:
    accuracies = [e["test_accuracy"] for e in result["epochs"] if e["test_accuracy"] is not None]
    result["final_accuracy"] = result["epochs"][-1]["test_accuracy"]
    result["best_accuracy"] = max(accuracies, default=None)
    result["final_train_loss"] = result["epochs"][-1]["train_loss"]
    result["seconds"] = sum(e["seconds"] for e in result["epochs"])


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
