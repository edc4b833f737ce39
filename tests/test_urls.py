"""Checkpoints by URL, as far as that needs no server: names, refusals, and a store in memory."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cli_tools import refuse
from helpers import contents, run_here, write_pair
from test_storage import FILES, FolderContract

from uipe_merge.checkpoint.urls import RemoteFolder, is_url, local
from uipe_merge.errors import RemoteError, UnsafeInputError


@pytest.fixture
def store() -> Iterator[Any]:
    """The store in memory, emptied afterwards: it is one for the whole process."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def put_tree(store: Any, directory: Path, prefix: str) -> str:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            store.pipe_file(f"/{prefix}/{path.relative_to(directory)}", path.read_bytes())
    return f"memory://{prefix}"


def stored(store: Any, prefix: str) -> dict[str, bytes]:
    return {
        path.removeprefix(f"/{prefix}/"): store.cat_file(path) for path in store.find(f"/{prefix}")
    }


@pytest.mark.usefixtures("store")
class TestRemoteFolder(FolderContract):
    def make(self, root: Path, files: dict[str, bytes]) -> RemoteFolder:
        system = fsspec.filesystem("memory")
        for name, content in files.items():
            system.pipe_file(f"/model/{name}", content)
        return RemoteFolder("memory://model/")

    def test_hidden_trees_and_markers_of_directories_are_left_out(self, tmp_path: Path) -> None:
        hidden = {".git/config": b"", "sub/.cache/x": b"", ".gitattributes": b""}
        assert self.make(tmp_path, {"a": b"", **hidden}).names() == [".gitattributes", "a"]

    def test_what_begins_alike_is_another_folder(self, tmp_path: Path) -> None:
        fsspec.filesystem("memory").pipe_file("/model-2/x", b"")
        assert self.make(tmp_path, {"a": b""}).names() == ["a"]

    def test_what_is_uploaded_is_read_back_and_removed(self, tmp_path: Path) -> None:
        folder = self.make(tmp_path, FILES)
        (tmp_path / "file").write_bytes(b"x" * 20_000_000)
        folder.upload("new/file", tmp_path / "file")
        found = folder.hash("new/file")
        assert found is not None
        assert found[0] == 20_000_000
        folder.remove(["new/file", "never there"])
        assert folder.hash("new/file") is None


def test_a_name_that_leaves_the_folder_is_refused(store: Any) -> None:
    store.store["/model/../evil"] = store.open("/x", "wb")
    with pytest.raises(UnsafeInputError, match="evil"):
        RemoteFolder("memory://model").names()


@pytest.mark.parametrize(
    ("location", "url", "path"),
    [
        ("s3://bucket/model", True, "s3://bucket/model"),
        ("memory://a", True, "memory://a"),
        ("file:///srv/model", False, "/srv/model"),
        ("FILE:///srv/model", False, "/srv/model"),
        ("/srv/s3://x", False, "/srv/s3://x"),
        ("org/name", False, "org/name"),
        ("C:/model", False, "C:/model"),
    ],
)
def test_what_is_a_url(location: str, url: bool, path: str) -> None:
    assert is_url(location) == url
    assert local(location) == path


@pytest.mark.parametrize(
    "url",
    [
        "s3://user:hunter2@host/model",
        "https://host/model?X-Amz-Signature=hunter2",
        "https://host/model#hunter2",
        "https://host?token=hunter2",
    ],
)
@pytest.mark.parametrize("place", ["original", "unlearned", "output"])
def test_hazard_credentials_in_a_url_are_refused_and_not_shown(
    tmp_path: Path, url: str, place: str
) -> None:
    write_pair(tmp_path)
    named = {"original": "original", "unlearned": "unlearned", "output": "out"} | {place: url}
    arguments = (named["original"], named["unlearned"], "--alpha", 1, "-o", named["output"])
    result = refuse(tmp_path, 2, "holds credentials", "environment", arguments=arguments)
    assert "hunter2" not in result.err


