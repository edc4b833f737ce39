"""Directories: links that leave them, files that never end, and what the system refuses."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import bind_by_permissions, require_binding_permissions

from uipe_merge.checkpoint.storage import LocalFile, LocalFolder, read_document, system_error
from uipe_merge.errors import CorruptInputError, OutputError, UnsafeInputError


class TestLinks:
    def folder(self, tmp_path: Path) -> LocalFolder:
        root = tmp_path / "model"
        (root / "sub").mkdir(parents=True)
        (root / "real").write_bytes(b"real")
        (tmp_path / "secret").write_bytes(b"secret")
        return LocalFolder(root)

    @pytest.mark.parametrize("target", ["real", "./real", "sub/../real", "chained"])
    def test_inside_its_folder(self, tmp_path: Path, target: str) -> None:
        folder = self.folder(tmp_path)
        (folder.root / "chained").symlink_to("real")
        (folder.root / "link").symlink_to(target)
        assert read_document(folder, "link", 99) == b"real"

    def test_inside_its_folder_by_an_absolute_path(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (folder.root / "link").symlink_to(folder.root / "real")
        assert read_document(folder, "link", 99) == b"real"

    @pytest.mark.parametrize(
        "target", ["../secret", "sub/../../secret", "sub/up/secret", "chained", "/dev/zero"]
    )
    def test_outside_its_folder(self, tmp_path: Path, target: str) -> None:
        folder = self.folder(tmp_path)
        (folder.root / "sub" / "up").symlink_to("../..")
        (folder.root / "chained").symlink_to("../secret")
        (folder.root / "link").symlink_to(target)
        with pytest.raises(UnsafeInputError, match=r"is a link to .*outside") as caught:
            folder.open_file("link")
        assert caught.value.file == f"{folder.root}/link"

    def test_a_sibling_whose_name_begins_alike_is_outside(self, tmp_path: Path) -> None:
        folder = self.folder(tmp_path)
        (tmp_path / "model-2").write_bytes(b"other")
        (folder.root / "link").symlink_to("../model-2")
        with pytest.raises(UnsafeInputError, match="outside"):
            folder.open_file("link")

    @pytest.mark.parametrize(("target", "message"), [("gone", "no such file"), ("link", "itself")])
    def test_to_nothing(self, tmp_path: Path, target: str, message: str) -> None:
        folder = self.folder(tmp_path)
        (folder.root / "link").symlink_to(target)
        with pytest.raises(CorruptInputError, match=message):
            folder.open_file("link")

    @pytest.mark.parametrize("name", ["link", "sub/link"])
    def test_of_the_hub_cache_reach_its_blobs(self, tmp_path: Path, name: str) -> None:
        folder = self.hub_cache(tmp_path)
        link = folder.root / name
        link.symlink_to(os.path.relpath(tmp_path / "models--o--n/blobs/0123", link.parent))
        assert read_document(folder, name, 99) == b"blob"

    @pytest.mark.parametrize("target", ["models--o--m/blobs/4567", "models--o--n/refs/main"])
    def test_of_the_hub_cache_reach_nothing_else(self, tmp_path: Path, target: str) -> None:
        folder = self.hub_cache(tmp_path)
        (folder.root / "link").symlink_to(tmp_path / target)
        with pytest.raises(UnsafeInputError, match="outside"):
            folder.open_file("link")

    def test_blobs_beside_anything_but_snapshots_are_outside(self, tmp_path: Path) -> None:
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "0123").write_bytes(b"blob")
        (tmp_path / "models" / "abc").mkdir(parents=True)
        (tmp_path / "models" / "abc" / "link").symlink_to("../../blobs/0123")
        with pytest.raises(UnsafeInputError, match="outside"):
            LocalFolder(tmp_path / "models" / "abc").open_file("link")

    def hub_cache(self, tmp_path: Path) -> LocalFolder:
        for name in ("n/snapshots/abc/sub", "n/blobs", "n/refs", "m/blobs"):
            (tmp_path / f"models--o--{name}").mkdir(parents=True)
        (tmp_path / "models--o--n/blobs/0123").write_bytes(b"blob")
        (tmp_path / "models--o--n/refs/main").write_bytes(b"abc")
        (tmp_path / "models--o--m/blobs/4567").write_bytes(b"other")
        return LocalFolder(tmp_path / "models--o--n/snapshots/abc")


@pytest.mark.timeout(20)
class TestSpecialFiles:
    """Opening a FIFO waits for its other end; none is opened."""

    def test_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        folder = LocalFolder(tmp_path)
        assert folder.names() == ["pipe"]
        with pytest.raises(CorruptInputError, match="is a FIFO, not a regular file"):
            folder.open_file("pipe")

    def test_socket(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)  # the path of a socket may have 108 bytes at most
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("socket")
            with pytest.raises(CorruptInputError, match="is a socket, not a regular file"):
                LocalFolder(tmp_path).open_file("socket")

    def test_device(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptInputError, match="is a device, not a regular file"):
            LocalFolder("/dev").open_file("zero")


class TestSystemErrors:
    def test_a_file_cut_short_while_it_is_open(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_bytes(b"x" * 100)
        file = LocalFolder(tmp_path).open_file("f")
        os.truncate(tmp_path / "f", 40)
        with pytest.raises(CorruptInputError, match="ends at byte 40, 60 bytes short"):
            file.read_into(memoryview(bytearray(100)), 0)
        file.close()

    def test_a_read_error_is_named(self) -> None:
        file = LocalFile(Path("/proc/self/mem"), "shown")  # nothing is mapped at address 0
        with pytest.raises(OutputError, match="shown: input/output error; check the disk"):
            file.read_into(memoryview(bytearray(16)), 0)
        file.close()

    @pytest.mark.parametrize("locked", ["f", "."])
    def test_permission_denied_is_not_called_missing(self, tmp_path: Path, locked: str) -> None:
        require_binding_permissions(tmp_path)
        (tmp_path / "f").write_bytes(b"x")
        os.chmod(tmp_path / locked, 0)
        script = (
            "import sys; from uipe_merge.checkpoint.storage import LocalFolder\n"
            "folder = LocalFolder(sys.argv[1])\n"
            "for act in (folder.names, lambda: folder.open_file('f')):\n"
            "  try: act()\n"
            "  except Exception as error: print(type(error).__name__, error, sep=': ')\n"
        )
        finished = subprocess.run(
            [sys.executable, "-c", script, tmp_path],
            capture_output=True,
            text=True,
            check=True,
            preexec_fn=bind_by_permissions,
        )
        os.chmod(tmp_path / locked, 0o700)
        where = [tmp_path / "f"] if locked == "f" else [tmp_path, tmp_path / "f"]
        assert finished.stdout.splitlines() == [
            f"OutputError: {path}: permission denied; give yourself permission to it"
            for path in where
        ]

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (errno.EACCES, "permission denied; give yourself permission"),
            (errno.EROFS, "read-only file system; choose a file system"),
            (errno.ENOSPC, "no space left on device; free some disk space"),
            (errno.EDQUOT, "disk quota exceeded; free some of your quota"),
            (errno.EMFILE, "too many open files; raise the limit"),
            (errno.EFBIG, "file too large; raise the limit of file sizes"),
            (errno.EIO, "input/output error; check the disk"),
            (errno.ESTALE, "stale file handle"),
        ],
    )
    def test_errors_of_the_system_name_the_path_and_a_remedy(
        self, number: int, message: str
    ) -> None:
        error = system_error(OSError(number, os.strerror(number)), "some/path")
        assert error.exit_code == 8
        assert str(error).startswith(f"some/path: {message}")
