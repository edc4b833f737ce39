"""Hub ids through the command line, against a hub of our own on loopback: hazards K."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cli_tools import tree
from helpers import Result, assert_refused, contents, random_tensors, run_cli, write_checkpoint
from helpers import write_pair as write_plain_pair
from hub_server import Hub, Refusal, identity, served

TOKEN = "hf_a_secret_that_nobody_may_see"  # noqa: S105 - made up
BASE, TUNED = "org/base", "org/unlearned"
SECOND = "model.layers.1.mlp.down_proj.weight"


class Place:
    """A directory, a hub with both models, and the environment of the program."""

    def __init__(self, root: Path, hub: Hub, *, shards: int = 1) -> None:
        self.root = root
        self.hub = hub
        self.original, self.unlearned = write_plain_pair(root / "local", shards=shards)
        for directory in (self.original, self.unlearned):
            (directory / "tokenizer.json").write_text('{"model": "none"}')
            (directory / "modeling.py").write_text("raise SystemExit('code was run')\n")
            config = json.loads((directory / "config.json").read_text())
            config["auto_map"] = {"AutoModel": "modeling.Model"}
            (directory / "config.json").write_text(json.dumps(config))
        self.commits = [hub.push(BASE, self.original), hub.push(TUNED, self.unlearned)]
        self.cache = root / "hf" / "hub"
        self.out = root / "out"
        self.env = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(root / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def run(self, *arguments: object, **env: str) -> Result:
        """The program, whose every word is searched for the token."""
        result = run_cli(*arguments, cwd=self.root, env={**self.env, **env})
        assert TOKEN not in result.out + result.err
        return result

    def merge(
        self, *extra: object, pair: tuple[object, object] = (BASE, TUNED), **env: str
    ) -> Result:
        return self.run(*pair, "--alpha", 2, "-o", self.out, *extra, **env)

    def succeed(
        self, *extra: object, pair: tuple[object, object] = (BASE, TUNED), **env: str
    ) -> Result:
        result = self.merge(*extra, pair=pair, **env)
        assert result.code == 0, result
        return result

    def refuse(
        self, code: int, *fragments: str, pair: tuple[object, object] = (BASE, TUNED), **env: str
    ) -> Result:
        result = self.merge(pair=pair, **env)
        assert_refused(result, code, *fragments)
        assert result.out == ""
        assert not self.out.exists()
        return result

    def pinned(self) -> tuple[str, str]:
        return f"{BASE}@{self.commits[0]}", f"{TUNED}@{self.commits[1]}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with served() as hub:
        yield hub


@pytest.fixture
def place(tmp_path: Path, hub: Hub) -> Place:
    return Place(tmp_path, hub)


def weights(directory: Path) -> dict[str, bytes]:
    return {
        name: body for name, body in contents(directory).items() if name.endswith(".safetensors")
    }


def header_bytes(directory: Path) -> int:
    """Length of the headers of all weight files, with what looking at their start takes."""
    return sum(8 + int.from_bytes(body[:8], "little") + 32 for body in weights(directory).values())


class TestMerge:
    @pytest.mark.parametrize("shards", [1, 3])
    def test_the_same_bytes_as_from_directories(
        self, tmp_path: Path, hub: Hub, shards: int
    ) -> None:
        place = Place(tmp_path, hub, shards=shards)
        place.succeed()
        local = tmp_path / "local-out"
        result = place.run(place.original, place.unlearned, "--alpha", 2, "-o", local)
        assert result.code == 0, result
        ours, theirs = contents(place.out), contents(local)
        for name in ("README.md", "uipe_merge.json"):  # these name the inputs
            assert ours.pop(name) != theirs.pop(name)
        assert ours == theirs
        assert place.run("verify", place.out).code == 0

    def test_card_manifest_and_command_name_the_commit(self, place: Place) -> None:
        place.succeed()
        card = (place.out / "README.md").read_text()
        assert f"base_model:\n- {BASE}\n- {TUNED}\n" in card
        original, unlearned = place.pinned()
        assert f"uipe-merge {original} {unlearned} --alpha 2" in card
        manifest = json.loads((place.out / "uipe_merge.json").read_text())
        assert manifest["inputs"]["original"]["location"] == original
        assert manifest["inputs"]["unlearned"]["location"] == unlearned
        [shard] = manifest["inputs"]["unlearned"]["shards"]
        body = (place.unlearned / "model.safetensors").read_bytes()
        assert shard["tag"] == identity("model.safetensors", body)
        assert str(place.cache) not in card + json.dumps(manifest)

    def test_one_side_may_be_a_directory(self, place: Place) -> None:
        place.succeed(pair=(place.original, TUNED))
        assert not any("/base" in each.path for each in place.hub.requests)

    def test_a_directory_of_that_name_wins(self, place: Place) -> None:
        shutil.copytree(place.original, place.root / "org" / "base")
        shutil.copytree(place.unlearned, place.root / "org" / "unlearned")
        place.succeed()
        assert place.hub.requests == []

    @pytest.mark.parametrize(
        "name", ["./org/base", "/org/base", "base", "org/base/", "a/b/c", "~/x"]
    )
    def test_what_is_no_id_is_a_directory(self, place: Place, name: str) -> None:
        place.refuse(2, "no such directory", "ORG/NAME", pair=(name, TUNED))
        assert not any("/base" in each.path for each in place.hub.requests)

    @pytest.mark.parametrize("name", ["org/a--b", "org/a..b", "org/a.git", f"org/{'x' * 100}"])
    def test_what_no_hub_would_take_is_not_asked_for(self, place: Place, name: str) -> None:
        place.refuse(2, name, "neither a directory nor a hub id", pair=(name, TUNED))
        assert place.hub.requests == []

    def test_custom_code_is_carried_and_not_run(self, place: Place) -> None:
        place.succeed()
        assert (place.out / "modeling.py").read_bytes() == b"raise SystemExit('code was run')\n"

    def test_only_what_is_read_is_downloaded(self, place: Place) -> None:
        extra = {**contents(place.original), "pytorch_model.bin": bytes(5000), "onnx/m.onnx": b"1"}
        place.hub.push(BASE, extra)
        place.run(BASE, TUNED, "--alpha", 0, "-o", place.out)
        original = weights(place.original)["model.safetensors"]
        sent = sum(
            each.sent
            for each in place.hub.requests
            if each.path.endswith("model.safetensors") and "/base/" in each.path
        )
        assert sent < len(original)  # α = 0 reads the header of the original, and no more
        assert place.hub.sent(".bin") == place.hub.sent(".onnx") == 0

    def test_inspect(self, place: Place) -> None:
        result = place.run("inspect", BASE, TUNED, "--json")
        local = place.run("inspect", place.original, place.unlearned, "--json")
        assert result.code == 0, result
        assert result.out == local.out

    def test_a_tag_a_commit_and_a_branch_with_a_slash(self, place: Place) -> None:
        place.hub.push(BASE, place.original, branch="refs/pr/1")
        place.succeed(pair=(f"{BASE}@refs/pr/1", place.pinned()[1]))


class TestPinning:
    def test_a_branch_that_moves_after_the_listing(self, place: Place) -> None:
        before = contents(place.unlearned)
        other = write_checkpoint(place.root / "newer", random_tensors(seed=9))

        def move() -> None:
            place.hub.push(BASE, other)
            place.hub.push(TUNED, other)

        place.hub.moves = move
        place.succeed("--dtype", "auto", pair=(f"{BASE}@main", f"{TUNED}@{place.commits[1]}"))
        files = [each.path for each in place.hub.requests if "/resolve/" in each.path]
        assert files
        assert all(any(f"/resolve/{commit}/" in path for commit in place.commits) for path in files)
        assert (place.out / "tokenizer.json").read_bytes() == before["tokenizer.json"]
        command = json.loads((place.out / "uipe_merge.json").read_text())["command"]
        assert " ".join(place.pinned()) in command

    def test_one_repository_named_twice_is_asked_for_once(self, place: Place) -> None:
        place.succeed(pair=(BASE, BASE))
        listings = [each for each in place.hub.requests if each.path.startswith("/api/models/")]
        assert len(listings) == 1


class TestBeforeTheDownload:
    def test_a_mismatch_is_refused_from_headers(self, place: Place) -> None:
        tensors = random_tensors()
        tensors[SECOND] = torch.zeros(4000, 40)
        big = write_checkpoint(place.root / "big", tensors)
        place.hub.push(TUNED, big)
        place.refuse(5, SECOND, "[4000, 40]", TUNED)
        assert place.hub.sent(".safetensors") <= header_bytes(place.original) + header_bytes(big)
        assert not any(each.method == "HEAD" for each in place.hub.requests)
        assert not place.cache.exists()

    def test_dry_run_downloads_nothing_and_says_how_much(self, place: Place) -> None:
        result = place.merge("--dry-run", "--json")
        assert result.code == 0, result
        names = ("model.safetensors", "config.json", "tokenizer.json", "modeling.py")
        read = [place.unlearned / name for name in names]
        read += [place.original / name for name in names[:2]]  # its own go before its tokenizer
        expected = sum(path.stat().st_size for path in read)
        assert json.loads(result.out)["download_bytes"] == expected
        assert place.hub.sent(".safetensors") <= header_bytes(place.original) * 2
        assert not place.cache.exists()
        assert "download first" in place.merge("--dry-run").out

    def test_a_quantised_model_is_refused_from_its_config(self, place: Place) -> None:
        files = contents(place.unlearned)
        config = {
            **json.loads(files["config.json"]),
            "quantization_config": {"quant_method": "awq"},
        }
        place.hub.push(TUNED, {**files, "config.json": json.dumps(config).encode()})
        place.refuse(5, "quantised with awq")
        assert not place.cache.exists()

    def test_pickled_weights(self, place: Place) -> None:
        torch.save({"a": torch.ones(3)}, place.root / "m.bin")
        place.hub.push(TUNED, {"pytorch_model.bin": (place.root / "m.bin").read_bytes()})
        place.refuse(6, "--allow-pickle")
        result = place.merge("--allow-pickle")
        assert_refused(result, 6, "pytorch_model.bin", "hf download")
        assert place.hub.sent(".bin") == 0

    @pytest.mark.parametrize("name", ["../evil.json", "a/../../evil", "/etc/evil", "a\\b", "a//b"])
    def test_names_that_leave_the_repository(self, place: Place, name: str) -> None:
        place.hub.push(TUNED, {**contents(place.unlearned), name: b"x"})
        place.refuse(6, TUNED, "leaves the repository")
        assert not place.cache.exists()

    def test_an_index_that_leaves_the_repository(self, place: Place) -> None:
        files = contents(place.unlearned)
        del files["model.safetensors"]
        index = {"weight_map": {"a": "../../../x.safetensors"}}
        place.hub.push(TUNED, {**files, "model.safetensors.index.json": json.dumps(index).encode()})
        place.refuse(6, "x.safetensors", "not a plain file name")

    def test_a_hub_that_ignores_ranges_is_cut_off(self, place: Place) -> None:
        large = {name: torch.zeros(2000, 2000) for name in ("a", "b")}
        for repo, name in ((BASE, "large"), (TUNED, "larger")):
            shape = {} if repo == BASE else {"c": torch.zeros(2)}
            directory = write_checkpoint(place.root / name, {**large, **shape})
            place.hub.push(repo, directory)
        place.hub.ignore_range = True
        place.refuse(5, "tensor 'c' is only in")
        assert place.hub.sent(".safetensors") < 2 * 32_000_000  # the sockets' buffers at most


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


class TestAdapters:
    @pytest.fixture
    def adapter(self, place: Place) -> Path:
        generator = torch.Generator().manual_seed(3)
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{module}.lora_A.weight": torch.randn(4, 16, generator=generator),
            f"{module}.lora_B.weight": torch.randn(16, 4, generator=generator),
        }
        directory = write_checkpoint(place.root / "adapter", tensors, config=None)
        (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "base_model_name_or_path": "someone/base",
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        place.hub.push("org/adapter", directory)
        return directory

    @pytest.mark.parametrize(
        ("unlearned", "local"),
        [
            ("org/adapter", "{adapter}"),
            ("org/base+org/adapter@main", "{original}+{adapter}"),
            ("{original}+org/adapter", "{original}+{adapter}"),
            ("org/base+{adapter}", "{original}+{adapter}"),
        ],
    )
    def test_the_same_bytes_as_from_directories(
        self, place: Place, adapter: Path, unlearned: str, local: str
    ) -> None:
        names = {"adapter": adapter, "original": place.original}
        result = place.succeed(pair=(BASE, unlearned.format(**names)))
        ours_by_name = "{original}" not in unlearned  # and "base" is the name it was trained on
        assert ("was trained on" in result.err) != ours_by_name
        ours = weights(place.out)
        command = json.loads((place.out / "uipe_merge.json").read_text())["command"]
        assert f"uipe-merge {place.pinned()[0]} " in command
        assert "@main" not in command
        shutil.rmtree(place.out)
        place.succeed(pair=(place.original, local.format(**names)))
        assert weights(place.out) == ours


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

    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    @pytest.mark.parametrize("kind", ["/api/models/", "/resolve/"])
    def test_failures_that_pass(self, place: Place, status: int, kind: str) -> None:
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

        files = contents(place.unlearned)
        place.hub.push(TUNED, {**files, "vocabulary.txt": Huge(b"x")})
        result = place.refuse(8, "bytes, ", "are free")
        assert "11529215046" in result.err
        assert not os.path.lexists(place.cache)
