"""``--as adapter``: the extrapolated adapter, held against peft and against the whole model."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import refuse
from fakes_output import FailingFileSystem
from helpers import contents, read_tensors, run_cli, run_here, write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import uipe_merge
from uipe_merge import api, running
from uipe_merge.errors import OutputError
from uipe_merge.executors import Serial
from uipe_merge.output.filesystem import FileSystem, LocalFileSystem
from uipe_merge.progress import Silent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TOKENS = torch.arange(48).reshape(4, 12) % 40
PLAIN = {"target_modules": ["q_proj", "down_proj"]}


def llama() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    )


def train(model: Any, path: Path, **options: Any) -> Path:
    """Train an adapter on a model for a few steps and save it."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    parameters = [each for each in wrapped.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(4):
        loss = wrapped(input_ids=TOKENS, labels=TOKENS).loss
        optimiser.zero_grad()
        (-loss).backward()  # gradient ascent: this is an unlearned model
        optimiser.step()
    wrapped.save_pretrained(str(path))
    return path


def convert(adapter: Path, dtype: torch.dtype) -> None:
    """Store the factors of an adapter in another dtype."""
    file = adapter / WEIGHTS
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def merged(kind: Any, base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """The weights that peft makes of a model and adapters on it, in float64."""
    model = kind.from_pretrained(base, dtype=torch.float64)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).to(torch.float64).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def check(
    found: dict[str, torch.Tensor],
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
    alpha: float,
    eps: float,
) -> int:
    """Hold weights against θ₀ + (1+α)·(θᵤ − θ₀) in float64; return how many tensors moved."""
    moved = 0
    for name, tensor in found.items():
        update = (1 + alpha) * (after[name] - before[name])
        moved += bool(update.any())
        # A tensor that is stored whole is rounded as a whole, a product with its factor.
        size = update.abs().max() + (after[name].abs().max() if update.any() else 0)
        error = (tensor - before[name] - update).abs().max()
        assert error <= 2 * eps * size + 1e-14, (name, float(error), float(size))
    return moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("make", "kind", "options", "moved"),
    [
        pytest.param(llama, LlamaForCausalLM, PLAIN, 4, id="Linear"),
        pytest.param(
            llama,
            LlamaForCausalLM,
            {
                "target_modules": ["q_proj", "v_proj"],
                "use_rslora": True,
                "rank_pattern": {"layers.0.self_attn.q_proj": 2},
                "alpha_pattern": {"v_proj": 32},
            },
            4,
            id="rsLoRA, rank and alpha patterns",
        ),
        pytest.param(
            llama,
            LlamaForCausalLM,
            {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
            4,
            id="embedding and modules_to_save",
        ),
        pytest.param(
            gpt2,
            GPT2LMHeadModel,
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
            6,
            id="Conv1D",
        ),
        pytest.param(
            gpt2,
            GPT2LMHeadModel,
            {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
            4,
            id="lora_bias",
        ),
        pytest.param(
            gpt2,
            GPT2LMHeadModel,
            {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"},
            4,
            id="trained biases",
        ),
    ],
)
@pytest.mark.parametrize("alpha", [1.3, -0.4])
def test_peft_makes_the_extrapolated_model_of_it(
    tmp_path: Path,
    make: Callable[[], Any],
    kind: Any,
    options: dict[str, Any],
    moved: int,
    dtype: torch.dtype,
    alpha: float,
) -> None:
    torch.manual_seed(0)
    base, out = tmp_path / "base", tmp_path / "out"
    model = make()
    model.save_pretrained(base)
    adapter = train(model, tmp_path / "adapter", **options)
    convert(adapter, dtype)
    command = [base, adapter, "--alpha", alpha]
    result = run_here(*command, "--as", "adapter", "-o", out)
    assert result.code == 0, result.err

    before, after = merged(kind, base), merged(kind, base, adapter)
    eps = torch.finfo(dtype).eps
    assert check(merged(kind, base, out), before, after, alpha, eps) == moved
    stored, written = read_tensors(adapter), read_tensors(out)
    assert {name: (each.shape, each.dtype) for name, each in written.items()} == {
        name: (each.shape, each.dtype) for name, each in stored.items()
    }

    assert run_here(*command, "-o", tmp_path / "whole").code == 0
    whole = kind.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    light = kind.from_pretrained(base, dtype=torch.float64)
    light = PeftModel.from_pretrained(light, str(out)).to(torch.float64)
    with torch.no_grad():
        one, two = whole(input_ids=TOKENS).logits, light(input_ids=TOKENS).logits
    assert float((one - two).norm() / one.norm()) <= 4 * eps


class Family:
    """A base and a plain adapter on it, with the files that stand beside adapters."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(0)
        model = llama()
        self.root, self.base = root, root / "base"
        model.save_pretrained(self.base)
        self.adapter = train(model, root / "adapter", **PLAIN)
        (self.adapter / "tokenizer.json").write_text("{}\n")
        (self.adapter / "chat_template.jinja").write_text("{{ messages }}\n")
        (self.adapter / "README.md").write_text("---\nlicense: mit\n---\n# An adapter\n")
        (self.adapter / "optimizer.pt").write_bytes(b"left behind by a trainer")
        self.out = root / "out"

    def command(self, alpha: float = 2, *more: object) -> tuple[object, ...]:
        return (self.base, self.adapter, "--alpha", alpha, "--as", "adapter", "-o", self.out, *more)

    def rewrite(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """Change the adapter's tensors."""
        tensors = load_file(self.adapter / WEIGHTS)
        changed = {name: change(name, tensor) for name, tensor in tensors.items()}
        save_file(changed, self.adapter / WEIGHTS, metadata={"format": "pt"})

    def configure(self, **changes: object) -> None:
        """Change the adapter's config."""
        config = json.loads((self.adapter / CONFIG).read_text())
        (self.adapter / CONFIG).write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("made"))


@pytest.fixture
def family(made: Family, tmp_path: Path) -> Family:
    """A copy of the family that a test may change."""
    shutil.copytree(made.root, tmp_path, dirs_exist_ok=True)
    copy = Family.__new__(Family)
    copy.root, copy.base, copy.adapter = tmp_path, tmp_path / "base", tmp_path / "adapter"
    copy.out = tmp_path / "out"
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("alpha", [1.3, -2.6])
def test_b_is_scaled_and_rounded_once_and_a_is_left(
    family: Family, dtype: torch.dtype, alpha: float
) -> None:
    family.rewrite(lambda _, tensor: tensor.to(dtype))
    assert run_here(*family.command(alpha)).code == 0
    stored, written = read_tensors(family.adapter), read_tensors(family.out)
    for name, tensor in stored.items():
        if "lora_A" in name:
            assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8)), name
            continue
        expected = (1 + alpha) * tensor.double()
        error = (written[name].double() - expected).abs()
        # Half a unit in the last place, and what a second rounding in the wider type adds.
        assert bool((error <= expected.abs() * torch.finfo(dtype).eps * 0.5001 + 1e-8).all()), name
    record = json.loads((family.out / "uipe_merge.json").read_text())["tensors"]
    for name, tensor in stored.items():
        assert record[name]["operation"] == ("copy" if "lora_A" in name else "extrapolate")
        if "lora_B" in name:
            assert record[name]["norm"] == pytest.approx(float(tensor.double().norm()), rel=1e-5)
            assert record[name]["effective_alpha"] == pytest.approx(alpha, rel=1e-2)


