"""The index of a sharded checkpoint: what is read from it, and the text that is written."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from fakes import MemoryFolder
from helpers import random_tensors
from safetensors.torch import save_file

from uipe_merge.checkpoint.index import INDEX_NAME, Index, encode_index, read_index
from uipe_merge.errors import CorruptInputError, UipeMergeError, UnsafeInputError

SHARD = "model-00001-of-00002.safetensors"


def read(content: object) -> Index:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_index(MemoryFolder({INDEX_NAME: raw}, "m"), INDEX_NAME)


def refused(content: object, kind: type[UipeMergeError], message: str) -> UipeMergeError:
    with pytest.raises(kind, match=message) as caught:
        read(content)
    assert caught.value.file == f"m/{INDEX_NAME}"
    return caught.value


class TestRead:
    def test_a_usual_one(self) -> None:
        weight_map = {"b": SHARD, "a": "model-00002-of-00002.safetensors"}
        index = read({"metadata": {"total_size": 12, "more": []}, "weight_map": weight_map})
        assert index == Index(weight_map, 12)

    @pytest.mark.parametrize(
        "metadata",
        [
            {},
            {"metadata": None},
            {"metadata": []},
            {"metadata": {}},
            {"metadata": {"total_size": None}},
            {"metadata": {"total_size": "12"}},
            {"metadata": {"total_size": True}},
            {"metadata": {"total_size": 1.5}},
            {"metadata": {"total_size": float("nan")}},
            {"metadata": {"total_size": float("inf")}},
        ],
        ids=str,
    )
    def test_total_size_is_unknown_with(self, metadata: dict[str, object]) -> None:
        assert read({**metadata, "weight_map": {"a": SHARD}}).total_size is None

    @pytest.mark.parametrize("total", [0, 12, 12.0, 26953670656.0, 2**70, 10**400])
    def test_total_size_is(self, total: float) -> None:
        index = read({"metadata": {"total_size": total}, "weight_map": {"a": SHARD}})
        assert index.total_size == total
        assert type(index.total_size) is int

    @pytest.mark.parametrize(
        "content", [[], None, 3, {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}]
    )
    def test_no_weight_map_in(self, content: object) -> None:
        refused(content, CorruptInputError, "has no weight_map")

    @pytest.mark.parametrize("shard", [None, 1, [], {}, [SHARD], "", True])
    def test_a_tensor_that_is_in(self, shard: object) -> None:
        error = refused({"weight_map": {"a": SHARD, "b": shard}}, CorruptInputError, "no file name")
        assert error.tensor == "b"

    @pytest.mark.parametrize("shard", ["x", "model.bin", ".safetensors.bin", "safetensors", " "])
    def test_a_shard_that_is_no_safetensors_file(self, shard: str) -> None:
        error = refused({"weight_map": {"b": shard}}, CorruptInputError, "not a .safetensors file")
        assert error.tensor == "b"

    @pytest.mark.parametrize(
        "shard",
        [
            *[".", "..", "/", "../x.safetensors", "./a.safetensors", "a/b.safetensors"],
            *["a\\b.safetensors", "C:x.safetensors", "\0.safetensors", "/etc/passwd"],
        ],
    )
    def test_a_shard_that_is_a_path(self, shard: str) -> None:
        content = {"weight_map": {"a": SHARD, "b": shard}}
        error = refused(content, UnsafeInputError, "not a plain file name")
        assert error.tensor == "b"

    def test_a_shard_called_like_no_path_but_oddly(self) -> None:
        odd = "..model [1] θ.safetensors"
        assert read({"weight_map": {"a": odd}}).weight_map == {"a": odd}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "Expecting value"),
            (b"{", "Expecting"),
            (b"\xef\xbb\xbf{}", "byte-order mark"),
            (b'{"weight_map": {"a": "b", "a": "c"}}', "duplicate key 'a'"),
            (b'{"weight_map": {}, "weight_map": {}}', "duplicate key 'weight_map'"),
            (b'{"weight_map": {"\\ud800": "b"}}', "half a surrogate pair"),
            (b"[" * 100_000, "nested too deeply"),
            (b"[" + b"0," * 1_000_001 + b"0]", "more than 1000000 values"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_text_that_is(self, content: bytes, message: str) -> None:
        refused(content, CorruptInputError, f"is not valid: .*{message}")


class TestWrite:
    def test_golden_text(self) -> None:
        assert encode_index({"b": "2", "θ": "1", "a": "1"}, 12, 6) == (
            b"{\n"
            b'  "metadata": {\n'
            b'    "total_parameters": 6,\n'
            b'    "total_size": 12\n'
            b"  },\n"
            b'  "weight_map": {\n'
            b'    "a": "1",\n'
            b'    "b": "2",\n'
            b'    "\\u03b8": "1"\n'
            b"  }\n"
            b"}\n"
        )

    def test_what_was_written_is_read(self) -> None:
        weight_map = {f"layer.{number}": SHARD for number in range(12)}
        assert read(encode_index(weight_map, 5, 3)) == Index(weight_map, 5)

    def test_transformers_writes_the_same(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=32,
        )
        LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="8KB")
        theirs = (tmp_path / INDEX_NAME).read_bytes()
        document = json.loads(theirs)
        metadata, weight_map = document["metadata"], document["weight_map"]
        assert len(set(weight_map.values())) > 1
        scrambled = dict(sorted(weight_map.items(), reverse=True))
        ours = encode_index(scrambled, metadata["total_size"], metadata["total_parameters"])
        assert ours == theirs

    def test_huggingface_hub_loads_a_model_by_it(self, tmp_path: Path) -> None:
        from huggingface_hub import load_torch_model

        tensors = {name.replace(".", "_"): tensor for name, tensor in random_tensors().items()}
        self.write(tmp_path, tensors)
        model = torch.nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, torch.full_like(tensor, 7))
        load_torch_model(model, tmp_path, strict=True)
        loaded = model.state_dict()
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())

    def test_transformers_finds_the_shards_by_it(self, tmp_path: Path) -> None:
        from transformers.utils.hub import get_checkpoint_shard_files

        shards = self.write(tmp_path, random_tensors())
        files, metadata = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / INDEX_NAME))
        assert files == [str(tmp_path / name) for name in sorted(set(shards.values()))]
        assert metadata["weight_map"] == shards
        assert sorted(metadata["all_checkpoint_keys"]) == sorted(shards)
        assert metadata["total_size"] == sum(tensor.nbytes for tensor in random_tensors().values())

    def write(self, root: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Write the tensors into two shards with our index; return which went where."""
        names = list(tensors)
        shards: dict[str, str] = {}
        for number in (1, 2):
            shard = f"model-{number:05d}-of-00002.safetensors"
            part = {name: tensors[name] for name in names[number - 1 :: 2]}
            save_file(part, root / shard, {"format": "pt"})
            shards |= dict.fromkeys(part, shard)
        sizes = [(tensor.nbytes, tensor.numel()) for tensor in tensors.values()]
        total, elements = map(sum, zip(*sizes, strict=True))
        (root / INDEX_NAME).write_bytes(encode_index(shards, total, elements))
        return shards
