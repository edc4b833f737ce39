"""For the tests of hub ids: two models on a hub of ours, and the program told to go there."""

import json
from pathlib import Path

from helpers import (
    Result,
    assert_refused,
    contents,
    run_cli,
    write_pair,
)
from hub_server import Hub

TOKEN = "hf_a_secret_that_nobody_may_see"  # noqa: S105 - made up
BASE, TUNED = "org/base", "org/unlearned"


class Place:
    """A directory, a hub with both models, and the environment of the program."""

    def __init__(self, root: Path, hub: Hub, *, shards: int = 1) -> None:
        self.root = root
        self.hub = hub
        self.original, self.unlearned = write_pair(root / "local", shards=shards)
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


def weights(directory: Path) -> dict[str, bytes]:
    return {
        name: body for name, body in contents(directory).items() if name.endswith(".safetensors")
    }


def header_bytes(directory: Path) -> int:
    """Length of the headers of all weight files, with what looking at their start takes."""
    return sum(8 + int.from_bytes(body[:8], "little") + 32 for body in weights(directory).values())
