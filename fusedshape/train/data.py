"""Data sets small enough to live in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """Train and test examples.

    Args:
        train_x: `(N, C, *spatial)`, floating.
        train_y: (N,) int64, 0 … num_classes − 1.
        test_x: `(M, C, *spatial)`.
        test_y: (M,) int64.
        num_classes: number of classes.

    Raises:
        ValueError: shapes or labels do not fit each other.

    Example:
        >>> x, y = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
        >>> Data(x, y, x, y, num_classes=2).num_classes
        2
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        for name, x, y in (
            ("train", self.train_x, self.train_y),
            ("test", self.test_x, self.test_y),
        ):
            if not len(x) or y.shape != (len(x),):
                raise ValueError(
                    f"Data: {name}_x has {len(x)} examples, {name}_y shape {tuple(y.shape)}; "
                    "need one label per example, and at least one example"
                )
            if not x.is_floating_point() or x.ndim < 2:
                raise ValueError(
                    f"Data: {name}_x is {x.dtype} of shape {tuple(x.shape)}; "
                    "needs floating (N, C, *spatial)"
                )
            if y.dtype != torch.int64 or not 0 <= y.min() <= y.max() < self.num_classes:
                raise ValueError(
                    f"Data: {name}_y must be int64 in 0 … {self.num_classes - 1}, got {y.dtype} in "
                    f"{y.min().item()} … {y.max().item()}"
                )
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise ValueError(
                f"Data: examples of shape {tuple(self.train_x.shape[1:])} to train and "
                f"{tuple(self.test_x.shape[1:])} to test"
            )


def digits() -> Data:
    """Handwritten digits of scikit-learn: 1797 grey images of 8×8, ten classes.

    1437 are for training and 360 for testing. The split is stratified and always the same. Pixels
    are standardised by the mean and standard deviation of all training pixels.

    Returns:
        Data with float32 x of shape (N, 1, 8, 8).

    Raises:
        ImportError: scikit-learn is missing.

    Source: UCI Machine Learning Repository, "Optical Recognition of Handwritten Digits".
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits data need scikit-learn; install it with: pip install 'fusedshape[data]'"
        ) from error
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64) for y in split[2:])
    mean, std = train_x.mean(), train_x.std()
    return Data((train_x - mean) / std, train_y, (test_x - mean) / std, test_y, num_classes=10)
