"""What every implementation of the writing seam owes to the staging, and what only ours does."""

import errno
import fcntl
import itertools
import os
import random
import resource
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes_output import FailingFileSystem

from uipe_merge.aligned import allocate, placed
from uipe_merge.errors import OutputError
from uipe_merge.output import linux
from uipe_merge.output.filesystem import FileSystem, LocalFileSystem, write_document


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def tree(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


class FileSystemContract(ABC):
    """Subclassed by each implementation."""

    @pytest.fixture
    @abstractmethod
    def filesystem(self, tmp_path: Path) -> FileSystem: ...

    def test_writes_land_at_their_offsets_in_any_order(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        file = filesystem.create(tmp_path / "f")
        file.write_at(memoryview(b"world"), 6)
        file.write_at(b"hello ", 0)
        assert file.size() == 11
        file.sync()
        file.close()
        assert (tmp_path / "f").read_bytes() == b"hello world"

    def test_the_size_counts_a_hole_that_was_not_written(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        file = filesystem.create(tmp_path / "f")
        file.write_at(b"x", 99)
        assert file.size() == 100
        file.close()

    def test_writing_nothing_is_fine(self, filesystem: FileSystem, tmp_path: Path) -> None:
        write_document(filesystem, tmp_path / "f", b"")
        assert (tmp_path / "f").read_bytes() == b""

    def test_create_empties_what_was_there(self, filesystem: FileSystem, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"longer than the new content")
        write_document(filesystem, tmp_path / "f", b"new")
        assert (tmp_path / "f").read_bytes() == b"new"

    def test_create_does_not_follow_a_link(self, filesystem: FileSystem, tmp_path: Path) -> None:
        (tmp_path / "precious").write_bytes(b"keep")
        (tmp_path / "f").symlink_to(tmp_path / "precious")
        with pytest.raises(OutputError):
            filesystem.create(tmp_path / "f")
        with pytest.raises(OutputError):
            filesystem.append(tmp_path / "f", b"line\n")
        assert (tmp_path / "precious").read_bytes() == b"keep"

    def test_append_creates_and_adds(self, filesystem: FileSystem, tmp_path: Path) -> None:
        filesystem.append(tmp_path / "f", b"one\n")
        filesystem.append(tmp_path / "f", b"two\n")
        assert (tmp_path / "f").read_bytes() == b"one\ntwo\n"

    @pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
    def test_modes_follow_the_umask(
        self, filesystem: FileSystem, tmp_path: Path, mask: int
    ) -> None:
        with umask(mask):
            filesystem.create(tmp_path / "created").close()
            filesystem.append(tmp_path / "appended", b"")
            filesystem.make_directory(tmp_path / "directory")
        assert mode(tmp_path / "created") == mode(tmp_path / "appended") == 0o666 & ~mask
        assert mode(tmp_path / "directory") == 0o777 & ~mask

    def test_an_existing_directory_is_fine_and_keeps_what_it_holds(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        tree(tmp_path / "d", f=b"kept")
        filesystem.make_directory(tmp_path / "d")
        assert (tmp_path / "d" / "f").read_bytes() == b"kept"

    def test_a_file_in_a_directorys_place_is_an_error(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        (tmp_path / "d").write_bytes(b"")
        with pytest.raises(OutputError):
            filesystem.make_directory(tmp_path / "d")

    def test_rename_replaces_a_file(self, filesystem: FileSystem, tmp_path: Path) -> None:
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "old").write_bytes(b"old")
        filesystem.rename(tmp_path / "new", tmp_path / "old")
        assert [path.name for path in tmp_path.iterdir()] == ["old"]
        assert (tmp_path / "old").read_bytes() == b"new"

    @pytest.mark.parametrize("there", [False, True], ids=["nothing", "empty directory"])
    def test_rename_moves_a_directory_onto(
        self, filesystem: FileSystem, tmp_path: Path, there: bool
    ) -> None:
        tree(tmp_path / "new", f=b"new")
        if there:
            (tmp_path / "out").mkdir()
        filesystem.rename(tmp_path / "new", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out" / "f").read_bytes() == b"new"

    def test_rename_refuses_a_directory_that_holds_something(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        tree(tmp_path / "new", f=b"new")
        tree(tmp_path / "out", g=b"work")
        with pytest.raises(OutputError, match=r"out: directory not empty"):
            filesystem.rename(tmp_path / "new", tmp_path / "out")
        assert (tmp_path / "new" / "f").read_bytes() == b"new"
        assert (tmp_path / "out" / "g").read_bytes() == b"work"

    def test_exchange_swaps(self, filesystem: FileSystem, tmp_path: Path) -> None:
        tree(tmp_path / "new", f=b"new")
        tree(tmp_path / "out", g=b"old")
        filesystem.exchange(tmp_path / "new", tmp_path / "out")
        assert (tmp_path / "out" / "f").read_bytes() == b"new"
        assert (tmp_path / "new" / "g").read_bytes() == b"old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]

    def test_a_directory_can_be_synced_and_a_missing_one_not(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        filesystem.sync_directory(tmp_path)
        with pytest.raises(OutputError, match="missing: no such file or directory"):
            filesystem.sync_directory(tmp_path / "missing")

    def test_what_is_removed_is_gone_and_what_is_missing_is_fine(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        (tmp_path / "f").write_bytes(b"")
        tree(tmp_path / "d", f=b"")
        (tmp_path / "d" / "e").mkdir()
        for _ in range(2):
            filesystem.remove(tmp_path / "f")
            filesystem.remove_tree(tmp_path / "d")
        assert not list(tmp_path.iterdir())

    def test_an_error_names_the_path(self, filesystem: FileSystem, tmp_path: Path) -> None:
        path = tmp_path / "missing" / "f"
        for attempt in (
            lambda: filesystem.create(path),
            lambda: filesystem.append(path, b""),
            lambda: filesystem.make_directory(path),
            lambda: filesystem.rename(tmp_path / "nowhere", path),
        ):
            with pytest.raises(OutputError, match="no such file or directory") as caught:
                attempt()
            assert caught.value.file == str(path)
            assert caught.value.exit_code == 8


class TestLocalFileSystem(FileSystemContract):
    @pytest.fixture
    def filesystem(self, tmp_path: Path) -> FileSystem:
        return LocalFileSystem()

    def test_exchange_without_the_system_call_swaps_by_three_renames(
        self, filesystem: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(linux, "exchange", lambda one, two: False)
        self.test_exchange_swaps(filesystem, tmp_path)

    def test_what_is_to_be_durable_is_synced(
        self, filesystem: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No power fails in this test, so it looks for the system call itself."""
        synced: list[str] = []
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
            sync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        file = filesystem.create(tmp_path / "shard")
        file.write_at(b"x", 0)
        assert synced == []
        file.sync()
        file.close()
        filesystem.append(tmp_path / "journal", b"line")
        filesystem.sync_directory(tmp_path)
        write_document(filesystem, tmp_path / "config", b"{}")
        assert synced == ["shard", "journal", tmp_path.name, "config"]

    @pytest.mark.found("of three renames the last could be on the disk without the second")
    def test_exchange_by_renames_syncs_each_before_the_next(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []

        class Logged(LocalFileSystem):
            def rename(self, source: Path, target: Path) -> None:
                calls.append(f"{source.name} → {target.name}")
                super().rename(source, target)

            def sync_directory(self, path: Path) -> None:
                calls.append(path.name)
                super().sync_directory(path)

        monkeypatch.setattr(linux, "exchange", lambda one, two: False)
        tree(tmp_path / "partial")
        tree(tmp_path / "partial" / "model", f=b"new")
        tree(tmp_path / "out", g=b"old")
        Logged().exchange(tmp_path / "partial" / "model", tmp_path / "out")
        top = tmp_path.name
        renames = ["out → model.old", top, "partial", "model → out", top, "model.old → model"]
        assert calls == renames

    def test_a_write_that_the_system_cuts_short_is_gone_on_with(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        # At the limit the system first writes less than asked, and only then refuses.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        file = filesystem.create(tmp_path / "f")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(OutputError, match=r"file too large; .*ulimit -f"):
                file.write_at(bytes(150), 0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert file.size() == 100
        file.close()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_is_named_with_its_remedy(self, filesystem: FileSystem) -> None:
        file = filesystem.create(Path("/dev/full"))
        with pytest.raises(OutputError, match=r"/dev/full: no space left on device; free some"):
            file.write_at(b"x", 0)
        file.close()

    def test_a_write_over_the_stretch_that_starts_the_disk_is_whole(
        self, filesystem: FileSystem, tmp_path: Path
    ) -> None:
        data = os.urandom(2**20) * 34
        file = filesystem.create(tmp_path / "f")
        file.write_at(data, 0)
        file.close()
        assert (tmp_path / "f").read_bytes() == data

    @pytest.mark.parametrize("start", [0, 8, 4088, 4096, 8192, 123_456])
    def test_whole_pages_go_past_the_cache_and_land_in_their_place(
        self, tmp_path: Path, start: int, direct: list[int]
    ) -> None:
        write_in_pieces(LocalFileSystem(), tmp_path / "f", start)
        if not direct[0]:
            pytest.skip("this file system does not write past the cache")
        assert direct[0] > 2**19

    @pytest.mark.parametrize("start", [1, 4095, 123_457])
    def test_what_lies_at_odd_addresses_lands_in_its_place_too(
        self, tmp_path: Path, start: int
    ) -> None:
        write_in_pieces(LocalFileSystem(), tmp_path / "f", start)

    @pytest.mark.parametrize("call", ["open", "pwrite"])
    def test_where_the_cache_cannot_be_passed_everything_goes_through_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        real = getattr(os, call)

        def refusing(first: Any, *rest: Any) -> Any:
            flags = rest[0] if call == "open" else fcntl.fcntl(first, fcntl.F_GETFL)
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no direct input and output here")
            return real(first, *rest)

        monkeypatch.setattr(os, call, refusing)
        write_in_pieces(LocalFileSystem(), tmp_path / "f", 123_456)

    def test_what_the_system_writes_only_in_part_is_gone_on_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:70_000], at))
        write_in_pieces(LocalFileSystem(), tmp_path / "f", 4088)

    def test_a_disk_that_fails_past_the_cache_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.pwrite

        def failing(descriptor: int, data: memoryview, offset: int) -> int:
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", failing)
        file = LocalFileSystem().create(tmp_path / "f")
        buffer = allocate(2**20)
        with pytest.raises(OutputError, match=r"f: input/output error"):
            file.write_at(placed(buffer, 2**20, 0), 0)
        file.close()


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes written past the cache, in a list of one."""
    real, found = os.pwrite, [0]

    def counting(descriptor: int, data: memoryview, offset: int) -> int:
        written = real(descriptor, data, offset)
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            found[0] += written
        return written

    monkeypatch.setattr(os, "pwrite", counting)
    return found


def write_in_pieces(filesystem: FileSystem, path: Path, start: int) -> None:
    """Write a file as a shard is written: a header, then blocks from threads, in any order."""
    rng = random.Random(start)
    blocks = [rng.randbytes(rng.choice([8, 5000, 400_000, 600_008])) for _ in range(9)]
    offsets = list(itertools.accumulate(map(len, blocks), initial=start))
    file = filesystem.create(path)
    file.write_at(b"h" * start, 0)

    def write(index: int) -> None:
        piece = placed(allocate(len(blocks[index])), len(blocks[index]), offsets[index])
        piece[:] = blocks[index]
        file.write_at(piece, offsets[index])

    order = list(range(len(blocks)))
    rng.shuffle(order)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, order))
    assert file.size() == offsets[-1]
    file.sync()
    file.close()
    assert path.read_bytes() == b"h" * start + b"".join(blocks)


class TestFailingFileSystem(FileSystemContract):
    @pytest.fixture
    def filesystem(self, tmp_path: Path) -> FileSystem:
        return FailingFileSystem(tmp_path)

    def test_it_logs_every_call_in_order(self, tmp_path: Path) -> None:
        fake = FailingFileSystem(tmp_path)
        write_document(fake, tmp_path / "f", b"x")
        fake.rename(tmp_path / "f", tmp_path / "g")
        assert list(map(str, fake.calls)) == [
            "create f",
            "write f",
            "sync f",
            "close f",
            "rename f g",
        ]

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
    def test_it_fails_the_call_it_is_told_to_and_no_other(self, tmp_path: Path, code: int) -> None:
        fake = FailingFileSystem(tmp_path, 2, code=code)
        fake.make_directory(tmp_path / "one")
        with pytest.raises(OutputError, match=os.strerror(code).lower()) as caught:
            fake.make_directory(tmp_path / "two")
        assert caught.value.remedy
        fake.make_directory(tmp_path / "three")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three"]

    def test_it_can_fail_though_the_call_was_done(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError):
            FailingFileSystem(tmp_path, 1, manner="after").make_directory(tmp_path / "d")
        assert (tmp_path / "d").is_dir()

    def test_it_can_fail_from_a_call_onwards(self, tmp_path: Path) -> None:
        fake = FailingFileSystem(tmp_path, 2, manner="onwards")
        fake.make_directory(tmp_path / "one")
        for name in ("two", "three"):
            with pytest.raises(OutputError):
                fake.make_directory(tmp_path / name)
        assert [path.name for path in tmp_path.iterdir()] == ["one"]
