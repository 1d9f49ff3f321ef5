"""Tiny mixtures of every layout of experts that transformers has."""

from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from tests.tiny_models import GROUPED, IDS, VOCABULARY, own_generator

_ROUTED: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16
}  # fmt: skip
_DEEP: dict[str, Any] = {
    **GROUPED, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "topk_group": 1,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    **_DEEP, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2Moe": ("Qwen2MoeConfig", {**GROUPED, **_ROUTED, "shared_expert_intermediate_size": 24}),
    "Qwen3Moe": ("Qwen3MoeConfig", {**GROUPED, **_ROUTED, "head_dim": 8}),
    "Mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "Olmoe": ("OlmoeConfig", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "DeepseekV2": ("DeepseekV2Config", {**_LATENT, "n_group": 1}),
    "DeepseekV3": ("DeepseekV3Config", {**_LATENT, "n_group": 2}),
    "Glm4Moe": ("Glm4MoeConfig", {**_DEEP, "head_dim": 8, "n_group": 1}),
    "GptOss": (
        "GptOssConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
         "sliding_window": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "Llama4": (
        "Llama4TextConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1,
         "intermediate_size_mlp": 48, "moe_layers": [0, 1, 2], "attention_chunk_size": 32},
    ),
    "JetMoe": (
        "JetMoeConfig",
        {**IDS, "hidden_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 2,
         "kv_channels": 8, "intermediate_size": 48, "num_local_experts": 4,
         "num_experts_per_tok": 2, "max_position_embeddings": 128},
    ),
    "Dbrx": (
        "DbrxConfig",
        {**IDS, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
         "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
         "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    ),
}  # fmt: skip
DECORATED = [name for name in FAMILIES if name not in ("Llama4", "JetMoe", "Dbrx")]
"""Those that transformers can run by several implementations."""


def mixture(name: str, **settings: Any) -> nn.Module:
    """Return a tiny random mixture, in eval mode."""
    config, given = FAMILIES[name]
    return made(name, config, {**given, **settings})


def made(name: str, config: str, settings: dict[str, Any]) -> nn.Module:
    """Return a tiny random model of a configuration, in eval mode."""
    kind: Any = getattr(hf, f"{name}ForCausalLM")
    with own_generator(0):
        model: nn.Module = kind(getattr(hf, config)(**settings))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def text(n_seq: int, length: int, seed: int = 1) -> Tensor:
    """Return random ids, (sequences, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (n_seq, length), generator=generator)


TEXT = partial(text, 16, 32)


def with_super() -> Any:
    """Return a mixture whose expert 2 of block 0 puts out enormous numbers, and its statistics."""
    module: Any = mixture("Mixtral")
    module.model.layers[0].mlp.experts.down_proj[2] *= 1000
    module.model.layers[2].mlp.experts.down_proj[1] *= 1e5  # too late to be one
    return module
