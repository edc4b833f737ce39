"""Hub ids through the command line, against a hub of our own on loopback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_refused,
    bits,
    contents,
    random_tensors,
    read_tensors,
    write_checkpoint,
)
from hub_server import Hub, identity, served
from hub_tools import BASE, TUNED, Place, header_bytes, weights

DOWNLOAD = (
    "import sys; from huggingface_hub import hf_hub_download as get; "
    "get(sys.argv[1], sys.argv[2], revision=sys.argv[3])"
)
SECOND = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with served() as hub:
        yield hub


@pytest.fixture
def place(tmp_path: Path, hub: Hub) -> Place:
    return Place(tmp_path, hub)


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

    def test_updates_of_a_step_may_be_repositories(self, place: Place) -> None:
        related = place.hub.push("org/related", place.unlearned)
        steering = ("--along", "org/related", "--add", f"org/related@@{TUNED}=0.5")
        place.succeed(*steering)
        command = json.loads((place.out / "uipe_merge.json").read_text())["command"]
        assert f"--along org/related@{related}" in command
        assert f"--add org/related@{related}@@{TUNED}@{place.commits[1]}=0.5" in command
        assert weights(place.out) == self.steered_locally(place)

    @staticmethod
    def steered_locally(place: Place) -> dict[str, bytes]:
        local = place.root / "steered"
        update = f"{place.unlearned}@@{place.unlearned}=0.5"
        words = ("--along", place.unlearned, "--add", update)
        done = place.run(place.original, place.unlearned, "--alpha", 2, "-o", local, *words)
        assert done.code == 0, done
        return weights(local)

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
        place.succeed(pair=(f"{BASE}@main", f"{TUNED}@{place.commits[1]}"))
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

    def test_pickled_weights_that_were_downloaded_before(self, place: Place) -> None:
        for repo, directory in ((BASE, place.original), (TUNED, place.unlearned)):
            torch.save(read_tensors(directory), place.root / "m.bin")
            commit = place.hub.push(
                repo, {"pytorch_model.bin": (place.root / "m.bin").read_bytes()}
            )
            subprocess.run(
                [sys.executable, "-c", DOWNLOAD, repo, "pytorch_model.bin", commit],
                env={**os.environ, **place.env},
                check=True,
            )
        place.succeed("--allow-pickle")
        ours = read_tensors(place.out)
        shutil.rmtree(place.out)
        place.succeed(pair=(place.original, place.unlearned))
        theirs = read_tensors(place.out)
        assert ours.keys() == theirs.keys()
        assert all((bits(ours[name]) == bits(theirs[name])).all() for name in theirs)

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
