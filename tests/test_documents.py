"""Documents do what they say: their code blocks run, in order, in one empty directory.

Each ```bash, ```python and ```console block is preceded by a comment, which no renderer shows:

    <!-- run -->                     run it; a ```text block right after it is its output
    <!-- not run: the reason -->     leave it alone

In a ```console block the lines starting with `$ ` are commands and the rest is their output. A
```yaml block that is run is written to the file that its first line names. The directory holds a
tiny pair, `base/` and `unlearned/`, and what came of training it on. Of the output shown, every line must
appear in what was printed, where `…` stands for anything, and so do durations, rates and digests.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "docs/steering.md", "docs/choosing.md", "docs/clusters.md"]
FURTHER = ["related", "repaired", "forget-tuned", "retain-tuned"]
CODE = {"bash", "console", "python"}
OUTPUT = {"", "text", "json"}
MARK = re.compile(r"<!--\s*(run|not run:\s*(?P<reason>\S.*?))\s*-->")
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# What differs from one machine to the next; a rate is tried before the duration inside it.
VOLATILE = re.compile(
    r"""
    (?P<anything> …|\.\.\. )
    | (?P<rate>   \d[\d.,]*\s?[kKMGT]?i?B/s )
    | (?P<time>   \d+:\d\d(:\d\d)?(?!\w) | \d[\d.,]*\s?(?:ms|µs|s|min|seconds?)(?!\w) )
    | (?P<digest> \b[0-9a-f]{12,64}\b )
    | (?P<space>  \s+ )
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it opens, its language, its text and the comment above it."""

    line: int
    language: str
    text: str
    mark: str

    @property
    def runs(self) -> bool:
        return self.mark == "run"


def blocks_of(markdown: str) -> Iterator[Block]:
    """The fenced blocks of a document, in order."""
    lines = markdown.splitlines()
    number = 0
    while number < len(lines):
        opening = re.match(r"^(\s*)(```+)\s*(\w*)", lines[number])
        if opening is None:
            number += 1
            continue
        indent, fence, language = opening.groups()
        end = number + 1
        while lines[end].strip() != fence:
            end += 1
            assert end < len(lines), f"line {number + 1}: this block is never closed"
        above = [line for line in lines[:number] if line.strip()][-1:]
        mark = MARK.fullmatch(above[0].strip()) if above else None
        text = "\n".join(line.removeprefix(indent) for line in lines[number + 1 : end])
        yield Block(number + 1, language, text, mark.group(1) if mark else "")
        number = end + 1


def steps_of(blocks: list[Block]) -> Iterator[tuple[Block, str, str]]:
    """Each block to run with its code and the output shown for it."""
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        if not block.runs:
            continue
        if block.language == "console":
            yield block, *session(block.text)
        elif after is not None and after.language in OUTPUT and not after.mark:
            yield block, block.text, after.text
        else:
            yield block, block.text, ""


def session(text: str) -> tuple[str, str]:
    """The commands of a console block, with continuation lines, and the output shown there."""
    commands, output = [], []
    continued = False
    for line in text.splitlines():
        if continued or line.startswith("$ "):
            command = line.removeprefix("> " if continued else "$ ")
            commands.append(command)
            continued = command.endswith("\\")
        else:
            output.append(line)
    return "\n".join(commands), "\n".join(output)


def pattern_of(line: str) -> re.Pattern[str]:
    """What a printed line must match to be the line shown."""
    line = line.strip()
    parts, position = [], 0
    for found in VOLATILE.finditer(line):
        parts.append(re.escape(line[position : found.start()]))
        parts.append(r"\s+" if found.lastgroup == "space" else ".*?")
        position = found.end()
    return re.compile("".join([*parts, re.escape(line[position:])]))


def missing_lines(shown: str, printed: str) -> list[str]:
    """The lines of `shown` that nothing in `printed` matches."""
    lines = [line.strip() for line in ANSI.sub("", printed).replace("\r", "\n").splitlines()]
    return [
        line
        for line in shown.splitlines()
        if line.strip() and not any(pattern_of(line).fullmatch(candidate) for candidate in lines)
    ]


def make_pair(directory: Path) -> None:
    """Write a two-layer Llama, a copy whose MLP weights were moved, and copies of that moved on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".mlp." in name:
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(directory / "unlearned")
    for name in FURTHER:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        model.save_pretrained(directory / name)


def read(document: str) -> list[Block]:
    return list(blocks_of((ROOT / document).read_text(encoding="utf-8")))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_code_block_says_whether_it_runs(document: str) -> None:
    code = [block for block in read(document) if block.language in CODE]
    silent = [f"{document}:{block.line}: {block.language}" for block in code if not block.mark]
    assert silent == [], "put <!-- run --> or <!-- not run: reason --> above these blocks"
    assert {"bash", "console"} & {block.language for block in code if block.runs}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_blocks_run_and_print_what_is_shown(document: str, tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    make_pair(work)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "PYTHONIOENCODING": "utf-8",
    }
    for block, code, shown in steps_of(read(document)):
        if block.language == "yaml":
            (work / code.splitlines()[0].removeprefix("# ")).write_text(code, encoding="utf-8")
            continue
        python = block.language == "python"
        done = subprocess.run(
            [*([sys.executable, "-c"] if python else ["bash", "-euo", "pipefail", "-c"]), code],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
            timeout=300,
        )
        printed = f"{document}:{block.line} printed\n{done.stdout}"
        assert done.returncode == 0, printed
        assert missing_lines(shown, done.stdout) == [], printed


SAMPLE = """\
Intro
<!-- run -->
```console
$ echo a \\
>   b
a b
```

<!-- not run: needs a GPU -->

```python
x
```
```text
y
```
<!-- run -->
```bash
echo done in 2 s
```
```text
done in 9 s
```
"""


def test_blocks_are_read_with_their_marks() -> None:
    found = list(blocks_of(SAMPLE))
    assert [block.mark for block in found] == ["run", "not run: needs a GPU", "", "run", ""]
    assert [(code, shown) for _, code, shown in steps_of(found)] == [
        ("echo a \\\n  b", "a b"),
        ("echo done in 2 s", "done in 9 s"),
    ]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("tensors  12", "  tensors 12  ", True),
        ("tensors 12", "tensors 13", False),
        ("read 1.2 GB in 3.4 s (350 MB/s)", "read 1.2 GB in 12 s (98.1 MB/s)", True),
        ("read 1.2 GB in 3.4 s", "read 1.3 GB in 3.4 s", False),
        ("sha256 0123456789abcdef", "sha256 fedcba9876543210", True),
        ("wrote … files to out", "wrote 7 files to out", True),
        ("wrote … files to out", "wrote 7 files to elsewhere", False),
        ("‖v‖/‖θ‖ 0.05 (a+b)*", "\x1b[1m‖v‖/‖θ‖ 0.05\x1b[0m (a+b)*", True),
    ],
)
def test_volatile_parts_may_differ_and_nothing_else(shown: str, printed: str, same: bool) -> None:
    assert (missing_lines(shown, printed) == []) is same
