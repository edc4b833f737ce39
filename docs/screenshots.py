"""The pictures of the site, made from the real program.

    python docs/screenshots.py terminal docs/images     progress.svg, plan.svg, heat-map.png
    python docs/screenshots.py report REPORT.html OUT.png

The first makes a pair of 0.5 GB in a directory that does not exist yet (``--directory``, whose
path is seen in the pictures), runs the program in a tmux of its own, and draws what the terminal
shows. The second photographs a page that ``uipe-merge collect --report`` wrote, in headless
Chromium. Both need the environment that ``make docs`` sets up; no picture loads anything.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

COLUMNS, ROWS = 96, 40
LAYERS, HIDDEN, INNER, VOCABULARY = 16, 1024, 2816, 32000
COMMAND = "uipe-merge base unlearned --alpha 2 -o strengthened"
SOCKET = "uipe-screenshots"
DONE = re.compile(r"(\d+(?:\.\d+)?)/(\d+(?:\.\d+)?) MB")
FROM, TO = 0.4, 0.8
FONT_FACE = re.compile(r"@font-face\s*\{.*?\}", re.DOTALL)
WAIT = 120
"""Seconds until a command must have printed what is waited for."""


# --------------------------------------------------------------------- pair


def make_pair(directory: Path) -> None:
    """Write a Llama-shaped pair in bfloat16 whose update is largest in the MLPs of the middle."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(VOCABULARY * HIDDEN, generator=generator)
    for name in ("base", "unlearned"):
        (directory / name).mkdir(parents=True)
        where: dict[str, str] = {}
        for number, shard in enumerate(_shards(noise, moved=name == "unlearned"), 1):
            file = f"model-{number:05d}-of-{LAYERS // 4 + 1:05d}.safetensors"
            save_file(shard, directory / name / file, metadata={"format": "pt"})
            where |= dict.fromkeys(shard, file)
        index = {"metadata": {}, "weight_map": where}
        (directory / name / "model.safetensors.index.json").write_text(json.dumps(index))
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        (directory / name / "config.json").write_text(json.dumps(config))


def _shards(noise: "torch.Tensor", *, moved: bool) -> Iterator[dict[str, "torch.Tensor"]]:
    """Four layers a shard, and embedding and head in the last."""
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN))
    mlp = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    for first in range(0, LAYERS, 4):
        shard = {}
        for layer in range(first, first + 4):
            bump = 2.0 ** -(((layer - 9) / 3) ** 2)
            for number, (kind, shape) in enumerate((attention | mlp).items()):
                name, size = ("mlp", 0.05) if kind in mlp else ("self_attn", 0.01)
                share = size * bump * (1 + 0.1 * number) if moved else 0.0
                key = f"model.layers.{layer}.{name}.{kind}.weight"
                shard[key] = _matrix(noise, shape, 31 * layer + number, share)
        yield shard
    embedding = _matrix(noise, (VOCABULARY, HIDDEN), 0, 0.0)
    head = _matrix(noise, (VOCABULARY, HIDDEN), 1, 0.004 if moved else 0.0)
    yield {"model.embed_tokens.weight": embedding, "lm_head.weight": head}


def _matrix(noise: "torch.Tensor", shape: tuple[int, int], at: int, share: float) -> "torch.Tensor":
    """Some of the noise as a weight, moved by a share of its norm."""
    elements = shape[0] * shape[1]
    start = at * 4099 % max(1, noise.numel() - elements)
    weight = noise[start : start + elements]
    if share:
        weight = weight + share * noise.roll(-start - 12345)[:elements]
    return (0.02 * weight).bfloat16().reshape(shape)


# ----------------------------------------------------------------- terminal


def shoot_terminal(images: Path, directory: Path) -> None:
    """Make the pictures of a merge under way, of its plan, and of the update."""
    images = images.resolve()
    images.mkdir(exist_ok=True)
    directory.mkdir()
    try:
        make_pair(directory)
        with Terminal(directory) as terminal:
            terminal.wait(r"\$$")
            terminal.type(f"{COMMAND} --dry-run")
            draw(terminal.wait(r"\$$"), images / "plan.svg")
            terminal.clear()
            terminal.type(COMMAND)
            draw(terminal.wait_for_half(), images / "progress.svg")
            terminal.wait(r"\$$")
            terminal.clear()
            terminal.type(f"uipe-merge inspect base unlearned --plot {images / 'heat-map.png'} -q")
            terminal.wait(r"\$$")
    finally:
        shutil.rmtree(directory)


