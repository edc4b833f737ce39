"""The model type ``uipe`` in the real lm_eval: its answers are those of the written model."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import Result, assert_refused, bits, run_cli, run_here
from hub_server import served
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import uipe_merge
from uipe_merge import UipeMergeError, UsageError

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("accelerate") is None,
    reason="lm_eval is not installed: pip install 'uipe-merge[lm-eval]'",
)

WORDS = ["question", "answer", "yes", "no", *"abcdefgh", ":", "?"]
TASKS = ["uipe_choice", "uipe_text"]
TASK = """\
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
doc_to_text: "question : {{{{q}}}} ? answer :"
"""
CHOICE = 'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
TEXT = """\
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["?"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


class World(NamedTuple):
    """A tiny pair whose tokenizers differ, and two tasks on local data."""

    root: Path
    original: Path
    unlearned: Path
    tasks: Path

    @property
    def arguments(self) -> str:
        return f"original={self.original},unlearned={self.unlearned}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    made = World(root, root / "base", root / "unlearned", root / "tasks")
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers_logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).bfloat16()
        _save(model, WORDS[::-1], made.original)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        _save(model, WORDS, made.unlearned)
    made.tasks.mkdir()
    letters = "abcdefgh"
    documents = [
        {
            "q": f"{letters[n % 8]} {letters[(3 * n + 1) % 8]}",
            "choices": ["yes", "no", "a b"],
            "gold": n % 3,
        }
        for n in range(6)
    ]
    data = made.tasks / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = TASK.format(data=data, cache=root / "datasets")
    for name, kind, rest in zip(
        TASKS, ("multiple_choice", "generate_until"), (CHOICE, TEXT), strict=True
    ):
        (made.tasks / f"{name}.yaml").write_text(f"task: {name}\noutput_type: {kind}\n{task}{rest}")
    return made


