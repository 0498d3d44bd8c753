"""Who may have written a file: files that other users can write are not loaded.

The rule is that of ssh: a file, and every folder and link on the way to it, must belong to this
user or to root, and nobody else may write it. A folder like /tmp, which all users may write but
where nobody may rename files of others, is accepted on the way. A group may have write access if it
has no other members.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

#: Maximum number of links on one path, as in Linux.
_LINKS = 40


def distrust(path: Path, below: Path | None = None) -> str | None:
    """Say why another user may have written what is at `path`; None if nobody can have.

    A path that does not exist yet is judged by its folders that exist. On systems without users,
    such as Windows, the answer is None.

    Args:
        path: a file or folder.
        below: a folder that is trusted, such as that of a running program. Folders above it are
            not checked, unless a link leads out of it.

    Returns:
        A sentence that names the path and what is wrong with it, or None.
    """
    if not path.is_absolute():
        return f"{path} is no absolute path"
    if os.name != "posix":
        return None
    try:
        for place, found in _passed(path, below):
            reason = stranger(found)
            if reason is not None:
                return f"{place} {reason}"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return f"{path} cannot be looked at ({getattr(error, 'strerror', None) or error})"
    return None


def user_cache() -> Path | None:
    """The cache folder of this user: ``$XDG_CACHE_HOME``, else ``~/.cache``.

    A relative ``$XDG_CACHE_HOME`` is ignored, as its specification says. The result is None for a
    user without a home.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if named and os.path.isabs(named):
        return Path(named)
    home = os.path.expanduser("~/.cache")
    return None if home.startswith("~") else Path(home)


def own_cache() -> Path:
    """This package's cache folder: ``$FUSEDSHAPE_CACHE``, else ``fusedshape`` in `user_cache`.

    It need not exist. A user without a home gets one below the directory for temporary files. A
    relative path in ``$FUSEDSHAPE_CACHE`` is returned unchanged, which `distrust` refuses.
    """
    own = os.environ.get("FUSEDSHAPE_CACHE")
    if own:
        return Path(os.path.expanduser(own))
    return (user_cache() or Path(tempfile.gettempdir())) / "fusedshape"


def stranger(found: os.stat_result) -> str | None:
    """Say why a file may be another user's, given its `os.stat`; None if it is ours."""
    if os.name != "posix":
        return None
    me = os.geteuid()
    if found.st_uid not in (0, me):
        return f"belongs to user {found.st_uid}, not to you ({me}) or root"
    if stat.S_ISLNK(found.st_mode):  # the mode of a link means nothing
        return None
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
    if found.st_mode & stat.S_IWOTH and not sticky:
        return "can be written by everybody (chmod o-w)"
    if found.st_mode & stat.S_IWGRP and not sticky and not _is_private(found.st_gid):
        return f"can be written by the group {found.st_gid}, which has other members (chmod g-w)"
    return None


def _passed(path: Path, below: Path | None) -> Iterator[tuple[str, os.stat_result]]:
    """Every folder and link on the way to a path, and the path itself, from the top down."""
    names = list(reversed(path.parts[1:]))
    here, links = "/", 0
    if below is not None and below in path.parents:
        here = str(below)
        names = names[: len(names) - len(below.parts) + 1]
    else:
        yield here, os.lstat(here)
    while names:
        name = names.pop()
        if name == "..":  # only in the target of a link
            here = os.path.dirname(here)
            continue
        place = os.path.join(here, name)
        found = os.lstat(place)
        yield place, found
        if not stat.S_ISLNK(found.st_mode):
            here = place
            continue
        links += 1
        if links > _LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), place)
        target = Path(os.readlink(place))
        if target.is_absolute():
            here = "/"
            yield here, os.lstat(here)
            names += reversed(target.parts[1:])
        else:
            names += reversed(target.parts)
            # A link may lead out of the trusted folder.
            for parent in reversed(Path(here).parents):
                yield str(parent), os.lstat(parent)


@functools.cache
def _is_private(group: int) -> bool:
    """Whether a group has no members besides this user and root."""
    import grp
    import pwd

    trusted = {0, os.geteuid()}
    try:
        members = {pwd.getpwnam(name).pw_uid for name in grp.getgrgid(group).gr_mem}
        members |= {user.pw_uid for user in pwd.getpwall() if user.pw_gid == group}
    except KeyError:
        return False
    return members <= trusted
