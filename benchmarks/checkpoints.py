"""Makes the checkpoints that are measured: Llama-shaped, bfloat16, any size, never in memory.

Values come from two pools made once: Gaussian weights, and the same weights after a Gaussian
update. Every block of a tensor is a stretch of a pool, from a start and with a sign that
follow from the tensor's name, so with one version of numpy the bytes are always the same. The
two checkpoints of a pair take the same stretch, which is what makes them a pair.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Words = NDArray[np.uint16]

Shapes = dict[str, tuple[int, ...]]

SINGLE = "model.safetensors"
BLOCK = 2**20  # elements written at a time
_POOL = 8 * BLOCK + 1
_WEIGHT = 0.02
_UPDATE = 2e-4
_SIGN = 0x8000
_BYTES = 2
_LAYER_AREA = 14.5  # elements of a decoder layer in units of hidden_size²
_HEAD = 64
_GROUP = 4  # heads that share a key

# The smallest tokenizer that loads: mergekit copies one, or tries to build it from nothing.
_TOKENIZER: dict[str, dict[str, object]] = {
    "tokenizer.json": {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2},
            "unk_token": "<unk>",
        },
    },
    "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    },
}


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a Llama model with tied embeddings, MLP 4 × hidden, 4 heads to a key."""

    hidden: int
    layers: int
    vocabulary: int

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.hidden // _HEAD

    def config(self) -> dict[str, object]:
        """Return the ``config.json`` that transformers and mergekit expect."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": 4 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // _GROUP,
            "head_dim": _HEAD,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }

    def shapes(self) -> Shapes:
        """Return every tensor's shape, in the order in which they are stored."""
        wide, keys = self.hidden, self.hidden // _GROUP
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, wide)}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (wide,),
                f"{prefix}.mlp.down_proj.weight": (wide, 4 * wide),
                f"{prefix}.mlp.gate_proj.weight": (4 * wide, wide),
                f"{prefix}.mlp.up_proj.weight": (4 * wide, wide),
                f"{prefix}.post_attention_layernorm.weight": (wide,),
                f"{prefix}.self_attn.k_proj.weight": (keys, wide),
                f"{prefix}.self_attn.o_proj.weight": (wide, wide),
                f"{prefix}.self_attn.q_proj.weight": (wide, wide),
                f"{prefix}.self_attn.v_proj.weight": (keys, wide),
            }
        shapes["model.norm.weight"] = (wide,)
        return shapes


def geometry(nbytes: int) -> Geometry:
    """Return a geometry whose bfloat16 weights take about ``nbytes`` bytes.

    A fifth is embedding, as in a model of one billion parameters; about 16 layers, more above
    the widest and fewer below the narrowest hidden size.
    """
    elements = nbytes / _BYTES
    step = _HEAD * _GROUP
    hidden = round(math.sqrt(0.8 * elements / (16 * _LAYER_AREA)) / step) * step
    hidden = min(max(hidden, step), 8192)
    layers = max(1, round(0.8 * elements / (_LAYER_AREA * hidden**2)))
    left = elements / hidden - layers * (_LAYER_AREA * hidden + 2) - 1
    return Geometry(hidden, layers, max(256, round(left / 64) * 64))


def write_checkpoint(
    path: Path,
    shapes: Shapes,
    config: dict[str, object],
    *,
    shards: int = 1,
    moved: Callable[[str], bool] | None = None,
    holes: bool = False,
) -> int:
    """Write a sharded checkpoint and return the bytes of its tensors.

    Args:
        path: The directory to make.
        shapes: Every tensor's shape; all are bfloat16.
        config: Content of ``config.json``.
        shards: How many files to spread the tensors over, in order, at about equal size.
        moved: Which tensors to take from the pool with the update; ``None``: no tensor.
        holes: Leave the payload unwritten: real headers, files that take no room.
    """
    path.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, group in enumerate(split(shapes, shards), 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors" if shards > 1 else SINGLE
        weight_map |= dict.fromkeys(group, name)
        header = _header(group)
        nbytes = sum(map(_nbytes, group.values()))
        with (path / name).open("xb") as file:
            file.write(header)
            if holes:
                file.truncate(len(header) + nbytes)
            else:
                for tensor, shape in group.items():
                    for block in _blocks(tensor, math.prod(shape), moved):
                        file.write(block.data)
        total += nbytes
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    documents = {"config.json": config, **_TOKENIZER}
    for name, content in documents.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    return total


def split(shapes: Shapes, shards: int) -> Iterable[Shapes]:
    """Cut the tensors, in order, into ``shards`` groups of about equal size, none empty."""
    names = list(shapes)
    if not 0 < shards <= len(names):
        raise ValueError(f"{len(names)} tensors cannot fill {shards} shards")
    left = sum(map(_nbytes, shapes.values()))
    begin = 0
    for number in range(shards):
        others = shards - number - 1
        goal, size, end = left / (others + 1), 0, begin
        while end < len(names) - others:
            grown = size + _nbytes(shapes[names[end]])
            # Take the tensor if that ends nearer to the goal than stopping does.
            if end > begin and others and grown - goal > goal - size:
                break
            size, end = grown, end + 1
        yield {name: shapes[name] for name in names[begin:end]}
        begin, left = end, left - size


def _header(group: Shapes) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in group.items():
        end = position + _nbytes(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def _nbytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _BYTES


def _blocks(name: str, elements: int, moved: Callable[[str], bool] | None) -> Iterator[Words]:
    pool = _pools()[1 if moved is not None and moved(name) else 0]
    for number, start in enumerate(range(0, elements, BLOCK)):
        digest = hashlib.sha256(f"{name}\n{number}".encode()).digest()
        begin = int.from_bytes(digest[:8], "little") % (_POOL - BLOCK)
        count = min(BLOCK, elements - start)
        sign = np.uint16(_SIGN if digest[8] & 1 else 0)
        yield np.bitwise_xor(pool[begin : begin + count], sign)


@cache
def _pools() -> tuple[Words, Words]:
    """Return bfloat16 words of N(0, 0.02²) weights, and of the same after an update."""
    generator = np.random.default_rng(20250304)
    weights = generator.standard_normal(_POOL, np.float32) * np.float32(_WEIGHT)
    update = generator.standard_normal(_POOL, np.float32) * np.float32(_UPDATE)
    original = _to_bfloat16(weights)
    return original, _to_bfloat16(weights + update)


def _to_bfloat16(values: NDArray[np.float32]) -> Words:
    """Round finite float32 to bfloat16, to nearest even; return the upper halves."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
