"""One run per output: who is let in, who is refused, and what a reader sees meanwhile."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import contents

from uipe_merge.errors import OutputLockedError
from uipe_merge.output.lock import hold

Holder = dict[str, object]


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / ".out.uipe-partial"


def identity(partial: Path) -> Holder:
    """What a lock of this process holds, read from one that is held."""
    with hold(partial):
        holder = json.loads((partial / "lock").read_bytes())
    assert holder.keys() == {"host", "boot", "pid", "start"}
    assert holder["pid"] == os.getpid()
    assert holder["host"] == socket.gethostname()
    return dict(holder)


def leave(partial: Path, content: bytes) -> None:
    """Leave a lock behind that nobody holds any more."""
    partial.mkdir()
    (partial / "lock").write_bytes(content)


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_lock_is_gone_afterwards_and_so_is_the_directory(partial: Path) -> None:
    with hold(partial):
        assert [path.name for path in partial.iterdir()] == ["lock"]
    assert not partial.exists()


def test_what_can_be_resumed_keeps_the_directory_but_not_the_lock(partial: Path) -> None:
    with hold(partial):
        (partial / "journal").write_bytes(b"")
    assert [path.name for path in partial.iterdir()] == ["journal"]


def test_it_is_released_when_the_body_fails(partial: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hold(partial):
        raise KeyboardInterrupt
    assert not partial.exists()


def refuse_second(partial: Path) -> OutputLockedError:
    with hold(partial):
        before = contents(partial)
        with pytest.raises(OutputLockedError) as refusal, hold(partial):
            pass
        assert contents(partial) == before
    assert not partial.exists()
    return refusal.value


def test_a_second_run_is_refused_and_told_who_holds_it(partial: Path) -> None:
    error = refuse_second(partial)
    assert error.exit_code == 9
    assert f"process {os.getpid()} on {socket.gethostname()} is writing this output" in str(error)
    assert f"if it is dead, remove {partial / 'lock'}" in str(error)


def no_flock(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize(
    "flock", [no_flock, lambda *_: None], ids=["flock that fails", "`flock` that does nothing"]
)
def test_hazard_without_flock_the_identity_still_keeps_the_second_out(
    partial: Path, monkeypatch: pytest.MonkeyPatch, flock: Callable[..., None]
) -> None:
    monkeypatch.setattr(fcntl, "flock", flock)
    refuse_second(partial)
    leave(partial, json.dumps({**identity(partial), "pid": dead_process()}).encode())
    with hold(partial):
        assert json.loads((partial / "lock").read_bytes())["pid"] == os.getpid()


@pytest.mark.found("a write that the system cut short left a lock that names nobody")
def test_a_short_write_leaves_no_torn_lock(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    with hold(partial):
        assert json.loads((partial / "lock").read_bytes())["pid"] == os.getpid()


def test_without_hard_links_it_still_excludes(
    partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    assert refuse_second(partial).exit_code == 9


STALE: dict[str, Callable[[Holder], bytes]] = {
    "a dead process": lambda own: json.dumps({**own, "pid": dead_process()}).encode(),
    "a process number given away": lambda own: json.dumps({**own, "start": "1"}).encode(),
    "another boot": lambda own: json.dumps({**own, "boot": "before the power cut"}).encode(),
    "no process number": lambda own: json.dumps({**own, "pid": None}).encode(),
    "torn": lambda own: json.dumps(own).encode()[:20],
    "empty": lambda own: b"",
    "zeros": lambda own: bytes(100),
    "not an object": lambda own: b"[1]",
    "not text": lambda own: b"\xff\xfe",
}


@pytest.mark.parametrize("content", STALE.values(), ids=STALE)
def test_hazard_stale_lock(partial: Path, content: Callable[[Holder], bytes]) -> None:
    leave(partial, content(identity(partial)))
    with hold(partial):
        assert json.loads((partial / "lock").read_bytes())["pid"] == os.getpid()
    assert not partial.exists()


def test_a_lock_of_another_host_is_never_taken(partial: Path) -> None:
    own = identity(partial)
    leave(partial, json.dumps({**own, "host": "elsewhere", "boot": "x", "pid": 1}).encode())
    with pytest.raises(OutputLockedError, match="process 1 on elsewhere is writing"), hold(partial):
        pass
    assert (partial / "lock").exists()


def test_a_lock_whose_file_is_locked_is_never_taken_whatever_it_says(partial: Path) -> None:
    leave(partial, b"torn")
    with (partial / "lock").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputLockedError), hold(partial):
            pass
    with hold(partial):
        pass
    assert not partial.exists()


def test_a_killed_holder_that_nobody_has_reaped_is_dead(partial: Path) -> None:
    script = (
        "import sys, pathlib, time; from uipe_merge.output.lock import hold\n"
        "with hold(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, partial], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(OutputLockedError, match=f"process {process.pid} on "), hold(partial):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
        with hold(partial):
            pass
    assert not partial.exists()


def test_drafts_of_killed_runs_are_removed(partial: Path) -> None:
    leave(partial, b"")
    (partial / "lock.elsewhere.1.2").write_bytes(b"{")
    (partial / f"lock.{socket.gethostname()}.1.2").write_bytes(b"")
    with hold(partial):
        pass
    assert not partial.exists()


def test_a_lock_that_was_removed_by_hand_and_taken_is_left_to_its_holder(partial: Path) -> None:
    with ExitStack() as first:
        first.enter_context(hold(partial))
        (partial / "lock").unlink()
        with hold(partial):
            theirs = (partial / "lock").stat().st_ino
            first.close()
            assert (partial / "lock").stat().st_ino == theirs
    assert not partial.exists()


def test_of_many_that_want_a_stale_lock_one_at_a_time_gets_it(partial: Path) -> None:
    own = identity(partial)
    leave(partial, json.dumps({**own, "pid": dead_process()}).encode())
    inside: list[int] = []
    got = 0

    def try_often() -> None:
        nonlocal got
        for _ in range(60):
            try:
                with hold(partial):
                    inside.append(1)
                    assert inside == [1]
                    got += 1
                    inside.pop()
            except OutputLockedError:
                continue

    failures: list[BaseException] = []

    def body() -> None:
        try:
            try_often()
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=body) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert got > 0
    assert not partial.exists()
