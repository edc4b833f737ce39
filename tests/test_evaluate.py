"""The evaluation of a model: against one question at a time in float64, and as a command."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer
from helpers import Result, assert_refused, run_here
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from uipe_merge.cli import evaluate as command
from uipe_merge.errors import UsageError
from uipe_merge.study import evaluate as study
from uipe_merge.study import metrics
from uipe_merge.study.evaluate import evaluate, reference_truth_ratios
from uipe_merge.study.prompts import Prompts
from uipe_merge.study.questions import Question, read
from uipe_merge.study.scores import Evaluation

TOFU = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "tofu"
PEOPLE = ("Alice", "Bob", "Carol", "Dave Miller", "Erin O'Neil", "Frank")
PLACES = ("Paris", "Rome", "Oslo", "Buenos Aires", "Ulan Bator", "Lima")

FORGET = [
    Question(
        f"Where does {person} live, and why there of all places?"[: 30 + 4 * number],
        f"{person} lives in {place}{' for the weather' * (number % 3)}.",
        tuple(f"The home of {person} is {wrong}." for wrong in PLACES[number + 1 :] or ("Bonn",)),
        f"The home of {person} is {place}.",
    )
    for number, (person, place) in enumerate(zip(PEOPLE, PLACES, strict=True))
]
RETAIN = [replace(question, answer=question.answer[::-1]) for question in FORGET[1:]]
FACTS = [Question(f"What is {n} and {n}?", str(2 * n), (str(n), "ten")) for n in range(3)]
UTILITY = {"real_authors": FACTS[:2], "world_facts": FACTS}
SPLITS: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "utility": UTILITY}

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: spaces are drawn into words, as in most models."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for q in FORGET for text in (q.question, q.answer, *q.perturbed_answers)]
    inner.train_from_iterator([*texts, "Question: x\nAnswer: y"] * 3, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",  # noqa: S106 - a token of the vocabulary
        eos_token="</s>",  # noqa: S106 - a token of the vocabulary
    )


def make_llama() -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,  # of the usual one every token is equally likely
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def make_gpt2() -> Any:
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=400,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module", params=[make_llama, make_gpt2], ids=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="module")
def llama() -> Any:
    return make_llama()


def run(model: Any, tokenizer: Any, **options: Any) -> Evaluation:
    merged: dict[str, Any] = {"device": "cpu", "max_new_tokens": 12, **SPLITS, **options}
    return evaluate(model, tokenizer, **merged)


def naive_loss(
    model: Any, tokenizer: Any, question: str, answer: str, template: str = "Question: {}\nAnswer:"
) -> float:
    """The mean loss of the tokens that reach beyond the prompt, and of the end, in float64."""
    prompt = template.format(question)
    encoded = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    first = next(at for at, (_, end) in enumerate(encoded["offset_mapping"]) if end > len(prompt))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    logs = torch.log_softmax(logits.double(), -1)
    losses = [-float(logs[at - 1, ids[at]]) for at in range(first, len(ids))]
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def precise(model: Any) -> Any:
    copied = type(model)(model.config).double()
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def test_losses_are_those_of_one_question_at_a_time(
    model: Any, precise: Any, tokenizer: Any
) -> None:
    found = run(model, tokenizer)
    for name, questions in (("forget", FORGET), ("retain", RETAIN), *UTILITY.items()):
        split = found.splits[name]
        wanted = [naive_loss(precise, tokenizer, q.question, q.answer) for q in questions]
        assert split.losses == pytest.approx(wanted, abs=1e-5)
        assert np.std(wanted) > 0.05
        for at, question in enumerate(questions):
            right = question.paraphrased_answer or question.answer
            wrong = [
                naive_loss(precise, tokenizer, question.question, text)
                for text in question.perturbed_answers
            ]
            ratio = math.exp(
                sum(wrong) / len(wrong) - naive_loss(precise, tokenizer, question.question, right)
            )
            assert split.truth_ratios[at] == pytest.approx(ratio, rel=1e-4)
            true = math.exp(-wanted[at])
            share = true / (true + sum(math.exp(-loss) for loss in wrong))
            expected = true if name in {"forget", "retain"} else share
            assert split.probabilities[at] == pytest.approx(expected, rel=1e-4)


def test_the_batch_size_changes_nothing(model: Any, tokenizer: Any) -> None:
    one, seven = (run(model, tokenizer, batch_size=size) for size in (1, 7))
    for name, split in one.splits.items():
        other = seven.splits[name]
        assert other.losses == pytest.approx(split.losses, abs=1e-5)
        assert other.truth_ratios == pytest.approx(split.truth_ratios, rel=1e-4)
        assert other.texts == split.texts
        assert other.rouge.tolist() == split.rouge.tolist()
    assert seven.model_utility == pytest.approx(one.model_utility, rel=1e-4)


def test_answers_are_those_of_one_prompt_at_a_time(model: Any, tokenizer: Any) -> None:
    found = run(model, tokenizer, batch_size=4).splits["forget"].texts
    for text, question in zip(found, FORGET, strict=True):
        ids = tokenizer(f"Question: {question.question}\nAnswer:", return_tensors="pt").input_ids
        new = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0]
        wanted = tokenizer.decode(new[ids.shape[1] :], skip_special_tokens=True)
        assert text == wanted.strip()
    assert len(set(found)) > 1


def test_answers_end_where_the_model_ends_them(llama: Any, tokenizer: Any) -> None:
    prompts = Prompts(tokenizer)
    ids = torch.tensor([prompts.prompt(FORGET[0].question)])
    new = llama.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0]
    words = new[ids.shape[1] :].tolist()
    end = next(token for token in words[3:] if token not in words[:3])
    stop = words.index(end)
    own = llama.generation_config
    with patch.object(llama, "generation_config", type(own)(eos_token_id=[end, 1])):
        found = run(llama, tokenizer, batch_size=6).splits["forget"].texts[0]
    assert found == tokenizer.decode(words[:stop], skip_special_tokens=True).strip()
    assert llama.generation_config is own


def test_what_the_model_likes_to_sample_is_not_asked(llama: Any, tokenizer: Any) -> None:
    plain = run(llama, tokenizer)
    own = type(llama.generation_config)(
        do_sample=True, temperature=2.0, top_k=5, repetition_penalty=1.8, num_beams=3
    )
    with patch.object(llama, "generation_config", own):
        assert run(llama, tokenizer).splits["forget"].texts == plain.splits["forget"].texts
        assert llama.generation_config is own


def test_what_the_whole_comes_to(llama: Any, tokenizer: Any) -> None:
    reference = [0.5, 1.0, 2.0, 3.0]
    found = run(llama, tokenizer, reference=reference)
    assert found.forget_quality == metrics.forget_quality(found.truth_ratios, reference)
    retain = found.splits["retain"]
    assert found.parts["retain"] == {
        "probability": metrics.probability(retain.losses),
        "rouge": metrics.rouge_l_recall(retain.texts, [q.answer for q in RETAIN]),
        "truth_ratio": metrics.truth_ratio_utility(retain.truth_ratios),
    }
    assert list(found.parts) == ["retain", "real_authors", "world_facts"]
    assert len(found.utility_parts) == 9
    assert found.model_utility == metrics.model_utility(found.parts)
    assert found.interval is not None
    assert found.interval == run(llama, tokenizer).interval


def test_fewer_splits_give_a_utility_of_fewer_parts(llama: Any, tokenizer: Any) -> None:
    found = run(llama, tokenizer, utility=None)
    assert found.utility_parts == ("retain/probability", "retain/rouge", "retain/truth_ratio")
    assert found.model_utility == metrics.model_utility(found.parts["retain"].values())
    assert found.forget_quality is None
    alone = run(llama, tokenizer, retain=(), utility={})
    assert (alone.model_utility, alone.interval, alone.utility_parts) == (None, None, ())
    assert list(alone.splits) == ["forget"]
    facts = run(llama, tokenizer, retain=(), utility={"world_facts": FACTS})
    assert facts.splits["world_facts"].losses == pytest.approx(
        run(llama, tokenizer).splits["world_facts"].losses, abs=1e-5
    )


def test_a_reference_scores_the_forget_split_alone(llama: Any, tokenizer: Any) -> None:
    ratios = reference_truth_ratios(llama, tokenizer, FORGET, device="cpu", batch_size=5)
    assert ratios == pytest.approx(run(llama, tokenizer).truth_ratios, rel=1e-4)


def test_a_model_that_broke_is_a_result(tokenizer: Any) -> None:
    broken = make_llama()
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    found = run(broken, tokenizer, reference=[1.0, 2.0])
    assert found.forget_quality is not None
    assert math.isnan(found.forget_quality.p_value)
    assert math.isnan(found.model_utility or 0.0)
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert document["forget_quality"] is document["model_utility"] is None
    assert document["interval"] == [None, None]
    assert document["truth_ratios"] == [None] * len(FORGET)


def test_gibberish_is_seen(tokenizer: Any) -> None:
    stuck = make_llama()
    with torch.no_grad():
        stuck.lm_head.weight.zero_()  # every token is as likely, and the first one wins: <s>
    silent = run(stuck, tokenizer)
    assert set(silent.fluency.values()) == {0.0}
    assert silent.gibberish == ("forget", "retain", "real_authors", "world_facts")
    word = tokenizer("Paris", add_special_tokens=False)["input_ids"][0]
    hidden = torch.zeros(32)
    hidden[0] = 1.0
    with torch.no_grad():
        stuck.model.norm.weight.zero_()
        for layer in stuck.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        stuck.model.embed_tokens.weight[:] = hidden
        stuck.model.norm.weight[0] = 1.0
        stuck.lm_head.weight[word, 0] = 5.0
    repeating = run(stuck, tokenizer)
    assert set(repeating.fluency.values()) == {1 / 12}
    assert len(repeating.gibberish) == 4


class Told:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.total, self.done, self.closed = 0, 0, 0
        self.names: list[str] = []

    def start(self, total: int) -> None:
        self.total += total

    def advance(self, written: int, shard: str) -> None:
        self.done += written
        self.names.append(shard)

    def close(self) -> None:
        self.closed += 1


def test_progress_counts_everything(llama: Any, tokenizer: Any) -> None:
    told = Told()
    run(llama, tokenizer, progress=told)
    questions = [*FORGET, *RETAIN, *UTILITY["real_authors"], *FACTS]
    sequences = sum(2 + len(question.perturbed_answers) for question in questions)
    assert told.total == told.done == sequences + len(questions)
    assert told.closed == 1
    assert list(dict.fromkeys(told.names))[:3] == [
        "forget: losses",
        "forget: answers",
        "retain: losses",
    ]


def test_memory_that_runs_out_is_no_bug(llama: Any, tokenizer: Any) -> None:
    told = Told()
    with (
        patch.object(llama, "generate", side_effect=torch.OutOfMemoryError("…")),
        pytest.raises(UsageError, match="smaller batch size"),
    ):
        run(llama, tokenizer, progress=told)
    assert told.closed == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"forget": ()}, "no questions"),
        ({"utility": {"authors": FACTS}}, "no such split: authors"),
        ({"batch_size": 0}, "batch size 0"),
        ({"max_new_tokens": 250}, "generate fewer tokens"),
        ({"retain": [replace(RETAIN[0], answer="Paris " * 300)]}, "leave that question out"),
        ({"template": "{a} {q}"}, "cannot be used"),
        ({"template": "{q}"}, "cannot be used"),
        ({"template": "{q} {a} {a}"}, "cannot be used"),
        ({"template": "{q} {a}."}, "at its end"),
    ],
)
def test_what_makes_no_sense(
    options: dict[str, Any], text: str, llama: Any, tokenizer: Any
) -> None:
    with pytest.raises(UsageError, match=text):
        run(llama, tokenizer, **options)


def test_a_device_that_is_not_here(llama: Any, tokenizer: Any) -> None:
    with (
        patch("torch.cuda.is_available", return_value=False),
        pytest.raises(UsageError, match="no CUDA device"),
    ):
        run(llama, tokenizer, device="cuda")


def test_an_extra_that_is_not_installed(llama: Any, tokenizer: Any) -> None:
    with (
        patch.object(study, "_LIBRARIES", ("scipy", "no_such_library")),
        pytest.raises(UsageError, match=r"needs no_such_library; .*uipe-merge\[study\]"),
    ):
        run(llama, tokenizer)


def test_the_plain_prompt_leaves_the_space_to_the_answer(tokenizer: Any) -> None:
    prompts = Prompts(tokenizer)
    assert tokenizer.decode(prompts.prompt("Why?")) == "<s>Question: Why?\nAnswer:"
    encoded = prompts.answered("Why?", "Paris")
    assert tokenizer.decode(encoded.ids) == "<s>Question: Why?\nAnswer: Paris</s>"
    assert tokenizer.decode(encoded.ids[encoded.start :]) == " Paris</s>"


def test_a_template_of_ones_own(precise: Any, model: Any, tokenizer: Any) -> None:
    found = run(model, tokenizer, template="[INST] {q} [/INST] {a}")
    assert found.template == "[INST] {q} [/INST] {a}"
    wanted = [
        naive_loss(precise, tokenizer, q.question, q.answer, "[INST] {} [/INST]") for q in FORGET
    ]
    assert found.splits["forget"].losses == pytest.approx(wanted, abs=1e-5)
    braces = Prompts(tokenizer, "{q}\n{a}").answered("{a} {q}?", "{q}")
    assert tokenizer.decode(braces.ids) == "<s>{a} {q}?\n{q}</s>"
    assert tokenizer.decode(braces.ids[braces.start :]) == "{q}</s>"


def test_the_chat_template_of_the_tokenizer() -> None:
    chatty = make_tokenizer()
    chatty.chat_template = CHAT
    prompts = Prompts(chatty)
    assert prompts.template == "chat"
    prompt = "<s><user> Why?<end>\n<assistant> "
    assert chatty.decode(prompts.prompt("Why?")) == prompt
    encoded = prompts.answered("Why?", " Paris. ")
    # One beginning, the answer trimmed by the template, and the end of texts for its "<end>".
    assert chatty.decode(encoded.ids) == f"{prompt}Paris.</s>"
    assert chatty.decode(encoded.ids[encoded.start :]).strip() == "Paris.</s>"
    assert Prompts(chatty, "{q} {a}").template == "{q} {a}"


def test_a_chat_template_that_does_not_go_on_with_its_prompt() -> None:
    thinking = make_tokenizer()
    thinking.chat_template = CHAT.replace("<assistant> {%", "<assistant> <think></think>{%")
    encoded = Prompts(thinking).answered("Why?", "Paris")
    whole = "<s><user> Why?<end>\n<assistant> <think></think>Paris</s>"
    assert thinking.decode(encoded.ids) == whole


def test_a_tokenizer_that_ends_every_text_and_one_that_ends_none() -> None:
    ending = make_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    prompts = Prompts(ending, "{q} {a}")
    assert ending.decode(prompts.prompt("Why?")) == "Why?"
    assert ending.decode(prompts.answered("Why?", "Paris").ids) == "Why? Paris</s>"
    endless = make_tokenizer()
    endless.eos_token = None
    encoded = Prompts(endless).answered("Why?", "Paris")
    assert endless.decode(encoded.ids[encoded.start :]) == " Paris"


def test_the_first_token_of_a_text_is_not_predicted() -> None:
    bare = make_tokenizer()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", special_tokens=[]
    )
    assert Prompts(bare, "{q}{a}").answered("", "Paris").start == 1


@pytest.mark.skipif(not TOFU.is_dir(), reason="no TOFU data beside the checkout")
def test_tofu_as_it_is(llama: Any, tokenizer: Any) -> None:
    options = {
        name: read(TOFU / f"{name}_perturbed.json", paraphrased=name in {"forget01", "retain"})
        for name in ("forget01", "retain", "real_authors", "world_facts")
    }
    wide = type(llama)(LlamaConfig(**llama.config.to_dict() | {"max_position_embeddings": 4096}))
    found = evaluate(
        wide,
        tokenizer,
        forget=options["forget01"][:3],
        retain=options["retain"][:3],
        utility={name: options[name][:3] for name in ("real_authors", "world_facts")},
        max_new_tokens=4,
        device="cpu",
    )
    assert [len(split.losses) for split in found.splits.values()] == [3] * 4


# ------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a reference, and files of questions."""
    root = tmp_path_factory.mktemp("evaluate")
    tokenizer = make_tokenizer()
    for name in ("model", "retain-only"):
        model = make_llama()
        if name == "retain-only":
            with torch.no_grad():
                model.lm_head.weight *= 0.5
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "model" / "uipe_merge.json").write_text("{}")
    for name, questions in {"forget": FORGET, "retain": RETAIN, **UTILITY}.items():
        records = [
            {
                "question": question.question,
                "answer": question.answer,
                "paraphrased_answer": question.paraphrased_answer,
                "perturbed_answer": list(question.perturbed_answers),
            }
            for question in questions
        ]
        (root / f"{name}.json").write_text(json.dumps(records))
    return {path.stem: path for path in root.iterdir()}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The command alone, as the program would run it."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("evaluate")(command.evaluate)
    app.callback()(lambda: None)
    with patch("uipe_merge.cli.app.app", app):
        yield


