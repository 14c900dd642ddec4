"""Files that are there whole or not at all: every file that this project writes is written by this."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_ENDING = ".tmp"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text in UTF-8, with its line ends as they are; see :func:`replacing`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_text(f"{folder}/notes.txt", "κ = 2\\n")
        ...     print(Path(folder, "notes.txt").read_text(encoding="utf-8"), os.listdir(folder))
        κ = 2
         ['notes.txt']
    """
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes; see :func:`replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file beside ``path``, which takes its place when the block has ended without an error.

    A reader sees the old file or the new one, never a half-written one, whatever ends this process. What an earlier
    write to ``path`` left behind because its process was killed is deleted.

    Args:
        path: the file; its folder must exist. Of a symbolic link, what it points to is replaced.

    Yields:
        Where to write, in the same folder; the name ends in ``.tmp``, whatever the ending of ``path``.

    Raises:
        OSError: if ``path`` is a folder, its folder is not there, or the file cannot be made; the error names ``path``.
    """
    target = Path(os.path.realpath(path))
    with _naming(path):
        is_folder = target.is_dir()
    if is_folder:
        raise IsADirectoryError(f"{path} is a folder: name a file")
    if not target.parent.is_dir():
        folder = target.parent if os.path.islink(path) else Path(path).parent
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {folder}; create it, or name another")
    with _naming(path):
        handle, temporary = _temporary_beside(target)
    try:
        try:
            _clean_up(target, but=temporary)
            yield temporary
            # By its name: the writer may have put another file there.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        finally:
            # Also gives the lock back, and an open file could not be renamed on Windows.
            os.close(handle)
        with _naming(path):
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system says of a temporary file, said of the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _temporary_beside(target: Path) -> tuple[int, Path]:
    """A new file in the target's own folder, since a rename is atomic only within one file system; it is locked."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_ENDING, dir=target.parent)
        if _lock(handle, wait=True) and os.fstat(handle).st_nlink == 0:
            os.close(handle)  # another process took it for a leftover before it was locked
            continue
        return handle, Path(name)


def _clean_up(target: Path, but: Path) -> None:
    """Delete the temporary files of earlier writes whose process has ended: nobody holds their locks."""
    for name in glob.glob(f"{glob.escape(str(target.parent / f'.{target.name}.'))}????????{_ENDING}"):
        if name == str(but):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            handle = os.open(name, os.O_RDWR)
            try:
                if _lock(handle, wait=False):
                    os.unlink(name)
            finally:
                os.close(handle)


def locked_elsewhere(handle: int) -> bool:
    """Take a file's lock for this process, and say whether another one has it; where there are no locks, nobody has.

    The lock goes with the open file, whatever ends this process.

    Args:
        handle: of an open file.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # this file system has no locks
        return False
    return False


def _lock(handle: int, *, wait: bool) -> bool:
    """Whether an open file could be locked for this process; Windows and some file systems have no such locks."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
