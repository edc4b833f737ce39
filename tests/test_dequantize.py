"""Block-scaled FP8 with ``--dequantize``: held against float64 numpy, and against transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fp8 import (
    FP8,
    NAME,
    SCALE,
    SHAPES,
    change,
    config,
    matrices,
    merge,
    quantised,
    spread,
    stored,
    values_of,
    write,
    write_fp8_pair,
)
from helpers import CONFIG, assert_refused, contents, read_tensors, run_cli, run_here
from helpers import write_checkpoint as write_any
from reference import Array, rounded, spacing
from test_families import PROMPT, load
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging


def check(out: torch.Tensor, old: Array, new: Array, alpha: float) -> None:
    """Equal to the float64 reference rounded once, but for 1e-3 of the elements by an ulp."""
    exact = new + alpha * (new - old)
    got = np.asarray(out.double().numpy())
    off = np.abs(got - rounded(exact, out.dtype))
    largest = np.maximum.reduce([np.abs(new), np.abs(alpha * (new - old)), np.abs(exact)])
    assert (off <= spacing(largest, out.dtype)).all()
    assert np.count_nonzero(off) <= max(1, off.size * 1e-3), np.count_nonzero(off) / off.size


@pytest.fixture(scope="module", params=["fp8+fp8", "bf16+fp8", "fp8+bf16"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pair of either kind on disk, and its two sides' tensors."""
    root = tmp_path_factory.mktemp("pair")
    first, second = request.param.split("+")
    old = matrices(0)
    new = {name: each + matrices(1)[name] * 0.1 for name, each in old.items()}
    sides = stored(old, first), stored(new, second, scales=torch.bfloat16)
    write(root / "original", sides[0], first, shards=2)
    write(root / "unlearned", sides[1], second, shards=3)
    return root, sides


@pytest.mark.parametrize("alpha", [-1, 0, 0.5, 2])
def test_equals_float64_rounded_once(pair: Any, alpha: float) -> None:
    root, (old, new) = pair
    out = read_tensors(merge(root, alpha, output=f"out{alpha}"))
    assert out.keys() == {*SHAPES, "model.norm.weight"}
    for name in out:
        assert out[name].dtype == torch.bfloat16
        check(out[name], values_of(old, name), values_of(new, name), alpha)
    settings = json.loads((root / f"out{alpha}" / "config.json").read_bytes())
    assert "quantization_config" not in settings
    assert settings.get("dtype", settings.get("torch_dtype")) == "bfloat16"


def test_float32_is_formed_in_float64(tmp_path: Path) -> None:
    old, new = write_fp8_pair(tmp_path)
    out = merge(tmp_path, 0.3, "--dtype", "float32")
    exact = values_of(new, NAME) + 0.3 * (values_of(new, NAME) - values_of(old, NAME))
    got = read_tensors(out)[NAME]
    assert np.array_equal(got.double().numpy(), rounded(exact, torch.float32))
    assert json.loads((out / "config.json").read_bytes())["torch_dtype"] == "float32"


def test_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    write_fp8_pair(tmp_path, SHAPES)
    found = []
    for threads in (1, 2, 3):
        out = contents(merge(tmp_path, 1.5, "--threads", threads, output=f"out{threads}"))
        found.append({name: out[name] for name in out if name.endswith(".safetensors")})
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 2


@pytest.mark.parametrize(
    ("said", "written"),
    [({"torch_dtype": "float16"}, torch.float16), ({}, torch.bfloat16)],
    ids=["float16", "not said"],
)
def test_output_dtype_is_what_the_config_says(
    tmp_path: Path, said: dict[str, object], written: torch.dtype
) -> None:
    for side in range(2):
        write_any(
            tmp_path / ("original", "unlearned")[side],
            stored(matrices(side, {NAME: (40, 50)}), "fp8"),
            config={**CONFIG, **said, "quantization_config": FP8},
        )
    out = merge(tmp_path, 1)
    assert read_tensors(out)[NAME].dtype == written
    settings = json.loads((out / "config.json").read_bytes())
    named = str(written).removeprefix("torch.")
    assert settings == {**CONFIG, "torch_dtype" if said else "dtype": named}


@pytest.mark.parametrize("block", [(64, 128), (1, 32), (512, 512)])
def test_other_block_sizes(tmp_path: Path, block: tuple[int, int]) -> None:
    shapes = {NAME: (200, 130)}
    sides = [stored(matrices(seed, shapes), "fp8", block) for seed in (0, 1)]
    for side, tensors in zip(("original", "unlearned"), sides, strict=True):
        settings = config({"weight_block_size": list(block)})
        write_any(tmp_path / side, tensors, config=settings)
    old, new = (values_of(tensors, NAME, block) for tensors in sides)
    check(read_tensors(merge(tmp_path, 0.5))[NAME], old, new, 0.5)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_for_the_whole_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    old, new = ({**each} for each in write_fp8_pair(tmp_path))
    new[SCALE] = torch.full(shape, 0.001)
    change(tmp_path, new, weight_block_size=None)
    values = new[NAME].double().numpy() * new[SCALE].double().numpy()
    check(read_tensors(merge(tmp_path, 1))[NAME], values_of(old, NAME), values, 1)


