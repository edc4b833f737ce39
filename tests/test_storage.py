"""Reading: one contract for every kind of folder, and what is particular to directories."""

import os
from abc import ABC, abstractmethod
from pathlib import Path

import pytest
from fakes import MemoryFolder

from uipe_merge.checkpoint.storage import (
    Folder,
    InputFile,
    LocalFolder,
    Stamp,
    read_document,
)
from uipe_merge.errors import CorruptInputError, UsageError

FILES = {
    "b.safetensors": bytes(range(256)) * 9,
    "a.json": b"{}",
    "empty": b"",
    "sub/c.txt": b"c",
    "sub/deeper/d.txt": b"d",
    "ünï code [1].txt": b"u",
}


def read(file: InputFile, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    file.read_into(memoryview(buffer), offset)
    return bytes(buffer)


def stamp(folder: Folder, name: str) -> Stamp:
    file = folder.open_file(name)
    file.close()
    return file.stamp


class FolderContract(ABC):
    """What ``Folder`` and ``InputFile`` promise; subclassed for each implementation."""

    @abstractmethod
    def make(self, root: Path, files: dict[str, bytes]) -> Folder:
        """Return a folder with these files."""

    def test_names_are_relative_complete_and_sorted(self, tmp_path: Path) -> None:
        assert self.make(tmp_path, FILES).names() == sorted(FILES)

    def test_an_empty_folder_has_no_names(self, tmp_path: Path) -> None:
        assert self.make(tmp_path, {}).names() == []

    def test_every_name_can_be_opened_and_has_its_bytes(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, FILES)
        for name in folder.names():
            file = folder.open_file(name)
            assert file.stamp.size == len(FILES[name])
            assert read(file, 0, file.stamp.size) == FILES[name]
            file.close()

    def test_reads_start_anywhere_in_any_order(self, tmp_path: Path) -> None:
        content = FILES["b.safetensors"]
        file = self.make(tmp_path, FILES).open_file("b.safetensors")
        for offset, length in [(2000, 100), (0, 1), (1, 2303), (2303, 1), (700, 700), (0, 2304)]:
            assert read(file, offset, length) == content[offset : offset + length]
        file.close()

    def test_reading_nothing_is_allowed_even_at_the_end(self, tmp_path: Path) -> None:
        file = self.make(tmp_path, FILES).open_file("b.safetensors")
        for offset in (0, 5, 2304):
            assert read(file, offset, 0) == b""
        file.close()

    @pytest.mark.parametrize(("offset", "length"), [(2304, 1), (2300, 5), (0, 2305), (10**12, 1)])
    def test_a_read_beyond_the_end_names_the_file(
        self, tmp_path: Path, offset: int, length: int
    ) -> None:
        folder = self.make(tmp_path, FILES)
        file = folder.open_file("b.safetensors")
        with pytest.raises(CorruptInputError, match="ends") as caught:
            read(file, offset, length)
        assert caught.value.file == file.path
        file.close()

    @pytest.mark.parametrize("name", ["b.safetensors", "sub/c.txt"])
    def test_messages_name_a_file_by_its_folder_and_name(self, tmp_path: Path, name: str) -> None:
        folder = self.make(tmp_path, FILES)
        file = folder.open_file(name)
        assert file.path == f"{folder.location}/{name}"
        file.close()

    @pytest.mark.parametrize("name", ["missing", "sub/missing", "missing/c.txt", "a.json/x"])
    def test_a_missing_file_is_corrupt_input(self, tmp_path: Path, name: str) -> None:
        folder = self.make(tmp_path, FILES)
        with pytest.raises(CorruptInputError, match="no such file") as caught:
            folder.open_file(name)
        assert caught.value.file == f"{folder.location}/{name}"
        assert caught.value.remedy

    @pytest.mark.parametrize("name", ["sub", "sub/deeper"])
    def test_a_directory_is_not_a_file(self, tmp_path: Path, name: str) -> None:
        folder = self.make(tmp_path, FILES)
        with pytest.raises(CorruptInputError, match="is a directory, not a regular file"):
            folder.open_file(name)

    def test_the_stamp_stays_until_the_content_changes(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, FILES)
        before = stamp(folder, "a.json")
        assert stamp(folder, "a.json") == before
        changed = stamp(self.make(tmp_path, {**FILES, "a.json": b'{"x": 1}'}), "a.json")
        assert changed != before
        assert changed.size == 8

    def test_open_files_do_not_disturb_one_another(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, FILES)
        first, second = folder.open_file("b.safetensors"), folder.open_file("b.safetensors")
        assert read(first, 3, 4) == read(second, 3, 4)
        first.close()
        assert read(second, 3, 4) == bytes([3, 4, 5, 6])
        second.close()

    def test_a_document_is_read_whole_up_to_a_limit(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, FILES)
        assert read_document(folder, "b.safetensors", 2304) == FILES["b.safetensors"]
        assert read_document(folder, "empty", 0) == b""
        with pytest.raises(CorruptInputError, match="2304 bytes, more than the 2303"):
            read_document(folder, "b.safetensors", 2303)


class TestMemoryFolder(FolderContract):
    def make(self, root: Path, files: dict[str, bytes]) -> Folder:
        return MemoryFolder(files)


class TestLocalFolder(FolderContract):
    def make(self, root: Path, files: dict[str, bytes]) -> LocalFolder:
        for name, content in files.items():
            target = root / "model" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        (root / "model").mkdir(exist_ok=True)
        return LocalFolder(root / "model")

    def test_a_missing_root_is_wrong_usage(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no such directory.*ORG/NAME"):
            LocalFolder(tmp_path / "none")

    @pytest.mark.parametrize("tail", ["", "/", "/x"])
    def test_a_root_that_is_a_file_is_wrong_usage(self, tmp_path: Path, tail: str) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(UsageError, match=r"is a file|no such directory"):
            LocalFolder(f"{tmp_path}/file{tail}")

    def test_the_location_is_what_the_user_wrote(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.make(tmp_path, FILES)
        monkeypatch.chdir(tmp_path)
        folder = LocalFolder("./model")
        assert folder.location == "./model"
        assert folder.open_file("a.json").path == "./model/a.json"
        assert folder.root == tmp_path / "model"

    def test_a_root_may_be_a_link(self, tmp_path: Path) -> None:
        self.make(tmp_path, FILES)
        (tmp_path / "link").symlink_to("model")
        folder = LocalFolder(tmp_path / "link")
        assert folder.names() == sorted(FILES)
        assert read_document(folder, "a.json", 99) == b"{}"

    def test_hidden_trees_are_left_out_and_hidden_files_are_not(self, tmp_path: Path) -> None:
        hidden = {".git/config": b"", ".cache/x": b"", "sub/.git/y": b""}
        folder = self.make(tmp_path, {"a": b"", ".gitattributes": b"", **hidden})
        assert folder.names() == [".gitattributes", "a"]

    def test_a_hostile_depth_is_bounded(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, {f"{'d/' * depth}f": b"" for depth in (0, 8, 9, 200)})
        assert folder.names() == ["d/" * 8 + "f", "f"]

    def test_a_directory_that_links_to_its_parent_is_not_followed(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, {"a": b""})
        (folder.root / "loop").symlink_to(".")
        assert folder.names() == ["a"]

    def test_a_name_that_is_not_utf8(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, {})
        (folder.root / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
        (name,) = folder.names()
        assert os.fsencode(name) == b"caf\xe9.txt"
        assert read_document(folder, name, 99) == b"x"
        with pytest.raises(CorruptInputError, match="no such file") as caught:
            folder.open_file(name.replace("txt", "bin"))
        assert str(caught.value).encode("ascii")  # printable on any terminal

    def test_a_name_longer_than_any_file_has(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptInputError, match="too long"):
            self.make(tmp_path, FILES).open_file("x" * 300)
