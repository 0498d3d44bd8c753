"""Temporary files: names that tell their writer, and the removal of what killed writers left."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
import platform
import re
import stat
import time
from pathlib import Path

logger = logging.getLogger("fusedshape.files")

#: Seconds after which a file of an unknown writer, as of another machine, counts as left.
DAY = 86400.0
_NAME = re.compile(r"\.fusedshape-([0-9a-f]{8})-(\d+)-(\d+)-\d+\.tmp$")
_COUNT = itertools.count()


def temporary_beside(path: Path) -> Path:
    """A name, new at every call, for a file that is to take the place of `path`.

    It carries machine, process id and start time of the process, by which `sweep` knows whether
    its writer lives.
    """
    pid = os.getpid()
    tag = f"{_machine_tag()}-{pid}-{_start_of(pid) or 0}-{next(_COUNT)}"
    return path.with_name(f"{path.name[:40]}.fusedshape-{tag}.tmp")


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files that killed processes of this user left in a folder.

    A file stays if somebody else owns it, if its writer lives, or if the writer was a process of
    another machine (or of another container) and wrote within the last day. Never raises.

    Args:
        folder: where to look; need not exist.

    Returns:
        What was removed.
    """
    removed = []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        path = Path(folder) / name
        found = _NAME.search(name)
        if found is not None and _is_left(path, *found.groups()):
            try:
                path.unlink()
            except OSError:
                continue
            logger.info("removed %s, which a killed process left", path)
            removed.append(path)
    return removed


def _is_left(path: Path, tag: str, pid: str, start: str) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) or not _is_mine(found):
        return False
    if tag == _machine_tag() and os.name == "posix":
        return not _lives(int(pid), int(start))
    return time.time() - found.st_mtime > DAY


def _is_mine(found: os.stat_result) -> bool:
    return os.name != "posix" or found.st_uid == os.geteuid()


def _lives(pid: int, start: int) -> bool:
    """Whether the process that began at `start` (0 if unknown) still runs."""
    now = _start_of(pid)
    if now is not None and start:
        return now == start
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _start_of(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's; None where nothing tells them."""
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
        # The program's name, in parentheses, may hold anything.
        return int(line.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _machine_tag() -> str:
    """Tells apart the machines, starts of one machine, and containers that may share a folder."""
    parts = [platform.node()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            link = os.path.islink(source)
            parts.append(os.readlink(source) if link else Path(source).read_text("ascii"))
        except (OSError, ValueError):
            continue
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:8]