def test_experts_stored_fused(tmp_path: Path) -> None:
    name, shape = "model.layers.0.mlp.experts.gate_up_proj", (3, 130, 140)
    sides = []
    for seed, side in enumerate(("original", "unlearned")):
        rng = np.random.default_rng(seed)
        codes = torch.from_numpy(rng.normal(0, 50, shape)).to(torch.float8_e4m3fn)
        scales = torch.from_numpy(rng.uniform(1e-4, 1e-3, (3, 2, 2))).float()
        write(tmp_path / side, {name: codes, f"{name}_scale_inv": scales}, "fp8")
        experts = [codes[n].double().numpy() * spread(scales[n], shape[1:]) for n in range(3)]
        sides.append(np.stack(experts))
    out = read_tensors(merge(tmp_path, 0.5))
    assert list(out) == [name]
    check(out[name], sides[0], sides[1], 0.5)


def test_a_zero_scale_and_an_empty_tensor(tmp_path: Path) -> None:
    old, new = ({**each} for each in write_fp8_pair(tmp_path))
    empty = {"e.weight": torch.empty(0, 300), "e.weight_scale_inv": torch.empty(0, 3)}
    empty["e.weight"] = empty["e.weight"].to(torch.float8_e4m3fn)
    new[SCALE] = new[SCALE].clone()
    new[SCALE][0, 0] = 0
    write(tmp_path / "original", {**old, **empty}, "fp8", shards=2)
    change(tmp_path, {**new, **empty})
    out = read_tensors(merge(tmp_path, 1))
    check(out[NAME], values_of(old, NAME), values_of(new, NAME), 1)
    assert out["e.weight"].shape == (0, 300)


def test_the_plan_and_the_report_say_what_was_done(tmp_path: Path) -> None:
    _, new = write_fp8_pair(tmp_path)
    change(tmp_path, {**new, NAME.replace("weight", "activation_scale"): torch.tensor(0.5)})
    command = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 1, "--dequantize")
    said = [
        f"{tmp_path / 'original'}: 1 FP8 tensors are multiplied by their scales (--dequantize)",
        f"{tmp_path / 'unlearned'}: 1 FP8 tensors are multiplied by their scales (--dequantize)",
        f"{tmp_path / 'unlearned'}: left out 1 scales of activations",
    ]
    output = ("-o", tmp_path / "out", "--json")
    planned = json.loads(run_here(*command, *output, "--dry-run").out)
    assert planned["warnings"] == said
    assert planned["operations"].keys() == {"extrapolate"}
    assert json.loads(run_here(*command, *output).out)["warnings"] == said
    manifest = json.loads((tmp_path / "out" / "uipe_merge.json").read_bytes())
    assert manifest["command"].endswith(" --dequantize")
    assert read_tensors(tmp_path / "out").keys() == {NAME, "model.norm.weight"}
    assert run_here("verify", tmp_path / "out").code == 0


def test_inspect_measures_the_dequantised_update(tmp_path: Path) -> None:
    old, new = write_fp8_pair(tmp_path)
    command = ("inspect", tmp_path / "original", tmp_path / "unlearned", "--json")
    assert_refused(run_here(*command), 5, "--dequantize")
    result = run_here(*command, "--dequantize")
    assert result.code == 0, result
    found = json.loads(result.out)["tensors"][NAME]
    update = values_of(new, NAME) - values_of(old, NAME)
    assert found["norm"] == pytest.approx(float(np.linalg.norm(update)), rel=1e-5)
    ratio = np.linalg.norm(update) / np.linalg.norm(values_of(new, NAME))
    assert found["ratio"] == pytest.approx(float(ratio), rel=1e-5)


def write_adapter(path: Path, halves: dict[str, torch.Tensor], **settings: object) -> Path:
    """An adapter on the FP8 matrix."""
    module = f"base_model.model.{NAME.removesuffix('.weight')}"
    document = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings})
    tensors = {f"{module}.lora_{end}": half for end, half in halves.items()}
    write_any(path, tensors, config=None, files={"adapter_config.json": document})
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")
    return path


def test_dora_on_an_fp8_weight_is_refused(tmp_path: Path) -> None:
    write_fp8_pair(tmp_path)
    halves = {
        "A.weight": torch.ones(4, 130),
        "B.weight": torch.ones(256, 4),
        "magnitude_vector": torch.ones(256),
    }
    adapter = write_adapter(tmp_path / "adapter", halves, use_dora=True)
    command = (tmp_path / "original", adapter, "--alpha", 2, "-o", tmp_path / "out")
    assert_refused(run_here(*command, "--dequantize"), 5, NAME, "DoRA on an FP8 weight")