def test_alpha_0_is_the_adapter_and_minus_1_adds_nothing(family: Family) -> None:
    stored = load_file(family.adapter / WEIGHTS)
    for alpha in (0, -1):
        assert run_here(*family.command(alpha, "--overwrite")).code == 0
        written = load_file(family.out / WEIGHTS)
        assert list(written) == list(stored)
        for name, tensor in stored.items():
            zero = alpha == -1 and "lora_B" in name
            assert torch.equal(written[name], torch.zeros_like(tensor) if zero else tensor)


def test_alpha_minus_1_gives_saved_modules_the_bytes_of_the_original(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapter = train(model, tmp_path / "adapter", **PLAIN, modules_to_save=["lm_head"])
    command = [tmp_path / "base", adapter, "--as", "adapter", "-o", tmp_path / "out"]
    assert run_here(*command, "--alpha", -1).code == 0
    head = load_file(tmp_path / "out" / WEIGHTS)["base_model.model.lm_head.weight"]
    assert torch.equal(head, read_tensors(tmp_path / "base")["lm_head.weight"])


def test_the_output_is_a_plain_adapter_with_the_files_of_the_adapter(family: Family) -> None:
    assert run_here(*family.command()).code == 0
    assert sorted(contents(family.out)) == [
        "README.md",
        "README.unlearned.md",
        CONFIG,
        WEIGHTS,
        "chat_template.jinja",
        "tokenizer.json",
        "uipe_merge.json",
    ]
    with safe_open(family.out / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in file.keys())  # noqa: SIM118
    result = run_here("verify", family.out)
    assert result.code == 0
    assert "all as written" in result.out
    (family.out / WEIGHTS).write_bytes(b"")
    assert run_here("verify", family.out).code == 4


def test_the_config_is_the_adapters_but_for_what_must_change(family: Family) -> None:
    family.configure(inference_mode=True, base_model_name_or_path="org/base")
    assert run_here(*family.command()).code == 0
    stored = (family.adapter / CONFIG).read_bytes()
    assert (family.out / CONFIG).read_bytes() == stored

    family.configure(inference_mode=False, base_model_name_or_path=None)
    before = json.loads((family.adapter / CONFIG).read_text())
    assert run_here(*family.command(2, "--overwrite")).code == 0
    after = json.loads((family.out / CONFIG).read_text())
    changed = {"inference_mode": True, "base_model_name_or_path": str(family.base)}
    assert after == before | changed
    assert list(after) == list(before)


def test_the_card_names_base_library_and_the_command(family: Family) -> None:
    import yaml

    assert run_here(*family.command(1.5, "--dtype", "float16")).code == 0
    _, front, text = (family.out / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == ["base"]
    assert metadata["base_model_relation"] == "adapter"
    assert metadata["library_name"] == "peft"
    assert metadata["license"] == "mit"
    first = contents(family.out)
    assert {tensor.dtype for tensor in read_tensors(family.out).values()} == {torch.float16}
    (line,) = [line for line in text.splitlines() if line.startswith("uipe-merge ")]
    assert run_here(*shlex.split(line)[1:], "--overwrite").code == 0
    assert contents(family.out) == first
    manifest = json.loads(first["uipe_merge.json"])
    assert manifest["recipe"]["as"] == "adapter"
    assert manifest["rule"].startswith("theta_0 + (1 + alpha) * c * B * A")


def test_dry_run_and_json(family: Family) -> None:
    result = run_here(*family.command(2, "--dry-run", "--json"))
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["operations"]["extrapolate"]["tensors"] == 4
    assert found["operations"]["copy"]["tensors"] == 4
    assert found["shards"] == 1
    stored = load_file(family.adapter / WEIGHTS).values()
    assert found["read_bytes"] == sum(tensor.nbytes for tensor in stored)
    assert not family.out.exists()
    result = run_here(*family.command(2, "--json"))
    assert json.loads(result.out)["summary"]["effective_alpha"] == pytest.approx(2)


def test_model_plus_adapter_is_the_adapter_where_the_model_is_the_original(
    family: Family,
) -> None:
    assert run_here(*family.command()).code == 0
    (family.root / "link").symlink_to(family.base)  # another name for the same place
    both = f"{family.root / 'link'}+{family.adapter}"
    other = family.root / "other"
    command = [family.base, both, "--alpha", 2, "--as", "adapter", "-o", other]
    assert run_here(*command).code == 0
    assert (other / WEIGHTS).read_bytes() == (family.out / WEIGHTS).read_bytes()


def test_an_adapter_on_a_model_with_an_adapter(family: Family) -> None:
    base = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(family.base), str(family.adapter)
    ).merge_and_unload()
    second = train(base, family.root / "second", target_modules=["q_proj", "up_proj"])
    original = f"{family.base}+{family.adapter}"
    command = [original, second, "--alpha", 1.3, "--as", "adapter", "-o", family.out]
    assert run_here(*command).code == 0
    before = merged(LlamaForCausalLM, family.base, family.adapter)
    after = merged(LlamaForCausalLM, family.base, family.adapter, second)
    found = merged(LlamaForCausalLM, family.base, family.adapter, family.out)
    assert check(found, before, after, 1.3, torch.finfo(torch.float32).eps) == 4


def test_a_pickled_adapter(family: Family) -> None:
    assert run_here(*family.command()).code == 0
    expected = load_file(family.out / WEIGHTS)
    torch.save(load_file(family.adapter / WEIGHTS), family.adapter / "adapter_model.bin")
    (family.adapter / WEIGHTS).unlink()
    refuse(family.root, 6, "--allow-pickle", arguments=family.command(2, "--overwrite"))
    assert run_here(*family.command(2, "--allow-pickle", "--overwrite")).code == 0
    found = load_file(family.out / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_from_python(family: Family) -> None:
    paths = (family.base, family.adapter, family.out)
    report = uipe_merge.merge(*paths, alpha=2, as_="adapter", progress=False)
    assert report.written == (family.out / WEIGHTS).stat().st_size
    assert list(report.tensors) == list(load_file(family.adapter / WEIGHTS))


def test_a_run_that_died_anywhere_is_finished_by_the_same_command(family: Family) -> None:
    def run(filesystem: FileSystem) -> None:
        paths = (family.base, family.adapter, family.out)
        running.run(api.plan(*paths, alpha=2, as_="adapter"), Serial(), filesystem, Silent())

    undisturbed = FailingFileSystem(family.root)
    run(undisturbed)
    expected = contents(family.out)
    shutil.rmtree(family.out)
    published = [call.name for call in undisturbed.calls].index("rename", 8)
    kept = 0
    for fault in range(1, len(undisturbed.calls) + 1, 3):
        with pytest.raises(OutputError):
            run(FailingFileSystem(family.root, fault, manner="onwards"))
        partial = family.root / ".out.uipe-partial"
        kept += (partial / "model" / WEIGHTS).exists()
        if family.out.exists() and not (partial / "journal").exists():
            assert fault > published  # only the clean-up was cut short
        else:
            run(LocalFileSystem())
        assert contents(family.out) == expected
        assert not (partial / "model").exists()
        shutil.rmtree(family.out)
        shutil.rmtree(partial, ignore_errors=True)
    assert kept


# ---------------------------------------------------------------- refusals


def test_hazard_a_whole_model_has_no_factors(family: Family) -> None:
    arguments = (family.base, family.base, "--alpha", 1, "--as", "adapter", "-o", family.out)
    refuse(family.root, 5, str(family.base), "whole model", "--as model", arguments=arguments)


def test_hazard_an_adapter_on_another_model_than_original(family: Family) -> None:
    shutil.copytree(family.base, family.root / "copy")
    unlearned = f"{family.root / 'copy'}+{family.adapter}"
    arguments = (family.base, unlearned, "--alpha", 1, "--as", "adapter", "-o", family.out)
    refuse(family.root, 5, str(family.adapter), "before the +", arguments=arguments)


def test_hazard_dora_is_not_linear(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    adapter = train(model, tmp_path / "adapter", **PLAIN, use_dora=True)
    arguments = (tmp_path / "base", adapter, "--alpha", 1, "--as", "adapter", "-o", "out")
    refuse(tmp_path, 5, str(adapter), "dora", arguments=arguments)


def test_options_that_make_no_sense(family: Family) -> None:
    refuse(family.root, 2, "one file", arguments=family.command(1, "--max-shard-size", "1GB"))
    arguments = (*family.command(), "--as", "delta")
    refuse(family.root, 2, "'delta'", "'model', 'adapter'", arguments=arguments)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_hazard_a_factor_that_is_not_finite(family: Family, half: str) -> None:
    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if half in name:
            tensor[1, 1] = float("nan")
        return tensor

    family.rewrite(spoil)
    result = run_here(*family.command())
    assert result.code == 7
    assert f"{half}.weight" in result.err
    assert WEIGHTS in result.err
    assert not family.out.exists()


def test_hazard_a_factor_that_overflows(family: Family) -> None:
    family.rewrite(lambda _, tensor: (tensor / tensor.abs().max() * 40_000).half())
    result = run_cli(*family.command(1))
    assert result.code == 7
    assert "do not fit into F16" in result.err
    assert "lora_B" in result.err
    assert not family.out.exists()


def test_rules_name_the_tensors_of_the_model(tmp_path: Path) -> None:
    model = llama()
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapter = train(model, tmp_path / "adapter", **PLAIN)
    out = tmp_path / "out"
    rule = ("--alpha", 2, "--alpha-rule", "*.q_proj.*=0", "--alpha-layers", "0=-1,1=3")
    result = run_here(base, adapter, *rule, "--as", "adapter", "-o", out)
    assert result.code == 0, result
    before, after = load_file(adapter / WEIGHTS), load_file(out / WEIGHTS)
    scales = {"layers.0.mlp": 0.0, "layers.1.mlp": 4.0, "q_proj": 1.0}
    for name, tensor in after.items():
        scale = next(value for key, value in scales.items() if key in name)
        assert torch.equal(tensor, before[name] * (scale if "lora_B" in name else 1)), name


def test_dora_is_no_multiple_of_its_factor(tmp_path: Path) -> None:
    model = llama()
    base = tmp_path / "base"
    model.save_pretrained(base)
    adapter = train(model, tmp_path / "adapter", **PLAIN, use_dora=True)
    arguments = (base, adapter, "--alpha", 2, "-o", tmp_path / "out")
    refuse(tmp_path, 5, "is DoRA", "--as model", arguments=(*arguments, "--as", "adapter"))
    assert run_here(*arguments).code == 0


def test_a_tensor_that_is_stored_whole_under_the_name_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.model.layers.0.mlp.experts"
    gate = load_file(tmp_path / "base" / "model.safetensors")[
        "model.layers.0.block_sparse_moe.gate.weight"
    ]
    tensors = {
        f"{name}.lora_A.weight": torch.ones(3 * 2, 24),
        f"{name}.lora_B.weight": torch.ones(16, 3 * 2),
        "base_model.model.model.layers.0.mlp.gate.weight": gate + 1,
    }
    save_file(tensors, adapter / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["gate"]}
    settings["target_parameters"] = ["experts.down_proj"]
    (adapter / CONFIG).write_text(json.dumps(settings))
    command = (tmp_path / "base", adapter, "--alpha", 2, "-o", tmp_path / "out")
    result = run_here(*command, "--as", "adapter")
    assert result.code == 0, result
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.allclose(found["base_model.model.model.layers.0.mlp.gate.weight"], gate + 3)
    assert torch.equal(found[f"{name}.lora_B.weight"], torch.full((16, 6), 3.0))


def test_two_alphas_for_a_tied_head_are_refused_here_too(tmp_path: Path) -> None:
    base = tmp_path / "base"
    names = ("model.embed_tokens.weight", "lm_head.weight")
    write_checkpoint(
        base, {name: torch.ones(4, 2) for name in names}, config={"tie_word_embeddings": True}
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(
        {f"base_model.model.{name}": torch.ones(4, 2) * 2 for name in names}, adapter / WEIGHTS
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["lm_head"]}
    (adapter / CONFIG).write_text(json.dumps(settings))
    rule = ("--alpha", 1, "--alpha-rule", "lm_head*=2")
    for form in ("model", "adapter"):
        arguments = (base, adapter, *rule, "-o", tmp_path / "out", "--as", form)
        refuse(tmp_path, 3, "are tied", arguments=arguments)
