"""Tiny random models and a tiny tokenizer: real architectures, small enough for a test; and a token table's rows."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.tokens import Rows, TokenTable, rows_in, span_of

VOCAB = 2000
LAYERS = 4
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_HYBRID = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 40}
_GEMMA_4 = {"head_dim": 16, "global_head_dim": 24, "sliding_window": 8, "vocab_size_per_layer_input": VOCAB}
_GEMMA_4 |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
_MORE: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma4_text": _GEMMA_4
    | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "use_double_wide_mlp": True},
    "gpt2": {"n_inner": 80, "num_key_value_heads": None},
    "gpt_neox": {"use_parallel_residual": True, "num_key_value_heads": None},
    "gpt_oss": {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"max_position_embeddings": 131072},
    "granite": {"residual_multiplier": 0.5},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "mixtral": {"head_dim": 16, "sliding_window": 8, "num_local_experts": 4},
    "olmo3": {"sliding_window": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3": {"head_dim": 16},
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": _HYBRID | _EXPERTS | _SHARED_EXPERT,
    "qwen3_moe": {"head_dim": 16, "mlp_only_layers": [1]} | _EXPERTS,
    "qwen3_next": _HYBRID | _EXPERTS | _SHARED_EXPERT,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_experts": (
        "gemma4_text",
        _GEMMA_4
        | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    ),
    "gpt_neox_sequential": ("gpt_neox", _MORE["gpt_neox"] | {"use_parallel_residual": False}),
}
"""Other settings of an architecture under a name of their own."""
MULTIMODAL = ("gemma3", "gemma4", "qwen3_5", "qwen3_5_moe")


def config_of(kind: str, **changes: Any) -> Any:
    """A configuration of the architecture; head_dim differs from hidden_size / heads where it can."""
    from transformers import AutoConfig

    if kind in MULTIMODAL:
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision |= {"image_size": 28, "patch_size": 14, "out_hidden_size": 48}
        text = config_of(f"{kind}_text", **changes).to_dict()
        return AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    model_type, more = VARIANTS.get(kind, (kind, _MORE.get(kind, {})))
    return AutoConfig.for_model(model_type, **(_SIZES | more | changes))


@cache
def model_of(
    kind: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, attention: str | None = None, **changes: Any
) -> Any:
    """A random model with norms and biases that are not at their neutral values; attention as `load_model` has it."""
    from transformers import AutoModelForCausalLM

    from actstore.capture.precision import attention_of

    config = config_of(kind, **changes)
    attention = attention or attention_of(config)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=None if attention == "default" else attention)
    scalars = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 0.05))
        for scalar in scalars:
            scalar.fill_(0.75)
    for weight in (*model.parameters(), *scalars):  # not model.to: rotary frequencies are float32 in every loaded model
        weight.data = weight.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def tokenizer_of(text: list[str], *, bos: str | None = BOS, eos: str | None = EOS, pad: str | None = PAD) -> Any:
    """A byte-level BPE tokenizer trained on `text`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [t for t in (pad, bos, eos) if t]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def save(folder: Path, kind: str, dtype: torch.dtype, text: list[str]) -> Path:
    """A model directory with weights and tokenizer."""
    model_of(kind, dtype).save_pretrained(folder)
    tokenizer_of(text).save_pretrained(folder)
    return folder


_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def save_gguf(path: Path, text: list[str]) -> Path:
    """The float32 Qwen 2 of `model_of` and its tokenizer as a .gguf file."""
    import gguf

    model, tokenizer = model_of("qwen2"), tokenizer_of(text)
    c = model.config
    w = gguf.GGUFWriter(path, "qwen2")
    w.add_context_length(c.max_position_embeddings)
    w.add_block_count(c.num_hidden_layers)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_parameters["rope_theta"])
    w.add_vocab_size(c.vocab_size)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    w.add_tokenizer_model("gpt2")
    w.add_token_list([t for t, _ in tokens])
    w.add_token_types([3 if t in (BOS, EOS, PAD) else 1 for t, _ in tokens])
    w.add_token_merges([" ".join(m) for m in merges])
    w.add_pad_token_id(0)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    for name, parameter in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            module = f"blk.{layer}.{_GGUF[rest]}"
        else:
            module = _GGUF[module]
        w.add_tensor(f"{module}.{kind}", parameter.numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def rows_of(table: TokenTable, starts: NDArray[np.int64], first_row: int, stop_row: int) -> Rows:
    """Sequence, position and token of rows [first_row, stop_row) of a token table."""
    span = span_of(starts, first_row, stop_row)
    sequences = span.first_sequence, span.stop_sequence
    return rows_in(table.ids(*sequences), table.documents(*sequences), table.rule, span)