class Terminal:
    """A shell in a tmux server of its own."""

    def __init__(self, directory: Path) -> None:
        """Remember where the shell is to run."""
        self._directory = directory

    def __enter__(self) -> Self:
        """Start it, with the programs of this interpreter and a bare prompt."""
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(self._directory),
            "LANG": "C.UTF-8",
            "HISTFILE": "",
            "PS1": "$ ",
        }
        # Said here and not to tmux, whose shells may read profiles that set some of it again.
        settings = ["=".join(item) for item in environment.items()]
        shell = shlex.join(["env", *settings, "bash", "--norc", "--noprofile"])
        self._tmux("-f", os.devnull, "new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS),
                   "-c", str(self._directory), f"exec {shell}")  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        """End the server."""
        self._tmux("kill-server")

    def type(self, command: str) -> None:
        """Type a command and press Enter."""
        self._tmux("send-keys", "-l", command)
        self._tmux("send-keys", "Enter")
        time.sleep(0.2)  # until the shell has shown it

    def clear(self) -> None:
        """Empty the screen."""
        self._tmux("send-keys", "C-l")
        time.sleep(0.2)

    def wait(self, pattern: str) -> str:
        """Return the screen, with its colours, once it ends in what is waited for."""
        return self._until(lambda text: re.search(pattern, text.rstrip()) is not None)

    def wait_for_half(self) -> str:
        """Return the screen when the progress bar is near its middle."""

        def half(text: str) -> bool:
            found = DONE.search(text)
            return found is not None and FROM < float(found[1]) / float(found[2]) < TO

        return self._until(half)

    def _until(self, condition: Callable[[str], bool]) -> str:
        end, coloured = time.monotonic() + WAIT, ""
        while time.monotonic() < end:
            coloured = self._tmux("capture-pane", "-e", "-p")
            if condition(re.sub(r"\x1b\[[\d;]*m", "", coloured)):
                return coloured
            time.sleep(0.02)
        raise SystemExit(f"not seen in {WAIT} s; the screen shows\n{coloured}")

    @staticmethod
    def _tmux(*words: str) -> str:
        done = subprocess.run(
            ["tmux", "-L", SOCKET, *words], check=True, stdout=subprocess.PIPE, encoding="utf-8"
        )
        return done.stdout


def draw(screen: str, target: Path) -> None:
    """Draw a screen as SVG, in whatever monospaced font the reader has."""
    from rich.console import Console
    from rich.text import Text

    lines = screen.rstrip().splitlines()
    if lines[-1].strip() == "$":
        del lines[-1]
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(
            record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor"
        )
        for line in lines:
            console.print(Text.from_ansi(line.rstrip()), soft_wrap=True)
    svg = FONT_FACE.sub("", console.export_svg(title="uipe-merge", unique_id=target.stem))
    target.write_text(svg.replace("Fira Code", "DejaVu Sans Mono"), encoding="utf-8")


# ------------------------------------------------------------------- report


def shoot_report(page: Path, target: Path, height: int) -> None:
    """Photograph a page in Chromium, without a network."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise SystemExit("there is no Chromium on PATH")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}",
             f"--window-size=1100,{height}", "--virtual-time-budget=5000",
             f"--screenshot={target.resolve()}", page.resolve().as_uri()],
            check=True, timeout=WAIT, stderr=subprocess.DEVNULL,
        )  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    terminal = kinds.add_parser("terminal")
    terminal.add_argument("images", type=Path)
    terminal.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir(), "models"))
    report = kinds.add_parser("report")
    report.add_argument("page", type=Path)
    report.add_argument("target", type=Path)
    report.add_argument("--height", type=int, default=1400)
    asked = parser.parse_args()
    if asked.kind == "terminal":
        shoot_terminal(asked.images, asked.directory)
    else:
        shoot_report(asked.page, asked.target, asked.height)


if __name__ == "__main__":
    main()
