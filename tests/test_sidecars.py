"""The files beside the weights: what is carried over, what is not, and the one that changes."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from cli_tools import merged
from helpers import CONFIG, contents, read_tensors, write_checkpoint

from uipe_merge.output.card import model_id
from uipe_merge.output.sidecars import Edits, carried, edited

NAME = "model.layers.0.mlp.down_proj.weight"
ONE, TWO = {NAME: torch.ones(2, 2)}, {NAME: torch.full((2, 2), 2.0)}
OWN = {"config.json", "model.safetensors", "README.md", "uipe_merge.json"}

CARRIED: dict[str, str | bytes] = {
    "tokenizer.json": '{"b": 1,  "a": 2}',
    "tokenizer.model": bytes(range(256)),
    "chat_template.jinja": "{{ messages }}\r\n",
    "generation_config.json": "{}",
    "special_tokens_map.json": "",
    ".gitattributes": "*.safetensors filter=lfs\n",
    ".config/user.toml": "x = 1",
    "LICENSE": "text",
    "licence, revised 2 – naïve.txt": "ä, é",
    "original/params.json": "{}",
    "a/b/c/d.txt": "deep",
    "modeling_custom.py": "class X: ...",
    "results.md": "prose, not scores",
    "runs.txt": "",
    "evaluation.txt": "",
    "big.json": b"0" * (4 * 2**20 + 7),  # longer than one piece of the copy
}
LEFT_OUT = [
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack"),
    *("model.onnx", "onnx/model.onnx_data", "model-Q4.gguf", "old.safetensors", "consolidated.pth"),
    *("stale.safetensors.index.json", "weights.npz", "rust_model.ot", "model.ckpt", "q.ggml"),
    *("adapter_model.safetensors", "adapter_config.json"),
    *("trainer_state.json", "trainer_log.jsonl", "training_args.bin", "optimizer.pt", "latest"),
    *("scheduler.pt", "rng_state_0.pth", "scaler.pt", "zero_to_fp32.py", "global_step10/x.json"),
    *("checkpoint-100/config.json", "runs/Jan01/events.txt", "wandb/run.log", "logs/train.log"),
    *("events.out.tfevents.17", "sub/events.out.tfevents.17", ".hydra/config.yaml"),
    *("all_results.json", "eval_results.json", "train_results.json"),
    *("TOFU_EVAL.json", "TOFU_SUMMARY.json", "evals/forget10/scores.json", "eval/x.json"),
    *("results_2025-01-01.json", "lm_eval/results_x.json", "eval_log_forget.json"),
    *("uipe_merge.json", "README.unlearned.md"),
]


def pair(
    root: Path, original: dict[str, str | bytes], unlearned: dict[str, str | bytes]
) -> tuple[Path, Path]:
    """Write both checkpoints with these files beside their weights."""
    return (
        write_checkpoint(root / "original", ONE, files=original),
        write_checkpoint(root / "unlearned", TWO, files=unlearned),
    )


def test_every_other_file_of_the_unlearned_is_copied_verbatim(tmp_path: Path) -> None:
    others = {name: "of the original" for name in CARRIED if name != "big.json"}
    _, unlearned = pair(tmp_path, dict(others), CARRIED)
    merged(tmp_path, alpha=0)
    source, out = contents(unlearned), contents(tmp_path / "out")
    assert out.keys() == CARRIED.keys() | OWN
    for name in [*CARRIED, "config.json"]:
        assert out[name] == source[name], name


def test_gaps_are_filled_from_the_original(tmp_path: Path) -> None:
    original: dict[str, str | bytes] = {"vocab.json": "θ₀", "sub/x.txt": "θ₀", "y.txt": "θ₀"}
    unlearned: dict[str, str | bytes] = {"y.txt": "θᵤ", "sub/z.txt": "θᵤ"}
    pair(tmp_path, original, unlearned)
    (tmp_path / "unlearned" / "config.json").unlink()
    merged(tmp_path, alpha=0)
    out = contents(tmp_path / "out")
    assert out["vocab.json"] == out["sub/x.txt"] == "θ₀".encode()
    assert out["y.txt"] == out["sub/z.txt"] == "θᵤ".encode()
    assert json.loads(out["config.json"]) == CONFIG


def test_file_in_one_and_directory_in_the_other_is_the_unlearned_ones(tmp_path: Path) -> None:
    original: dict[str, str | bytes] = {"notes": "file", "docs/a.txt": "directory"}
    pair(tmp_path, original, {"notes/b.txt": "directory", "docs": "file"})
    merged(tmp_path, alpha=0)
    out = contents(tmp_path / "out")
    assert out.keys() == OWN | {"notes/b.txt", "docs"}


def test_weights_trainer_files_and_scores_are_never_copied(tmp_path: Path) -> None:
    left_out: dict[str, str | bytes] = dict.fromkeys(LEFT_OUT, "x")
    pair(tmp_path, left_out, left_out)
    merged(tmp_path, alpha=0)
    assert contents(tmp_path / "out").keys() == OWN


@pytest.mark.parametrize("name", LEFT_OUT)
def test_left_out(name: str) -> None:
    assert not carried(name)


@pytest.mark.parametrize("name", CARRIED)
def test_carried(name: str) -> None:
    assert carried(name)


def test_code_is_copied_and_never_imported(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()\n"
    names = ("modeling_custom.py", "tokenization_custom.py", "__init__.py", "sitecustomize.py")
    pair(tmp_path, {}, dict.fromkeys(names, code))
    auto_map = {"AutoModelForCausalLM": "modeling_custom.Model", "AutoConfig": "__init__.Config"}
    config = json.dumps({**CONFIG, "auto_map": auto_map, "trust_remote_code": True})
    (tmp_path / "unlearned" / "config.json").write_text(config)
    merged(tmp_path, "--dtype", "bfloat16")
    out = contents(tmp_path / "out")
    assert [out[name].decode() for name in names] == [code] * len(names)
    assert not canary.exists()
    exec(code)  # noqa: S102 - shows that the canary sings
    assert canary.exists()


# ------------------------------------------------------------ config.json

NESTED = {
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float32",
    "text_config": {
        "dtype": "float32",
        "rms_norm_eps": 1e-06,
        "inner_config": {"dtype": "float16"},
    },
    "vision_config": {"torch_dtype": "float32", "hidden_act": "ü"},
    "note": "dtype stays float32 here",
    "other": {"dtype": "float32"},
    "eos_token_id": [1, 2],
    "use_cache": None,
}


def test_the_edited_config_changes_the_dtype_keys_and_nothing_else() -> None:
    raw = edited(json.dumps(NESTED).encode(), Edits("bfloat16"))
    expected = json.loads(json.dumps(NESTED))
    expected["torch_dtype"] = "bfloat16"
    expected["text_config"]["dtype"] = "bfloat16"
    expected["text_config"]["inner_config"]["dtype"] = "bfloat16"
    expected["vision_config"]["torch_dtype"] = "bfloat16"
    changed = json.loads(raw)
    assert changed == expected
    assert list(changed) == list(NESTED)  # the order too
    assert "ü".encode() in raw


def test_the_edited_config_names_it_where_no_key_did() -> None:
    assert json.loads(edited(b'{"model_type": "x"}', Edits("float16"))) == {
        "model_type": "x",
        "dtype": "float16",
    }


def test_config_changes_only_where_the_dtype_does(tmp_path: Path) -> None:
    pair(tmp_path, {}, {})
    raw = json.dumps(NESTED | CONFIG, indent=7)
    (tmp_path / "unlearned" / "config.json").write_text(raw)
    merged(tmp_path, "--dtype", "float32", alpha=0)  # what the weights are already
    assert (tmp_path / "out" / "config.json").read_text() == raw
    merged(tmp_path, "--dtype", "bfloat16", "--overwrite", alpha=0)
    changed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert changed == json.loads(edited(raw.encode(), Edits("bfloat16")))
    assert read_tensors(tmp_path / "out")[NAME].dtype == torch.bfloat16


def test_config_is_verbatim_where_only_an_integer_tensor_changes_its_dtype(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "original", {**ONE, "ids": torch.arange(3)})
    unlearned = write_checkpoint(tmp_path / "unlearned", {**TWO, "ids": torch.arange(3).int()})
    merged(tmp_path, alpha=-1)
    assert read_tensors(tmp_path / "out")["ids"].dtype == torch.int64  # α = −1 is the original
    assert (tmp_path / "out/config.json").read_bytes() == (unlearned / "config.json").read_bytes()


# ------------------------------------------------------------ the model card


def card(root: Path) -> tuple[dict[str, object], str]:
    """Front matter and text of the output's card."""
    _, front, text = (root / "out" / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert isinstance(metadata, dict)
    return metadata, text


def test_card_names_both_models_the_relation_the_licence_and_the_command(tmp_path: Path) -> None:
    theirs = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ntags: [mine]\n---\n# Original\n"
    own = "---\nlicense: mit\nbase_model: original\ndatasets: [tofu]\n---\n# Unlearned\n"
    pair(tmp_path, {"README.md": theirs}, {"README.md": own})
    merged(tmp_path, "--max-shard-size", "1GB", alpha=0)
    metadata, text = card(tmp_path)
    assert metadata == {
        "base_model": ["original", "unlearned"],
        "base_model_relation": "merge",
        "license": "mit",
        "language": ["en", "de"],
        "library_name": "transformers",
        "tags": ["unlearning", "uipe", "merge"],
    }
    command = (
        f"uipe-merge {tmp_path}/original {tmp_path}/unlearned --alpha 0 "
        f"--max-shard-size 1000000000 -o {tmp_path}/out"
    )
    assert f"```bash\n{command}\n```" in text
    assert "arXiv 2503.04693" in text
    assert (tmp_path / "out" / "README.unlearned.md").read_text() == own


@pytest.mark.parametrize(
    ("original", "unlearned", "licence"),
    [
        ("---\nlicense: gemma\n---\n", "---\ntags: []\n---\n", "gemma"),
        ("---\nlicense: gemma\n---\n", "no front matter", "gemma"),
        ("---\nlicense: {not: plain}\n---\n", "---\n[broken\n---\n", None),
    ],
)
def test_licence_of_the_original_where_the_unlearned_names_none(
    tmp_path: Path, original: str, unlearned: str, licence: str | None
) -> None:
    pair(tmp_path, {"README.md": original}, {"README.md": unlearned})
    merged(tmp_path, alpha=0)
    assert card(tmp_path)[0].get("license") == licence


def test_only_the_unlearned_card_is_kept(tmp_path: Path) -> None:
    pair(tmp_path, {"README.md": "---\nlicense: mit\n---\n"}, {})
    merged(tmp_path, alpha=0)
    assert contents(tmp_path / "out").keys() == OWN


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("hub/models--open-unlearning--tofu_full/snapshots/0a1b", "open-unlearning/tofu_full"),
        ("models/Llama-3.2-1B", "Llama-3.2-1B"),
        ("models/Llama-3.2-1B/", "Llama-3.2-1B"),
        ("models--incomplete", "models--incomplete"),
        (".", "."),
    ],
)
def test_model_id(location: str, name: str) -> None:
    assert model_id(location) == name
