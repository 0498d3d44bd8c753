"""The suites: which cases run, where, and for how long."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal

from fusedshape.bench.cases import CASES, Case


@dataclass(frozen=True)
class Suite:
    """A selection of cases, and how they are run.

    Attributes:
        name: as `--suite` takes it.
        about: one line of help.
        device: "cpu" or "cuda".
        limit: seconds after which no further case begins.
        budget: seconds of timing for each case.
        least: minimum number of rounds.
        most: maximum number of rounds.
        check_first: check all cases against float64 before the first is timed.
        compiled: names of `providers.COMPILED` that are run.
    """

    name: str
    about: str
    device: Literal["cpu", "cuda"] = "cpu"
    limit: float = 3600.0
    budget: float = 1.0
    least: int = 7
    most: int = 30
    check_first: bool = False
    compiled: tuple[str, ...] = ()

    def cases(self, pattern: str = "*") -> list[Case]:
        """The cases whose names match a shell pattern, the most important first.

        Raises:
            ValueError: no name matches.
        """
        own = [case for case in CASES if self.name in case.suites]
        found = [case for case in own if fnmatch.fnmatchcase(case.name, pattern)]
        if not found:
            raise ValueError(
                f"no case of suite {self.name!r} matches {pattern!r}; see them all with: "
                f"fusedshape bench list --suite {self.name}"
            )
        return found


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("smoke", "a few seconds: the smallest of everything", budget=0.02, least=3, most=8),
        Suite(
            *("cpu", "5 minutes on 2 cores: layers, networks, calls, import"),
            limit=285.0,
            budget=0.5,
            compiled=("compiled",),
        ),
        Suite("solver", "2 minutes: constants, beside the package dks", limit=600.0, budget=0.3),
        Suite("accuracy", "a minute: errors in half precision beside eager's, nothing timed"),
        Suite("scaling", "minutes: growth with depth and batch", limit=600.0, least=3, most=9),
        Suite(
            *("gpu-quick", "10 minutes on a GPU, correctness first, then the most telling cases"),
            device="cuda",
            limit=540.0,
            budget=0.5,
            check_first=True,
            compiled=("compiled",),
        ),
        Suite(
            *(
                "gpu",
                "hours on a GPU: all layers of ResNet-50 and VGG-16, torch.compile's max-autotune",
            ),
            device="cuda",
            limit=4 * 3600.0,
            budget=2.0,
            check_first=True,
            compiled=("compiled", "compiled max-autotune"),
        ),
    )
}
