"""What convert did to a model: `Report`, and its rows, `Change`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusedshape.columns import aligned
from fusedshape.diagnose import Diagnosis
from fusedshape.spec import ActSpec
from fusedshape.theory import Recipe


@dataclass(frozen=True)
class Change:
    """One row of a `Report`.

    Attributes:
        path: qualified name of the module ("" is the model itself).
        was: what stood there.
        now: what stands there after conversion; the same as `was` if nothing changed.
        note: why this was done, or why it was not fused.
    """

    path: str
    was: str
    now: str
    note: str = ""


@dataclass(frozen=True)
class Done:
    """What one stage did to a model before the activations were planned.

    Attributes:
        rows: the report's rows of it.
        notes: what the user should know of it.
        counts: what it adds to the report's counts.
    """

    rows: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)


def left_alone(path: str, module: Any, note: str) -> Change:
    """The row of a module that stays as it is."""
    kind = type(module).__name__
    return Change(path, kind, kind, note)


@dataclass(frozen=True)
class Report:
    """What `convert` did to a model, or would do.

    Attributes:
        recipe: what was solved for, or the spec that was given.
        spec: the constants put in.
        depth: nonlinear layers on the longest path, as given or counted; None if neither is known.
        init: the initialiser, or None.
        dry_run: whether the model was left alone.
        changes: one row for each activation and layer changed or left, in the model's order.
        notes: what else the user should know.
        counts: "fused", "shaped", "rewritten", "stripped", "chained", "initialised",
            "skipped"; "reweighted" and "removed" count sums, where shortcuts= was given.
        health: what `fusedshape.diagnose` said of the converted model on the example; None where it
            was not asked, or could not say, for which notes has the reason.
    """

    recipe: Recipe | ActSpec
    spec: ActSpec
    depth: int | None
    init: str | None
    dry_run: bool
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    counts: dict[str, int]
    health: Diagnosis | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reports that were pickled before there were recipes lack theirs.
        vars(self).update({"recipe": state["spec"], **state})

    @property
    def method(self) -> str:
        """Name of the recipe's method; "given" where the constants were given."""
        return self.recipe.method if isinstance(self.recipe, Recipe) else "given"

    @property
    def skipped(self) -> tuple[Change, ...]:
        """The rows that say what was left alone, and why."""
        return tuple(c for c in self.changes if c.now == c.was)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        rows = [vars(c).copy() for c in self.changes]
        data = {"method": self.method, **vars(self), "recipe": self.recipe.to_dict()}
        data |= {"spec": self.spec.to_dict(), "changes": rows}
        data |= {"notes": list(self.notes), "counts": dict(self.counts)}
        if self.health is not None:
            found = [vars(finding).copy() for finding in self.health.findings]
            data["health"] = {"verdict": self.health.verdict, "findings": found}
        return data

    def __str__(self) -> str:
        depth = "" if self.depth is None else f", depth {self.depth}"
        verb = "would change" if self.dry_run else "changed"
        counts = ", ".join(f"{n} {what}" for what, n in self.counts.items() if n)
        head = [f"convert ({self.method}{depth}) {verb}: {counts}", f"  {self.spec}"]
        rows = [("module", "was", "now", "")]
        rows += [(c.path or "(model)", c.was, c.now, c.note) for c in self.changes]
        health = [] if self.health is None else [f"health: {self.health.verdict}"]
        lines = [*head, "", aligned(rows), *self.notes, *health]
        return "\n".join(line.rstrip() for line in lines)
