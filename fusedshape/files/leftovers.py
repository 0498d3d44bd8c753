"""Temporary files: their names tell the writer, and those of killed writers are removed."""

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

#: A file whose writer is unknown, as on another machine, counts as abandoned after these seconds.
DAY = 86400.0
_NAME = re.compile(r"\.fusedshape-([0-9a-f]{8})-(\d+)-(\d+)-\d+\.tmp$")
_COUNT = itertools.count()


def temporary_beside(path: Path) -> Path:
    """A new name at every call for a file that will replace `path`.

    The name contains the machine, the process id and the start time of the process, from which
    `remove_leftovers` learns whether the writer is alive.
    """
    pid = os.getpid()
    tag = f"{_machine_tag()}-{pid}-{_start_of(pid) or 0}-{next(_COUNT)}"
    return path.with_name(f"{path.name[:40]}.fusedshape-{tag}.tmp")


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove the temporary files that killed processes of this user left in a folder.

    A file stays if another user owns it, if its writer is alive, or if the writer was a process of
    another machine or container and wrote within the last day. Never raises.

    Args:
        folder: folder to look in; it need not exist.

    Returns:
        The files that were removed.
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
    """Whether the process that started at `start` (0 if unknown) is still running."""
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
    """Clock ticks from the start of the machine to that of the process; None if unknown."""
    try:
        line = Path(f"/proc/{pid}/stat").read_bytes()
        # The name of the program, in parentheses, may contain anything.
        return int(line.rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _machine_tag() -> str:
    """A tag that differs between machines, boots and containers, which may share a folder."""
    parts = [platform.node()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            link = os.path.islink(source)
            parts.append(os.readlink(source) if link else Path(source).read_text("ascii"))
        except (OSError, ValueError):
            continue
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:8]