def test_an_adapter_on_an_fp8_model(tmp_path: Path) -> None:
    old, _ = write_fp8_pair(tmp_path)
    rng = np.random.default_rng(3)
    halves = {
        "A": torch.from_numpy(rng.normal(0, 0.05, (4, 130))).float(),
        "B": torch.from_numpy(rng.normal(0, 0.05, (256, 4))).float(),
    }
    factors = {f"{side}.weight": half for side, half in halves.items()}
    adapter = write_adapter(tmp_path / "adapter", factors)
    result = run_here(
        *(tmp_path / "original", adapter, "--alpha", 2, "-o", tmp_path / "out", "--dequantize")
    )
    assert result.code == 0, result
    base = values_of(old, NAME)
    update = 2 * halves["B"].double().numpy() @ halves["A"].double().numpy()
    check(read_tensors(tmp_path / "out")[NAME], base, base + update, 2)
    settings = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert "quantization_config" not in settings


@pytest.fixture
def _quiet() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def save_fp8(model: Any, path: Path) -> None:
    """Save a model as FP8 checkpoints are: every projection in FP8, the rest as it is."""
    model.save_pretrained(path)
    tensors = read_tensors(path)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        matrix = np.asarray(tensors[name].double().numpy())
        tensors[name], tensors[f"{name}_scale_inv"] = quantised(matrix)
    settings = json.loads((path / "config.json").read_bytes())
    quantisation = {**FP8, "activation_scheme": "dynamic"}
    write_any(path, tensors, config={**settings, "quantization_config": quantisation})


@pytest.mark.usefixtures("_quiet")
def test_agrees_with_transformers_and_loads_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).bfloat16()
    save_fp8(model, tmp_path / "original")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    save_fp8(model, tmp_path / "unlearned")

    # Without a GPU it dequantises: in float32, rounded to bfloat16.
    theirs = [
        AutoModelForCausalLM.from_pretrained(
            tmp_path / side, device_map="cpu", dtype=torch.bfloat16
        ).state_dict()
        for side in ("original", "unlearned")
    ]
    for alpha, wanted in ((-1, theirs[0]), (0, theirs[1])):
        ours = load(merge(tmp_path, alpha, output=f"out{alpha}")).state_dict()
        assert ours.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert ours[name].dtype == torch.bfloat16
            off = (ours[name].double() - tensor.double()).abs().numpy()
            assert (off <= spacing(tensor.double().numpy(), torch.bfloat16)).all(), name
            assert np.count_nonzero(off) <= 1e-3 * off.size, name

    merged = merge(tmp_path, 1)
    assert "quantization_config" not in json.loads((merged / "config.json").read_bytes())
    loaded = load(merged)
    tokens = loaded.generate(PROMPT, do_sample=False, max_new_tokens=5, pad_token_id=0)
    assert tokens.shape[1] > PROMPT.shape[1]
    assert torch.isfinite(loaded(PROMPT).logits).all()


def test_the_flag_changes_nothing_where_nothing_is_scaled(tmp_path: Path) -> None:
    for seed, side in enumerate(("original", "unlearned")):
        values = torch.from_numpy(matrices(seed, {NAME: (40, 50)})[NAME])
        tensors = {NAME: values.bfloat16(), "raw": values.to(torch.float8_e4m3fn)}
        write_any(tmp_path / side, tensors)
    command = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 1)
    for name, flag in (("one", ()), ("two", ("--dequantize",))):
        result = run_cli(*command, "-o", tmp_path / name, *flag)
        assert result.code == 0, result
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one["config.json"] == two["config.json"]
    assert one["model.safetensors"] == two["model.safetensors"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_a_config_without_a_dtype_gets_that_of_the_output(tmp_path: Path, dtype: str) -> None:
    write_fp8_pair(tmp_path)
    path = tmp_path / "unlearned" / "config.json"
    settings = json.loads(path.read_bytes())
    settings.pop("dtype", None)
    settings.pop("torch_dtype", None)
    path.write_text(json.dumps(settings))
    out = merge(tmp_path, 1, "--dtype", dtype)
    written = json.loads((out / "config.json").read_bytes())["dtype"]
    assert written == ("bfloat16" if dtype == "auto" else dtype)


def test_the_command_in_the_manifest_can_be_given_again(tmp_path: Path) -> None:
    for side in ("original", "unlearned"):
        write_any(
            tmp_path / side,
            {"a": torch.ones(2, 2).bfloat16()},
            config={**CONFIG, "quantization_config": {"quant_method": "fp8"}},
        )
    command = (tmp_path / "original", tmp_path / "unlearned", "--alpha", 1, "-o", tmp_path / "out")
    assert run_here(*command, "--dequantize").code == 0
    manifest = json.loads((tmp_path / "out" / "uipe_merge.json").read_bytes())
    assert manifest["command"].endswith(" --dequantize")


def test_nothing_is_left_to_chance_where_nothing_is_amplified(tmp_path: Path) -> None:
    write_fp8_pair(tmp_path)
    nearest = read_tensors(merge(tmp_path, 0))
    chance = read_tensors(merge(tmp_path, 0, "--rounding", "stochastic", output="chance"))
    assert all(torch.equal(nearest[name], chance[name]) for name in nearest)
