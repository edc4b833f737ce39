"""Hubs and connections that fail, and the cache that stands in for them: hazards K."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_tools import tree
from helpers import contents, write_checkpoint
from hub_server import Hub, Refusal, served
from hub_tools import BASE, TOKEN, TUNED, Place, header_bytes, weights


@pytest.fixture
def hub() -> Iterator[Hub]:
    with served() as hub:
        yield hub


@pytest.fixture
def place(tmp_path: Path, hub: Hub) -> Place:
    return Place(tmp_path, hub)


class TestCache:
    def test_nothing_is_fetched_twice(self, place: Place) -> None:
        place.succeed()
        first = len(place.hub.requests)
        shutil.rmtree(place.out)
        place.succeed()
        again = place.hub.requests[first:]
        assert [each.path.split("/")[1] for each in again] == ["api", "api"], again

    def test_a_file_that_is_in_the_cache_is_not_asked_for(self, place: Place) -> None:
        place.succeed(pair=(BASE, BASE))
        shutil.rmtree(place.out)
        before = place.hub.sent("model.safetensors")
        place.succeed()
        size = (place.unlearned / "model.safetensors").stat().st_size
        fetched = place.hub.sent("model.safetensors") - before
        assert size < fetched <= size + header_bytes(place.unlearned)

    def test_offline_with_a_cache(self, place: Place) -> None:
        place.succeed()
        online = contents(place.out)
        shutil.rmtree(place.out)
        count = len(place.hub.requests)
        place.succeed(HF_HUB_OFFLINE="1")
        assert contents(place.out) == online
        shutil.rmtree(place.out)
        place.succeed(pair=place.pinned(), HF_HUB_OFFLINE="1")
        assert contents(place.out) == online
        assert len(place.hub.requests) == count

    def test_offline_without_a_cache(self, place: Place) -> None:
        place.refuse(10, BASE, "not in the cache", "HF_HUB_OFFLINE", HF_HUB_OFFLINE="1")
        assert place.hub.requests == []

    def test_offline_with_a_file_missing(self, tmp_path: Path, hub: Hub) -> None:
        place = Place(tmp_path, hub, shards=2)
        place.succeed()
        shutil.rmtree(place.out)
        name = "model-00002-of-00002.safetensors"
        [link] = place.cache.glob(f"models--org--unlearned/snapshots/*/{name}")
        link.unlink()
        place.refuse(10, name, "not in the cache", "run once without", HF_HUB_OFFLINE="1")

    def test_a_file_that_is_cut_off_in_the_cache(self, place: Place) -> None:
        place.succeed()
        shutil.rmtree(place.out)
        [link] = place.cache.glob("models--org--unlearned/snapshots/*/tokenizer.json")
        os.truncate(link, 3)
        place.refuse(4, "tokenizer.json", "3 bytes in the cache and 17", f"remove {link}")

    def test_the_cache_may_be_elsewhere(self, place: Place) -> None:
        elsewhere = place.root / "elsewhere"
        place.succeed(HF_HUB_CACHE=str(elsewhere))
        assert (elsewhere / "models--org--base").is_dir()
        assert not place.cache.exists()

    def test_a_merge_from_the_cache_leaves_it_as_it_was(self, place: Place) -> None:
        place.succeed()
        shutil.rmtree(place.out)
        refs = [place.cache / f"models--org--{name}" / "blobs" for name in ("base", "unlearned")]
        before = [tree(path) for path in refs]
        place.succeed()
        assert [tree(path) for path in refs] == before


class TestRefusals:
    @pytest.mark.parametrize(
        ("refusal", "fragments"),
        [
            (Refusal(401, "GatedRepo", "Access is restricted"), ("is gated", "accept its licence")),
            (Refusal(403, "GatedRepo", "Ask for access"), ("is gated", "accept its licence")),
            (Refusal(401, "RepoNotFound", "Unauthorised"), ("private", "hf auth login")),
            (Refusal(401, "", f"Token {TOKEN} is expired"), ("expired", "hf auth login")),
            (
                Refusal(401, "", "Invalid credentials in Authorization header"),
                ("refuses the token", "hf auth login"),
            ),
            (Refusal(403, "", f"Forbidden for {TOKEN}"), ("may not be read", "hf auth login")),
            (Refusal(404, "RepoNotFound"), ("no such repository", "check the id")),
            (Refusal(404, "RevisionNotFound"), ("no such revision", "after the @")),
            (Refusal(418, "", "short and stout"), ("(418)",)),
        ],
    )
    def test_a_listing_refused(
        self, place: Place, refusal: Refusal, fragments: tuple[str, ...]
    ) -> None:
        place.hub.refuse = lambda method, path: refusal if TUNED in path else None
        place.refuse(10, TUNED, *fragments)
        assert not place.cache.exists()

    def test_unknown_repository_and_revision(self, place: Place) -> None:
        place.refuse(10, "org/none", "no such repository", pair=("org/none", TUNED))
        place.refuse(10, "org/base@v9", "no such revision", pair=(f"{BASE}@v9", TUNED))

    def test_without_a_token_a_401_may_be_a_missing_repository(self, place: Place) -> None:
        place.hub.refuse = lambda method, path: Refusal(401, "", "Invalid username or password.")
        place.refuse(10, BASE, "no such repository, or it is private", HF_TOKEN="")

    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    def test_gated_files_of_a_listing_that_is_open(self, place: Place, method: str) -> None:
        gated = Refusal(403, "GatedRepo", "Ask for access")
        place.hub.refuse = lambda verb, path: (
            gated if (verb, "/resolve/" in path) == (method, True) else None
        )
        place.refuse(10, "org/", "is gated")

    def test_a_file_that_is_listed_and_not_there(self, place: Place) -> None:
        missing = Refusal(404, "EntryNotFound")
        place.hub.refuse = lambda method, path: (
            missing if path.endswith("model.safetensors") else None
        )
        place.refuse(10, "model.safetensors", "not there")

    @pytest.mark.parametrize(("status", "fragment"), [(429, "too many requests"), (503, "(503)")])
    def test_failures_that_stay(self, place: Place, status: int, fragment: str) -> None:
        place.hub.refuse = lambda method, path: Refusal(status)
        place.refuse(10, BASE, fragment, "later")

    @pytest.mark.parametrize(
        ("kind", "status"),
        [
            ("/api/models/", 429),
            ("/api/models/", 503),
            ("/resolve/", 429),
            ("/resolve/", 500),
            ("/resolve/", 504),
        ],
    )
    def test_failures_that_pass(self, place: Place, kind: str, status: int) -> None:
        failures = {"GET": 1, "HEAD": 1}

        def refuse(method: str, path: str) -> Refusal | None:
            if kind not in path or not failures[method]:
                return None
            failures[method] -= 1
            return Refusal(status, headers={"Retry-After": "0"})

        place.hub.refuse = refuse
        place.succeed()

    def test_a_download_that_fails_stays_resumable(self, tmp_path: Path, hub: Hub) -> None:
        place = Place(tmp_path, hub, shards=2)
        gone = Refusal(404, "EntryNotFound")
        last = "unlearned/resolve/" + place.commits[1] + "/model-00002-of-00002.safetensors"
        hub.refuse = lambda method, path: gone if method == "HEAD" and path.endswith(last) else None
        place.refuse(10, "model-00002-of-00002.safetensors")
        count = len(hub.requests)
        hub.refuse = lambda method, path: None
        place.succeed()
        again = [each.path for each in hub.requests[count:] if each.method == "HEAD"]
        assert again
        kept = f"{TUNED}/resolve/{place.commits[1]}/model-00001-of-00002.safetensors"
        assert not any(path.endswith(kept) for path in again)

    def test_nobody_listens(self, place: Place) -> None:
        with socket.socket() as bound:  # bound and not listening: refused at once
            bound.bind(("127.0.0.1", 0))
            endpoint = f"http://user:{TOKEN}@127.0.0.1:{bound.getsockname()[1]}"
            place.refuse(10, BASE, "127.0.0.1 cannot be reached", HF_ENDPOINT=endpoint)

    def test_a_name_that_does_not_resolve(self, place: Place) -> None:
        place.refuse(10, BASE, "hub.invalid cannot be reached", HF_ENDPOINT="http://hub.invalid")

    @pytest.mark.parametrize("body", [b"<html>log in</html>", b"[]", b"{}", b'{"sha": "main"}'])
    def test_something_else_than_a_hub(self, place: Place, body: bytes) -> None:
        place.hub.listing = body
        place.refuse(10, BASE, "does not answer as a hub", "HF_ENDPOINT")


class TestTransfer:
    def test_a_download_cut_half_way_goes_on(self, place: Place) -> None:
        sizes = 0
        for repo, value in ((BASE, 1), (TUNED, 2)):  # the client keeps whole chunks of 10 MiB
            directory = write_checkpoint(
                place.root / f"x{value}", {"a": torch.full((3, 2**21), float(value))}
            )
            sizes += (directory / "model.safetensors").stat().st_size
            place.hub.push(repo, directory)
        place.hub.cut = 1
        place.succeed()
        resumed = [each for each in place.hub.requests if each.asked.endswith("-")]
        assert len(resumed) == 1
        assert place.hub.sent("model.safetensors") < sizes + 3_000_000

    def test_the_token_stays_with_the_hub(self, place: Place) -> None:
        place.hub.redirect = True
        place.succeed()
        elsewhere = [each for each in place.hub.requests if each.host == "localhost"]
        assert {each.method for each in elsewhere} == {"GET"}
        assert not any(each.authorised for each in elsewhere)
        assert all(each.authorised for each in place.hub.requests if each not in elsewhere)

    def test_a_header_cut_half_way_is_read_again(self, place: Place) -> None:
        names = {f"model.layers.{n}.weight": torch.ones(1) for n in range(50)}
        for repo, name in ((BASE, "one"), (TUNED, "two")):
            place.hub.push(repo, write_checkpoint(place.root / name, names))
        place.hub.cut = 1
        place.succeed()

    @pytest.mark.parametrize("change", ["shorter", "longer"])
    def test_another_size(self, place: Place, change: str) -> None:
        body = weights(place.unlearned)["model.safetensors"]
        place.hub.ignore_range = True
        place.hub.altered["model.safetensors"] = (
            body[:-8] if change == "shorter" else body + b"\0" * 8
        )
        place.refuse(10, "model.safetensors", "bytes, the hub's list says")

    def test_another_range(self, place: Place) -> None:
        place.hub.shift = 4
        place.refuse(10, BASE, "another range came")

    def test_another_size_of_the_download(self, place: Place) -> None:
        place.hub.altered["tokenizer.json"] = b"{}"
        place.refuse(10, "tokenizer.json", "2 bytes, the hub's list says 17")
        place.hub.altered.clear()
        place.succeed()

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
    def test_the_right_size_and_wrong_bytes(self, place: Place, name: str) -> None:
        body = bytearray((place.unlearned / name).read_bytes())
        body[-1] ^= 1
        place.hub.altered[name] = bytes(body)
        place.refuse(4, name, "right size and wrong bytes", "removed from the cache")
        blobs = [
            path for path in place.cache.rglob("*") if path.is_file() and not path.is_symlink()
        ]
        assert bytes(body) not in [path.read_bytes() for path in blobs]
        place.hub.altered.clear()
        place.succeed()

    def test_a_header_that_changes_before_the_download(self, place: Place) -> None:
        name = "model.safetensors"
        body = (place.unlearned / name).read_bytes()
        first, second = b"[16,40]", b"[40,16]"
        assert first in body
        place.hub.altered[name] = body.replace(first, second)

        def honest(method: str, path: str) -> None:
            if method == "HEAD":  # headers were read as altered; what is downloaded is right
                place.hub.altered.clear()

        place.hub.refuse = honest
        place.refuse(4, name, "another header", pair=(BASE, TUNED))

    def test_no_room_in_the_cache(self, place: Place) -> None:
        class Huge(bytes):
            def __len__(self) -> int:
                return 2**60

        # Read for planning again, and no part of the output.
        place.hub.push(BASE, {**contents(place.original), "README.md": Huge(b"x")})
        result = place.refuse(8, str(place.cache), "to be downloaded", "are free")
        assert "11529215046" in result.err
        assert "HF_HUB_CACHE" in result.err
        assert not os.path.lexists(place.cache)