def _save(model: Any, words: list[str], path: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - nobody's password
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",  # noqa: S106 - nobody's password
        eos_token="</s>",  # noqa: S106 - nor this one
        unk_token="<unk>",  # noqa: S106 - nor this one
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def evaluated(world: World, model: str, arguments: str, **options: Any) -> Any:
    """What lm_eval says of a model, in this process."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import uipe_merge.integrations.lm_eval  # noqa: F401 - registers the model type

    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(world.tasks), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        **options,
    )


def written(world: World, name: str, **options: Any) -> Path:
    """What ``merge`` writes."""
    out = world.root / name
    uipe_merge.merge(world.original, world.unlearned, out, **options, progress=False)
    return out


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours["results"] == theirs["results"]
    for task in TASKS:
        found = [
            [
                (each["doc_id"], each["resps"], each["filtered_resps"])
                for each in run["samples"][task]
            ]
            for run in (ours, theirs)
        ]
        assert found[0] == found[1]
        assert len(found[0]) == 6


@needs_lm_eval
class TestAnswers:
    def test_those_of_the_written_model(self, world: World) -> None:
        said = f"{world.arguments},alpha='0.3',dtype=float32"
        merged = written(world, "float32", alpha=0.3, dtype="float32")
        ours = evaluated(world, "uipe", said)
        theirs = evaluated(world, "hf", f"pretrained={merged}")
        assert_same(ours, theirs)
        for field in ("model_num_parameters", "model_dtype"):
            assert ours["config"][field] == theirs["config"][field]
        assert ours["config"]["model_args"] == said
        assert ours["config"]["original"] == str(world.original)
        assert ours["config"]["unlearned"] == str(world.unlearned)
        assert ours["config"]["alpha"] == 0.3

    @pytest.mark.parametrize(
        "options",
        [
            {"alpha": -1},
            {"alpha": "1.5"},
            {"alpha": 0.3, "rounding": "stochastic", "seed": 7},
            {"alpha": 2.0, "dtype": "float16", "threads": 2},
        ],
    )
    def test_the_very_parameters(self, world: World, tmp_path: Path, options: Any) -> None:
        from uipe_merge.integrations.lm_eval import UipeLM

        model = UipeLM(world.original, str(world.unlearned), device="cpu", **options).model
        options = {**options, "alpha": float(options["alpha"])}
        uipe_merge.merge(
            world.original, world.unlearned, tmp_path / "out", **options, progress=False
        )
        wanted = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert model.state_dict().keys() == wanted.keys()
        for name, tensor in model.state_dict().items():
            assert np.array_equal(bits(tensor), bits(wanted[name])), name

    def test_a_recipe_and_options_of_lm_eval(self, world: World) -> None:
        recipe = world.root / "recipe.yaml"
        recipe.write_text("alpha: 1\nalpha_rules:\n  - {match: '*mlp*', alpha: 3}\n")
        merged = written(world, "by-recipe", recipe=recipe)
        more = "max_length=12,add_bos_token=True,attn_implementation=eager"
        ours = evaluated(world, "uipe", f"{world.arguments},recipe={recipe},{more}", batch_size=4)
        theirs = evaluated(world, "hf", f"pretrained={merged},{more}", batch_size=4)
        assert_same(ours, theirs)
        assert ours["config"]["recipe"] == "--alpha 1 --alpha-rule '*mlp*=3'"
        assert ours["config"]["batch_size"] == 4

    def test_a_model_that_is_moved_where_it_lies(self, world: World) -> None:
        from uipe_merge.integrations.lm_eval import UipeLM

        model = UipeLM(world.original, world.unlearned, 1, device="cpu")
        assert model.tokenizer.name_or_path == str(world.unlearned)
        assert model.tokenizer.convert_tokens_to_ids("question") == 3
        before = evaluated(world, model, "")
        model.model.set_alpha(2)
        after = evaluated(world, model, "")
        assert (before["config"]["alpha"], after["config"]["alpha"]) == (1, 2)
        assert before["samples"] != after["samples"]


def as_text(answers: Any) -> Any:
    """Answers as in memory or in a file, where every tuple is a list and every leaf a text."""
    return (
        [as_text(each) for each in answers] if isinstance(answers, list | tuple) else str(answers)
    )


@needs_lm_eval
@pytest.mark.timeout(600)  # ten seconds of processor, most of it lm_eval reading all its tasks
def test_the_program_on_a_hub(world: World, tmp_path: Path) -> None:
    merged = written(world, "for-the-hub", alpha=2.0)
    out = tmp_path / "results"
    with served() as hub:
        commits = [hub.push(f"org/{path.name}", path) for path in (world.original, world.unlearned)]
        finished = run_cli(
            *("lm-eval", "--model", "uipe", "--tasks", ",".join(TASKS), "--device", "cpu"),
            *("--model_args", "original=org/base,unlearned=org/unlearned,alpha=2"),
            *("--include_path", world.tasks, "--output_path", out, "--log_samples"),
            cwd=tmp_path,
            env={
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_DATASETS_OFFLINE": "1",
            },
            timeout=560,
        )
    assert finished.code == 0, finished.err
    assert "uipe_choice" in finished.out
    theirs = evaluated(world, "hf", f"pretrained={merged}")
    place = out / "uipe-base-unlearned-alpha-2"
    results = json.loads(next(place.glob("results_*.json")).read_text())
    for task in TASKS:
        lines = next(place.glob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        ours = [json.loads(line) for line in lines]
        assert [each["doc_hash"] for each in ours] == [
            each["doc_hash"] for each in theirs["samples"][task]
        ]
        for field in ("resps", "filtered_resps"):
            found, wanted = (
                [each[field] for each in run] for run in (ours, theirs["samples"][task])
            )
            assert as_text(found) == as_text(wanted)
        metric = "acc,none" if task == "uipe_choice" else "exact_match,none"
        assert results["results"][task][metric] == theirs["results"][task][metric]
    config = results["config"]
    assert results["model_name"] == config["model_args"]["model"] == place.name
    assert config["original"] == f"org/base@{commits[0]}"
    assert config["unlearned"] == f"org/unlearned@{commits[1]}"
    assert config["model_sha"] == commits[1]
    assert config["alpha"] == config["model_args"]["alpha"] == 2


def asked(*more: object) -> Result:
    return run_here("lm-eval", "--model", "uipe", "--device", "cpu", *more)


@needs_lm_eval
@pytest.mark.parametrize(
    ("said", "code", "fragments"),
    [
        ("", 2, ["no alpha", "alpha=2"]),
        ("alpha=two", 3, ["alpha is 'two'", "alpha=2"]),
        ("alpha=true", 3, ["alpha is True"]),
        ("alpha=nan", 3, ["alpha is nan"]),
        ("alpha=1e30", 7, ["so large"]),
        ("alpah=2", 2, ["takes no alpah", "did you mean alpha?"]),
        ("alpha=1,recipe=none.yaml", 2, ["a recipe says all of it"]),
        ("recipe=none.yaml", 2, ["none.yaml"]),
        ("alpha=1,dtype=int8", 2, ["unknown dtype 'int8'"]),
        ("alpha=1,dtype=16", 2, ["dtype is 16"]),
        ("alpha=1,seed=many", 2, ["seed is 'many'", "whole number"]),
        ("alpha=1,allow_pickle=1", 2, ["allow_pickle is 1", "true or false"]),
        ("alpha=1,pretrained=gpt2", 2, ["takes no pretrained", "original=DIR"]),
        ("alpha=1,revision=v2", 2, ["takes no revision", "ORG/NAME@REVISION"]),
        ("alpha=1,parallelize=True", 2, ["takes no parallelize", "--model hf"]),
        ("alpha=1,trust_remote_code=True", 2, ["takes no trust_remote_code", "never run"]),
        ("alpha=1,tokenizer=./nowhere", 5, ["./nowhere", "tokenizer"]),
        ("alpha=1,original=2024", 2, ["original is 2024; write a path as ./2024"]),
        ("alpha=1,original=./nowhere", 2, ["nowhere: no such directory"]),
        ("alpha=1,original=None", 2, ["needs two checkpoints"]),
        ("alpha=1,attn_implementation=guess", 5, ["cannot make the model", "guess"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    world: World, said: str, code: int, fragments: list[str]
) -> None:
    from lm_eval.utils import simple_parse_args_string

    from uipe_merge.integrations.lm_eval import UipeLM

    arguments = simple_parse_args_string(f"{world.arguments},{said}")
    with pytest.raises(UipeMergeError) as caught:
        UipeLM(**{**arguments, "device": "cpu"})
    assert caught.value.exit_code == code
    assert "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in fragments), str(caught.value)


@needs_lm_eval
def test_an_unusable_device(world: World) -> None:
    from uipe_merge.integrations.lm_eval import UipeLM

    if torch.cuda.is_available():
        pytest.skip("this machine has what it is to lack")
    with pytest.raises(UsageError, match="cannot go to cuda"):
        UipeLM(world.original, world.unlearned, 1, device="cuda")


@needs_lm_eval
def test_the_command_has_the_exit_codes_of_merge(world: World) -> None:
    arguments = f"original={world.original},unlearned={world.unlearned},alpha=two"
    more = ("--tasks", TASKS[0], "--include_path", world.tasks)
    result = asked("--model_args", arguments, *more)
    assert result.code == 3
    errors = [line for line in result.err.splitlines() if "error" in line.lower()]
    assert errors == ["error: alpha is 'two'; give a number, for example alpha=2"]
    assert "Traceback" not in result.err


@needs_lm_eval
def test_errors_of_lm_eval_are_its_own(world: World) -> None:
    usage = run_here("lm-eval", "run", "--no-such-option")
    assert usage.code == 2
    assert "lm-eval: error: unrecognized arguments" in usage.err
    wrong = asked("--model_args", "original,unlearned", "--tasks", "mmlu")
    assert wrong.code == 2
    assert "expected `key=value`" in wrong.err
    failing = asked("--tasks", "mmlu", "--config", world.root / "none.yaml")
    assert failing.code == 1
    assert "Traceback" in failing.err
    assert "error: lm_eval stopped: Config file not found" in failing.err
    assert "bug in uipe-merge" not in failing.err


@needs_lm_eval
def test_a_name_fits_a_directory() -> None:
    from uipe_merge.integrations.lm_eval_arguments import name_of

    long = {"original": "a/" + "α" * 300, "unlearned": "s3://c/d", "recipe": "x/steps.yaml"}
    assert name_of(long) == f"uipe-{'α' * 30}-d-steps.yaml"
    assert (
        name_of({"original": ".", "unlearned": "u", "alpha": 0.5})
        == f"uipe-{Path.cwd().name}-u-alpha-0.5"
    )


def test_without_the_extra_it_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run_here("lm-eval", "--model", "uipe", "--tasks", "mmlu")
    assert_refused(result, 2, "lm_eval", "pip install 'uipe-merge[lm-eval]'")


def test_help_is_ours_and_needs_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for words in ((), ("--help",), ("-h",)):
        result = run_here("lm-eval", *words)
        assert result.code == 0
        assert "original=DIR,unlearned=DIR,alpha=2" in result.out
