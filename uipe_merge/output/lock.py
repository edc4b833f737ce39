"""One run per output: a lock that a dead run cannot hold and a live one cannot lose.

Two mechanisms, because each fails somewhere: a file that only one run can create and that
says who holds it (host, boot, process, start time), and ``flock`` on that file. ``flock``
does nothing on some network file systems; the identity tells a dead holder from a live one
on this machine. The file is written and locked under another name and then hard-linked to
its own, which is as exclusive as ``O_EXCL`` and never shows a lock without its holder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from uipe_merge.checkpoint.storage import system_error
from uipe_merge.errors import OutputLockedError, UipeMergeError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ATTEMPTS = 10
_WAIT = 0.2  # seconds between two tries of one that waits


@contextmanager
def hold(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a partial directory (created if missing) while the body runs.

    Args:
        directory: The directory.
        patience: Seconds to wait for another run to give it up.

    Raises:
        OutputLockedError: Another run holds it.
        OutputError: The directory or the file cannot be made.
    """
    path = directory / "lock"
    try:
        descriptor = _wait_for(path, patience)
        try:
            yield
        finally:
            _release(path, descriptor)
    finally:
        with suppress(OSError):
            directory.rmdir()  # succeeds only where nothing is left to resume


def tidy(directory: Path) -> None:
    """Remove a partial directory in which a run died after everything else was removed."""
    with suppress(OSError, UipeMergeError):
        if directory.exists() and nothing_left(directory):
            with hold(directory):
                pass


def nothing_left(directory: Path) -> bool:
    """Tell whether a partial directory is missing, or holds nothing but a lock.

    Raises:
        OutputError: It cannot be looked at.
    """
    try:
        return all(entry.name.startswith("lock") for entry in directory.iterdir())
    except FileNotFoundError:
        return True
    except OSError as error:
        raise system_error(error, directory) from None


def _release(path: Path, descriptor: int) -> None:
    # Unlink before the lock is given up: whoever waits finds the name gone and starts anew.
    with suppress(OSError):
        if os.fstat(descriptor).st_ino == path.stat().st_ino:  # else: removed by hand, and taken
            path.unlink()
    os.close(descriptor)
    # Drafts of runs that were killed. A live run that loses its own makes another.
    with suppress(OSError):  # another run may be tidying up too
        for draft in path.parent.glob("lock.*"):
            draft.unlink()


def _wait_for(path: Path, patience: float) -> int:
    end = time.monotonic() + patience
    while True:
        try:
            return _acquire(path)
        except OutputLockedError:
            if time.monotonic() > end:
                raise
        time.sleep(_WAIT)


def _acquire(path: Path) -> int:
    for _ in range(_ATTEMPTS):
        try:
            with suppress(FileExistsError):  # exist_ok would trip over one that just goes away
                path.parent.mkdir()
            with suppress(FileExistsError):
                return _create(path)
            holder = _read_holder(path)
            if _alive(holder):
                raise _locked(path, holder)
            _clear_stale(path)
        except FileNotFoundError:
            continue  # the directory or the lock went away meanwhile: the other run ended
        except OSError as error:
            raise system_error(error, path) from None
    raise _locked(path, {})


def _create(path: Path) -> int:
    """Create the lock, raising ``FileExistsError`` where it is held."""
    draft = path.with_name(f"lock.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    with suppress(FileNotFoundError):
        draft.unlink()  # left by a dead run that had this very process number
    descriptor = _write(draft)
    try:
        path.hardlink_to(draft)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        return _write(path)  # a file system without hard links
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()
    return descriptor


def _write(path: Path) -> int:
    """Create a file that names this process, locked."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with suppress(OSError):  # a file system without flock: the identity has to do
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        identity = json.dumps(_identity()).encode()
        while identity:
            identity = identity[os.write(descriptor, identity) :]
    except BaseException:
        os.close(descriptor)
        with suppress(OSError):
            path.unlink()
        raise
    return descriptor


def _clear_stale(path: Path) -> None:
    """Remove a dead run's lock, unless its file is locked or was replaced meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(path, _read_holder(path)) from None
        except OSError:  # a file system without flock
            pass
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            path.unlink()
    finally:
        os.close(descriptor)


def _identity() -> dict[str, object]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "boot": _boot(), "pid": pid, "start": _start(pid)}


def _alive(holder: dict[str, object]) -> bool:
    """Tell whether the holder may still run; a holder elsewhere always may."""
    if not holder:  # torn by a power cut
        return False
    if holder.get("host") != socket.gethostname():
        return True
    pid = holder.get("pid")
    if not isinstance(pid, int) or holder.get("boot") != _boot():
        return False
    start = _start(pid)
    return start is not None and start == holder.get("start")


def _read_holder(path: Path) -> dict[str, object]:
    try:
        holder = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start(pid: int) -> str | None:
    """Return when a process started, in ticks since boot; ``None`` where it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # a zombie waits only to be reaped
    except OSError:
        with suppress(ProcessLookupError, PermissionError):
            if not Path("/proc/self").exists():  # no /proc: only whether it runs can be told
                os.kill(pid, 0)
                return ""
        return None


def _locked(path: Path, holder: dict[str, object]) -> OutputLockedError:
    who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another run"
    return OutputLockedError(
        f"{who} is writing this output",
        file=path.parent,
        remedy=f"wait for it; if it is dead, remove {path}",
    )
