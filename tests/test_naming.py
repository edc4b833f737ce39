"""Layer and module kind, told from tensor names of the usual families."""

import pytest

from uipe_merge.naming import place


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        # Llama, Mistral, Qwen, Gemma, OLMo
        ("model.layers.0.self_attn.q_proj.weight", 0, "self_attn.q_proj"),
        ("model.layers.31.mlp.down_proj.weight", 31, "mlp.down_proj"),
        ("model.layers.7.self_attn.q_proj.bias", 7, "self_attn.q_proj.bias"),
        ("model.layers.7.input_layernorm.weight", 7, "input_layernorm"),
        # Mixtures of experts: experts are one kind, layers are not
        ("model.layers.3.mlp.experts.17.up_proj.weight", 3, "mlp.experts.*.up_proj"),
        ("model.layers.3.mlp.experts.gate_up_proj", 3, "mlp.experts.gate_up_proj"),
        ("model.layers.3.mlp.gate.weight", 3, "mlp.gate"),
        # GPT-2, Falcon, Bloom; MPT; GPT-NeoX; BERT
        ("transformer.h.5.attn.c_attn.weight", 5, "attn.c_attn"),
        ("h.5.attn.c_attn.weight", 5, "attn.c_attn"),
        ("transformer.blocks.2.ffn.up_proj.weight", 2, "ffn.up_proj"),
        ("gpt_neox.layers.11.attention.dense.weight", 11, "attention.dense"),
        ("bert.encoder.layer.4.output.dense.weight", 4, "output.dense"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", 1, "layer.*.SelfAttention.q"),
        # Multimodal
        ("model.language_model.layers.9.mlp.up_proj.weight", 9, "mlp.up_proj"),
        # Outside the layers: never guessed into one
        ("model.embed_tokens.weight", None, "model.embed_tokens"),
        ("model.norm.weight", None, "model.norm"),
        ("lm_head.weight", None, "lm_head"),
        ("transformer.wte.weight", None, "transformer.wte"),
        ("model.layers", None, "model.layers"),
        ("model.layers.weight", None, "model.layers"),
        ("model.layers.3", None, "model.layers.*"),
        ("mylayers.3.q.weight", None, "mylayers.*.q"),
        ("weight", None, "weight"),
        ("", None, ""),
    ],
)
def test_place(name: str, layer: int | None, kind: str) -> None:
    assert place(name) == (layer, kind)