def test_hazard_an_unknown_scheme(tmp_path: Path) -> None:
    write_pair(tmp_path)
    arguments = ("gopher://old/model", "unlearned", "--alpha", 1, "-o", "out")
    refuse(tmp_path, 2, "gopher://", "not known", arguments=arguments)


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_hazard_a_backend_that_is_not_installed(tmp_path: Path) -> None:
    write_pair(tmp_path)
    arguments = ("gs://bucket/model", "unlearned", "--alpha", 1, "-o", "out")
    refuse(tmp_path, 2, "gs://bucket/model", "pip install 'uipe-merge[gcs]'", arguments=arguments)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    original, unlearned = write_pair(tmp_path)
    words = ("--alpha", 1, "-q", "-o")
    first = run_here(original, unlearned, *words, tmp_path / "a", cwd=tmp_path)
    urls = (f"file://{original}", f"file://{unlearned}", *words, f"file://{tmp_path / 'b'}")
    second = run_here(*urls, cwd=tmp_path)
    assert (first.code, second.code) == (0, 0), second
    weights = "model.safetensors"
    assert contents(tmp_path / "a")[weights] == contents(tmp_path / "b")[weights]
    assert run_here("verify", f"file://{tmp_path / 'b'}", cwd=tmp_path).code == 0


class TestInMemory:
    """The whole way through a store that is no file system and knows no ETag."""

    @pytest.fixture(autouse=True)
    def _cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def test_the_same_bytes_as_locally(self, tmp_path: Path, store: Any) -> None:
        original, unlearned = write_pair(tmp_path, shards=3)
        urls = put_tree(store, original, "o"), put_tree(store, unlearned, "u")
        done = run_here(*urls, "--alpha", 1, "-o", "memory://out", "-q", cwd=tmp_path)
        assert done.code == 0, done
        here = run_here(original, unlearned, "--alpha", 1, "-o", "out", "-q", cwd=tmp_path)
        assert here.code == 0, here
        expected, found = contents(tmp_path / "out"), stored(store, "out")
        assert expected.keys() == found.keys()
        differing = {name for name in found if found[name] != expected[name]}
        assert differing == {"README.md", "uipe_merge.json"}  # they name their inputs
        assert run_here("verify", "memory://out", cwd=tmp_path).code == 0
        assert list((tmp_path / "cache" / "uipe-merge").iterdir()) == []

    @pytest.mark.parametrize(
        ("output", "why"),
        [
            ("memory://o", "is an input"),
            ("memory://o/", "is an input"),
            ("memory:///o", "is an input"),
            ("memory://o/sub", "lies in the input memory://o"),
            ("memory://", "names no folder"),
            ("memory://deep", "contains the input memory://deep/o"),
        ],
    )
    def test_hazard_an_output_that_meets_an_input(
        self, tmp_path: Path, store: Any, output: str, why: str
    ) -> None:
        original, _ = write_pair(tmp_path)
        url = put_tree(store, original, "deep/o" if "deep" in output else "o")
        arguments = (url, "unlearned", "--alpha", 1, "-o", output)
        refuse(tmp_path, 2, why, arguments=arguments)

    def test_a_dry_run_writes_nothing_and_needs_no_room(self, tmp_path: Path, store: Any) -> None:
        write_pair(tmp_path)
        words = ("original", "unlearned", "--alpha", 1, "-o", "memory://out", "--dry-run")
        done = run_here(*words, cwd=tmp_path)
        assert done.code == 0, done
        assert "memory://out" in done.out
        assert stored(store, "out") == {}
        assert not (tmp_path / "cache").exists()

    def test_hazard_nothing_under_the_url(self, tmp_path: Path, store: Any) -> None:
        write_pair(tmp_path)
        arguments = ("memory://none", "unlearned", "--alpha", 1, "-o", "out")
        refuse(tmp_path, 2, "memory://none: holds nothing", arguments=arguments)
        refuse(
            tmp_path, 2, "memory://none: has no uipe_merge", arguments=("verify", "memory://none")
        )


def test_a_store_that_ignores_ranges_is_refused(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.pipe_file("/model/a", bytes(100))
    folder = RemoteFolder("memory://model")
    file = folder.open_file("a")
    whole = type(store).cat_file
    monkeypatch.setattr(type(store), "cat_file", lambda self, path, **_range: whole(self, path))
    with pytest.raises(RemoteError, match="ignores byte ranges"):
        file.read_into(memoryview(bytearray(10)), 0)
