"""Names of Cosmos-Predict2.5's tensors in NVIDIA's own code, beside diffusers'.

The pairs are those of diffusers' conversion script (`scripts/convert_cosmos_to_diffusers.py`, Cosmos 2.0 and 2.5): only
names differ, no tensor is reshaped.
"""

from __future__ import annotations

from train.formats.names import NameMap

_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}

_BLOCK = {f"self_attn.{original}": f"attn1.{ours}" for original, ours in _ATTENTION.items()}
_BLOCK |= {f"cross_attn.{original}": f"attn2.{ours}" for original, ours in _ATTENTION.items()}
_BLOCK |= {"mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2"}
_BLOCK |= {
    f"adaln_modulation_{part}.{layer}": f"norm{number}.linear_{layer}"
    for number, part in ((1, "self_attn"), (2, "cross_attn"), (3, "mlp"))
    for layer in (1, 2)
}

ORIGINAL_NAMES = NameMap(
    blocks=("blocks", "transformer_blocks"),
    block_modules=_BLOCK,
    modules={
        "x_embedder.proj.1": "patch_embed.proj",
        "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
        "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
        "t_embedding_norm": "time_embed.norm",
        "crossattn_proj.0": "crossattn_proj.0",
        "final_layer.adaln_modulation.1": "norm_out.linear_1",
        "final_layer.adaln_modulation.2": "norm_out.linear_2",
        "final_layer.linear": "proj_out",
    },
    # Counters of NVIDIA's trainer, tables its position embedding computes, Transformer Engine's state: no weights.
    ignored=(
        r"accum_(video_sample_counter|image_sample_counter|iteration|train_in_hours)",
        r"pos_embedder\.(seq|dim_spatial_range|dim_temporal_range)",
        r"(.*\.)?_extra_state",
    ),
)
