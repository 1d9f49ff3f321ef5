"""Tiny random models of many architectures, their tokenizer, and a way to save both as a folder.

Every model has 3 blocks, hidden size 32, 112 tokens, a context of at least 64, float32 weights and
is in eval mode. Building one twice gives the same weights and leaves the global generator alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from entangle.seeding import torch_rng

VOCABULARY = 112
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

IDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
WIDE: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: dict[str, Any] = {**WIDE, "num_key_value_heads": 2, "intermediate_size": 48}
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "gpt_neox": ("GPTNeoXConfig", {**WIDE, "intermediate_size": 48}),
    "gpt2": (
        "GPT2Config",
        {**IDS, "n_positions": 128, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48},
    ),
    "opt": ("OPTConfig", {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gemma3": (
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "sliding_window": 16, "layer_types": WINDOWS},
    ),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 32}),
    "phi3": ("Phi3Config", GROUPED),
    "falcon": ("FalconConfig", {**WIDE, "ffn_hidden_size": 48}),
    "bloom": ("BloomConfig", {**IDS, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "bert": ("BertConfig", {**WIDE, "intermediate_size": 48}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
}


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert": (
        "AlbertModel", "AlbertConfig", {**WIDE, "embedding_size": 16, "intermediate_size": 48}
    ),
    "deberta_v2": (
        "DebertaV2Model", "DebertaV2Config",
        {**WIDE, "intermediate_size": 48, "relative_attention": True, "position_buckets": 12,
         "max_relative_positions": -1, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
         "norm_rel_ebd": "layer_norm"},
    ),
    "deberta_v2_own_keys": (
        "DebertaV2Model", "DebertaV2Config",
        {**WIDE, "intermediate_size": 48, "relative_attention": True,
         "max_relative_positions": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "deberta": (
        "DebertaModel", "DebertaConfig",
        {**WIDE, "intermediate_size": 48, "relative_attention": True,
         "max_relative_positions": 64, "pos_att_type": ["p2c", "c2p"]},
    ),
    "t5_encoder": (
        "T5EncoderModel", "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3,
         "num_heads": 4},
    ),
    "mamba": (
        "MambaForCausalLM", "MambaConfig",
        {**IDS, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8},
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 16},
    ),
    "llava": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"vision_config": {"model_type": "clip_vision_model", **VISION},
         "text_config": {"model_type": "llama", **GROUPED}, "image_token_index": 111},
    ),
    "xlnet": (
        "XLNetModel", "XLNetConfig",
        {**IDS, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
    ),
    "longformer": (
        "LongformerModel", "LongformerConfig",
        {**WIDE, "intermediate_size": 48, "attention_window": [8, 8, 8]},
    ),
    "gemma3n": (
        "Gemma3nForCausalLM", "Gemma3nTextConfig",
        {**GROUPED, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
         "head_dim": 8, "num_kv_shared_layers": 0, "altup_num_inputs": 2, "laurel_rank": 4,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
         "activation_sparsity_pattern": [0.0] * 3, "sliding_window": 16},
    ),
}  # fmt: skip
"""Class, configuration class and settings of models that show tokens to layers in other ways."""


@contextmanager
def own_generator(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _build(name: str) -> nn.Module:
    kind, settings = CONFIGS[name]
    config = getattr(hf, kind)(**settings)
    auto: Any = hf.AutoModel if name == "bert" else hf.AutoModelForCausalLM
    with own_generator(0):
        model: nn.Module = auto.from_config(config, dtype=torch.float32)
    rng = torch_rng(0, "tiny", name)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are no longer 0 and 1
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.1)
    return model.eval().requires_grad_(False)


def build_other(name: str) -> nn.Module:
    """Return one of the models of `OTHERS`."""
    kind, config, settings = OTHERS[name]
    with own_generator(0):
        model: nn.Module = getattr(hf, kind)(getattr(hf, config)(**settings))
    rng = torch_rng(0, "tiny", name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.1)
    return model.eval().requires_grad_(False)


TINY: dict[str, Callable[[], nn.Module]] = {name: partial(_build, name) for name in CONFIGS}


def tiny_tokenizer(*, adds: bool = False) -> hf.PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character (ASCII and newline); decoding undoes encoding.

    One that ``adds`` puts ``<s>`` and ``</s>`` around a text.
    """
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    ends = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    template = "<s> $A </s>" if adds else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(template, None, ends if adds else [])
    fast: Any = hf.PreTrainedTokenizerFast
    wrapped: hf.PreTrainedTokenizerFast = fast(tokenizer_object=tokenizer, **SPECIAL)
    return wrapped


def save_tiny(name: str, folder: Path) -> Path:
    """Save the tiny model ``name`` and the tokenizer as a Hugging Face folder; return it."""
    model = TINY[name]()
    assert isinstance(model, hf.PreTrainedModel)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


WORDS = ["<unk>", "<s>", "</s>", "a", "b", "ab", *(f"w{i}" for i in range(10))]


def write_gguf(file: Path, model: hf.LlamaForCausalLM, **flags: bool) -> None:
    """Write a tiny Llama as llama.cpp would, query and key rows in its order for rotation."""
    config: Any = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for flag, on in flags.items():
        writer.add_bool(f"tokenizer.ggml.{flag}", on)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            weight = weight.reshape(-1, 2, 4, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
