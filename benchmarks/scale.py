"""What a merge of a large model reads, writes and takes: ``--dry-run --json`` on sparse replicas.

    python benchmarks/scale.py                       # the table of docs/clusters.md
    python benchmarks/scale.py --read 1e9 --price 4  # at other rates

A replica has the headers of the published model, as bfloat16, and no payload: its files are
holes, and the plan is made from headers alone. Bytes are the tool's own; times are the bytes of
the slowest of the nodes divided by the rates that are given, and nothing more.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import write_checkpoint

if TYPE_CHECKING:
    from checkpoints import Shapes

READ, WRITE, PRICE = 2e9, 1e9, 2.0
NODES = (1, 4, 16)


@dataclass(frozen=True, slots=True)
class Dense:
    """A Llama: published in ``config.json`` of its repository."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int

    def shapes(self) -> Shapes:
        """Return every tensor's shape."""
        width = self.hidden // self.heads * self.key_heads
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= {
                f"{at}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{at}.self_attn.k_proj.weight": (width, self.hidden),
                f"{at}.self_attn.v_proj.weight": (width, self.hidden),
                f"{at}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                **_feed_forward(f"{at}.mlp", self.hidden, self.intermediate),
                f"{at}.input_layernorm.weight": (self.hidden,),
                f"{at}.post_attention_layernorm.weight": (self.hidden,),
            }
        return shapes | {
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }


@dataclass(frozen=True, slots=True)
class Mixture:
    """DeepSeek-V3: latent attention, a few dense layers, then experts. Without its draft layer."""

    hidden: int = 7168
    intermediate: int = 18432
    expert: int = 2048
    experts: int = 256
    layers: int = 61
    dense: int = 3
    heads: int = 128
    query_rank: int = 1536
    key_rank: int = 512
    rotary: int = 64
    plain: int = 128
    value: int = 128
    vocabulary: int = 129_280

    def shapes(self) -> Shapes:
        """Return every tensor's shape."""
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            shapes |= self._attention(f"{at}.self_attn")
            if layer < self.dense:
                shapes |= _feed_forward(f"{at}.mlp", self.hidden, self.intermediate)
            else:
                shapes |= {
                    f"{at}.mlp.gate.weight": (self.experts, self.hidden),
                    f"{at}.mlp.gate.e_score_correction_bias": (self.experts,),
                    **_feed_forward(f"{at}.mlp.shared_experts", self.hidden, self.expert),
                }
                for expert in range(self.experts):
                    shapes |= _feed_forward(f"{at}.mlp.experts.{expert}", self.hidden, self.expert)
            shapes |= {
                f"{at}.input_layernorm.weight": (self.hidden,),
                f"{at}.post_attention_layernorm.weight": (self.hidden,),
            }
        return shapes | {
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    def _attention(self, at: str) -> Shapes:
        head = self.plain + self.rotary
        return {
            f"{at}.q_a_proj.weight": (self.query_rank, self.hidden),
            f"{at}.q_a_layernorm.weight": (self.query_rank,),
            f"{at}.q_b_proj.weight": (self.heads * head, self.query_rank),
            f"{at}.kv_a_proj_with_mqa.weight": (self.key_rank + self.rotary, self.hidden),
            f"{at}.kv_a_layernorm.weight": (self.key_rank,),
            f"{at}.kv_b_proj.weight": (self.heads * (self.plain + self.value), self.key_rank),
            f"{at}.o_proj.weight": (self.hidden, self.heads * self.value),
        }


def _feed_forward(at: str, hidden: int, intermediate: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (intermediate, hidden),
        f"{at}.up_proj.weight": (intermediate, hidden),
        f"{at}.down_proj.weight": (hidden, intermediate),
    }


@dataclass(frozen=True, slots=True)
class Model:
    """A published model.

    Attributes:
        name: Its name.
        parts: Its sizes.
        shards: Files that it is published in.
        kind: ``model_type`` of its configuration.
    """

    name: str
    parts: Dense | Mixture
    shards: int
    kind: str = "llama"


MODELS = (
    Model("Llama-2-7B", Dense(4096, 11008, 32, 32, 32, 32_000), 2),
    Model("Llama-3-70B", Dense(8192, 28672, 80, 64, 8, 128_256), 30),
    Model("Llama-3.1-405B", Dense(16384, 53248, 126, 128, 8, 128_256), 191),
    Model("DeepSeek-V3, 671B", Mixture(), 163, "deepseek_v3"),
)


def plan(model: Model, work: Path) -> dict[str, int]:
    """Make a sparse pair and return what the program says about it."""
    shapes = model.parts.shapes()
    config: dict[str, object] = {"model_type": model.kind}
    for name in ("original", "unlearned"):
        write_checkpoint(work / name, shapes, config, shards=model.shards, holes=True)
    # An output by URL needs no room here; of a plan nothing is written.
    pair = [str(work / name) for name in ("original", "unlearned")]
    words = [*pair, "--alpha", "2", "-o", "memory://out"]
    done = subprocess.run(
        [sys.executable, "-m", "uipe_merge", *words, "--dry-run", "--json"],
        check=True,
        capture_output=True,
    )
    found = json.loads(done.stdout)
    parameters = sum(map(math.prod, shapes.values()))
    return {**found, "parameters": parameters, "tensors": len(shapes)}


def seconds(found: dict[str, int], nodes: int, read: float, write: float) -> float:
    """Return how long the node with most shards reads and writes, one after the other."""
    share = math.ceil(found["shards"] / nodes) / found["shards"]
    return share * (found["read_bytes"] / read + found["write_bytes"] / write)


def shown(duration: float) -> str:
    """Return a duration in the unit that suits it."""
    if duration < 60:
        return f"{duration:.0f} s"
    return f"{duration / 60:.1f} min"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", type=float, default=READ, help="bytes/s of a node [%(default)s]")
    parser.add_argument("--write", type=float, default=WRITE, help="bytes/s of one [%(default)s]")
    parser.add_argument("--price", type=float, default=PRICE, help="of its hour [%(default)s]")
    asked = parser.parse_args()
    columns = ["model", "parameters", "tensors", "shards", "read", "written", "peak memory"]
    columns += [f"{nodes} node{'s' if nodes > 1 else ''}" for nodes in NODES]
    sys.stdout.write(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n")
    for model in MODELS:
        work = Path(tempfile.mkdtemp())
        try:
            found = plan(model, work)
        finally:
            shutil.rmtree(work)
        cells = [
            model.name,
            f"{found['parameters'] / 1e9:.1f} B",
            f"{found['tensors']:,}",
            f"{found['shards']}",
            f"{found['read_bytes'] / 1e9:,.0f} GB",
            f"{found['write_bytes'] / 1e9:,.0f} GB",
            f"{found['peak_memory_bytes'] / 2**20:.0f} MiB",
        ]
        for nodes in NODES:
            used = min(nodes, found["shards"])
            took = seconds(found, used, asked.read, asked.write)
            cells.append(f"{shown(took)}, {took * used / 3600 * asked.price:.2f}")
        sys.stdout.write(f"| {' | '.join(cells)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