@pytest.fixture
def call(places: dict[str, Path]) -> Callable[..., Result]:
    def run_command(*options: object, model: object = None) -> Result:
        files = ("--forget", places["forget"], "--retain", places["retain"])
        fixed = (*files, "--device", "cpu", "--max-new-tokens", 8)
        return run_here("evaluate", model or places["model"], *fixed, *options)

    return run_command


def test_the_command_writes_what_the_library_finds(
    places: dict[str, Path], call: Callable[..., Result], tmp_path: Path
) -> None:
    scores = tmp_path / "scores.json"
    everything = ("--real-authors", places["real_authors"], "--world-facts", places["world_facts"])
    reference = ("--reference", places["retain-only"])
    result = call(*everything, *reference, "-o", scores)
    assert result.code == 0, result
    assert "forget quality" in result.out
    assert "9 of 9 parts" in result.out
    assert "lacks" not in result.err
    document = json.loads(scores.read_text())
    model = AutoModelForCausalLM.from_pretrained(places["model"])
    found = run(model, make_tokenizer(), max_new_tokens=8)
    other = AutoModelForCausalLM.from_pretrained(places["retain-only"])
    ratios = reference_truth_ratios(other, make_tokenizer(), FORGET, device="cpu")
    wanted = metrics.forget_quality(found.truth_ratios, ratios)
    assert document["forget_quality"] == wanted.p_value
    assert document["ks"] == {"statistic": wanted.statistic, "n": 6, "m": 6}
    assert {name: document[name] for name in ("schema", "tool", "model", "dtype", "device")} == {
        "schema": 1,
        "tool": "uipe-merge evaluate",
        "model": str(places["model"]),
        "dtype": "float32",
        "device": "cpu",
    }
    assert document["model_manifest_sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert document["model_utility"] == found.model_utility
    assert document["interval"] == list(found.interval or ())
    assert document["parts"] == found.parts
    assert document["truth_ratios"] == found.truth_ratios.tolist()
    assert document["questions"]["retain"]["text"] == list(found.splits["retain"].texts)
    assert os.listdir(tmp_path) == ["scores.json"]


def test_scores_serve_as_a_reference(
    places: dict[str, Path], call: Callable[..., Result], tmp_path: Path
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text("an older file is replaced")
    first = call("-o", scores, "-q", model=places["retain-only"])
    assert (first.code, first.err) == (0, "")
    by_model, by_logs = (
        call("--json", *options)
        for options in (("--reference", places["retain-only"]), ("--retain-logs", scores))
    )
    found = json.loads(by_logs.out)
    assert found["forget_quality"] == json.loads(by_model.out)["forget_quality"]
    assert found["reference"] == str(scores)
    assert found["model_utility"] is not None
    assert "lacks 6 of its 9 parts" in by_logs.err
    fewer = call("--json", "--retain-logs", scores, "--limit", 2)
    assert json.loads(fewer.out)["ks"]["n"] == 2
    assert "the reference answered 6 questions and the model 2" in fewer.err


def test_the_command_warns_of_gibberish_and_of_nan(
    places: dict[str, Path], call: Callable[..., Result], tmp_path: Path
) -> None:
    broken = AutoModelForCausalLM.from_pretrained(places["model"])
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    broken.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    result = call("-o", tmp_path / "scores.json", model=tmp_path / "broken")
    assert result.code == 0, result
    assert "gibberish on forget, retain" in result.err
    assert "NaN or infinite losses" in result.err
    document = json.loads((tmp_path / "scores.json").read_text())
    assert document["model_utility"] is None
    assert document["model_manifest_sha256"] is None
    as_logs = call("--retain-logs", tmp_path / "scores.json")
    assert_refused(as_logs, 4, "scores.json", "truth ratio 1 is no finite number")
    as_reference = call("--reference", tmp_path / "broken")
    assert_refused(as_reference, 2, "broken", "not finite")


def test_a_template_on_the_command_line(call: Callable[..., Result]) -> None:
    result = call("--json", "--limit", 1, "--template", r"Q: {q}\nA: {a}")
    assert json.loads(result.out)["template"] == "Q: {q}\nA: {a}"


@pytest.mark.parametrize(
    ("options", "code", "fragments"),
    [
        pytest.param(("--forget", "nothing.json"), 2, ("nothing.json: no such file",), id="file"),
        pytest.param(("--limit", 0), 2, ("--limit",), id="limit"),
        pytest.param(("--batch-size", 0), 2, ("--batch-size",), id="batch"),
        pytest.param(("--device", "tpu"), 2, ("--device",), id="device"),
        pytest.param(("--template", "x"), 2, ("template 'x' cannot",), id="template"),
        pytest.param(("-o", "no/such/scores.json"), 2, ("no/such", "create it"), id="directory"),
        pytest.param(("-o", "/"), 2, ("/: is a directory",), id="onto a directory"),
        pytest.param(("--reference", "nowhere"), 2, ("nowhere: no such directory",), id="model"),
        pytest.param(("--reference", "a", "--retain-logs", "b"), 2, ("exclude",), id="two"),
        pytest.param(("--max-new-tokens", 1000), 2, ("generate fewer",), id="length"),
    ],
)
def test_the_command_refuses(
    options: tuple[object, ...], code: int, fragments: tuple[str, ...], call: Callable[..., Result]
) -> None:
    result = call(*options)
    assert_refused(result, code, *fragments)
    assert result.out == ""


def test_models_that_cannot_be_loaded(
    places: dict[str, Path], call: Callable[..., Result], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def damaged(name: str, change: Callable[[Path], object]) -> Path:
        path = tmp_path / name
        path.mkdir()
        for file in places["model"].iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        change(path)
        return path

    def rewrite(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    def code(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        config |= {"model_type": "own", "auto_map": auto}
        (path / "config.json").write_text(json.dumps(config))
        (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    cases: list[tuple[str, Callable[[Path], object], int, str]] = [
        ("short", lambda p: os.truncate(p / "model.safetensors", 5000), 4, "model.safetensors"),
        ("lacking", rewrite, 4, "lacks weights of its own architecture: model.norm.weight"),
        ("code", code, 5, "transformers cannot load it"),
        ("no-tokenizer", lambda p: (p / "tokenizer.json").write_text("{"), 5, "tokenizer"),
        ("adapter", lambda p: (p / "adapter_config.json").write_text("{}"), 5, "adapter"),
    ]
    for name, change, exit_code, text in cases:
        path = damaged(name, change)
        assert_refused(call(model=path), exit_code, str(path), text)
    assert not (tmp_path / "ran").exists()


def test_scores_that_cannot_be_written_leave_nothing(
    call: Callable[..., Result], tmp_path: Path
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text("old")
    with patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        result = call("--limit", 1, "-o", scores)
    assert_refused(result, 8, "no space left on device")
    assert os.listdir(tmp_path) == ["scores.json"]
    assert scores.read_text() == "old"
