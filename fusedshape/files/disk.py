"""Bytes: reading a file within a limit, and replacing a file in one piece."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fusedshape.files.leftovers import temporary_beside
from fusedshape.files.trust import stranger

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class ContentError(ValueError):
    """The content of a file or text cannot be used; the message begins with its source."""


def read_bytes(path: str | os.PathLike[str], limit: int, *, own: bool = False) -> bytes:
    """Read a regular file; pipes and devices, which might block, are refused.

    Args:
        path: the file.
        limit: maximum size in bytes.
        own: demand that it belongs to this user or to root, and that nobody else may write it.

    Raises:
        ContentError: it is no regular file, is too large, or belongs to somebody else.
        OSError: it cannot be read; names `path`.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise ContentError(f"{path!r} is no path: it has a null character")
    _demand_regular(os.stat(path), path)
    try:
        # O_NONBLOCK, in case the file has become a pipe in the meantime.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            found = os.fstat(file.fileno())
            _demand_regular(found, path)
            reason = stranger(found) if own else None
            if reason is not None:
                raise ContentError(f"{path} {reason}")
            content = b"" if found.st_size > limit else file.read(limit + 1)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    size = max(found.st_size, len(content))
    if size > limit:
        raise ContentError(f"{path} has {size:,} bytes; at most {limit:,} are read here")
    return content


def write_bytes(path: Path, *parts: bytes | memoryview, sync: bool = True) -> None:
    """Replace a file in one piece by the concatenation of these parts; see `replacing`."""
    with replacing(path, sum(map(len, parts)), sync=sync) as file, file.open("wb") as opened:
        opened.writelines(parts)


@contextmanager
def replacing(path: Path, size: int | None = None, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary file, which replaces `path` in one piece when the body ends.

    Readers of `path` see the old file or the new one, even if the process is killed or the machine
    stops. If the body fails, the old file stays and the temporary file is removed. Those of killed
    processes are left to `remove_leftovers`.

    Args:
        path: the file to replace; it need not exist.
        size: number of bytes that the body will write, for messages; None if unknown.
        sync: wait for the disk. Otherwise the file may be damaged if the machine stops, which is
            acceptable for files that carry a checksum and can be made again.

    Raises:
        OSError: the file cannot be written; names `path`, the reason, and the room on the disk.
    """
    temporary = temporary_beside(path)
    made = False
    try:
        demand_replaceable(path)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        made = True
        yield temporary
        if sync:
            _sync(temporary, os.O_RDWR)
        os.replace(temporary, path)
        if sync:
            with suppress(
                OSError
            ):  # not every file system can sync a folder; the file itself is safe
                _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        raise _cannot_write(error, path, size) from None
    finally:
        if made:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def demand_replaceable(path: Path) -> None:
    """Raise OSError if `path` is a folder, a device, or anything but a regular file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        folder = stat.S_ISDIR(found.st_mode)
        code = errno.EISDIR if folder else errno.EINVAL
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        reason = os.strerror(code) if folder else f"It is {kind}, which no file can replace"
        raise OSError(code, reason, str(path))


def _demand_regular(found: os.stat_result, path: str) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise ContentError(f"{path} is {kind}, not a regular file")


def _sync(path: Path, flags: int) -> None:
    """Wait until the disk holds what was written."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot_write(error: OSError, path: Path, size: int | None) -> OSError:
    room = [] if size is None else [f"{size:,} bytes to write"]
    with suppress(OSError, AttributeError):
        disk = os.statvfs(path.parent)
        room.append(f"{disk.f_bavail * disk.f_frsize:,} bytes free there")
    reason = error.strerror or str(error) or type(error).__name__
    return OSError(error.errno, f"{reason} ({', '.join(room)})" if room else reason, str(path))
