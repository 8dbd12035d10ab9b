"""Where and how a model runs: device, precision and attention, each decided once, by the command.

The choice is made before the store's spec, is recorded there, and reaches workers, memory checks, repair and
evaluation as concrete values. A store that exists has decided already. Heavy imports stay inside the functions.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from actstore.capture.config import DType, Precision
from actstore.errors import StoreError

ATTENTION = ("default", "eager", "sdpa", "flex_attention", "flash_attention_2")
"""What a store may name; `transformers` would fetch and run any other name as a kernel from the hub."""
SINKS = ("gpt_oss",)
"""Architectures that give attention's softmax a further logit per head, which takes attention away from all tokens."""
NO_BFLOAT16_PRODUCTS = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA (oneDNN 3) that switch the processor's bfloat16 products off."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a model runs, and why."""

    device: str
    """cpu or cuda."""
    dtype: Precision
    attention: str
    """An attention implementation of `transformers`, or default for the one that it takes by itself."""
    reason: str

    def __str__(self) -> str:
        """The line that a command prints."""
        return f"model runs on {self.device} in {self.dtype} ({self.reason})"


def choose(
    asked: DType,
    saved: Precision | None,
    model_config: Any,
    *,
    device: str,
    bfloat16_gpu: bool,
    recorded: object = None,
) -> Choice:
    """Precision and attention of a model on `device`; `StoreError` if the store names an attention that is not known.

    Args:
        asked: what the user asked for.
        saved: what the model was saved in, None where its files don't say.
        model_config: the `transformers` configuration of the model.
        device: cpu or cuda.
        bfloat16_gpu: whether the GPUs have bfloat16 products.
        recorded: `provenance["model"]` of the store, if it exists: what it says is kept.

    """
    found = recorded if isinstance(recorded, dict) else {}
    attention = found.get("attention", attention_of(model_config, device))
    if attention not in ATTENTION:
        raise StoreError(f"the store names attention {str(attention)[:40]!r}, expected one of {', '.join(ATTENTION)}")
    if asked != "auto":
        dtype, reason = asked, "as asked"
    elif found.get("dtype") in ("bfloat16", "float16", "float32"):
        dtype, reason = found["dtype"], "as the store was begun"
    elif device != "cpu":
        dtype, reason = ("bfloat16", "the GPU has it") if bfloat16_gpu else ("float32", "the GPU has no bfloat16")
    elif saved != "bfloat16":
        dtype, reason = "float32", f"the model was saved in {saved or 'an unknown precision'}"
    elif bfloat16_products():
        dtype, reason = "bfloat16", "as the model was saved, and this processor multiplies it"
    else:
        dtype, reason = "float32", "this processor has no bfloat16 products"
    if dtype == "bfloat16" and slow_bfloat16(device):
        reason += "; slow, this processor has no bfloat16 products"
    if attention == "flash_attention_2" and dtype == "float32" and "attention" not in found:
        attention = "eager"  # flash attention takes half precision only
    return Choice(device=device, dtype=dtype, attention=attention, reason=reason)


def saved_precision(name: str, model_config: Any) -> Precision | None:
    """What a model was saved in, or None where that is not recorded (GGUF)."""
    saved = getattr(model_config, "dtype", None) or getattr(model_config.get_text_config(), "dtype", None)
    known: dict[str, Precision] = {f"torch.{p}": p for p in ("bfloat16", "float16", "float32")}
    return None if name.endswith(".gguf") else known.get(str(saved))


def attention_of(model_config: Any, device: str = "cpu") -> str:
    """The attention implementation for a model on a device.

    A model whose attention soft-caps its logits (Gemma 2) can't use `sdpa`, which leaves the cap out. On a GPU it takes
    flex attention where Triton is there to compile it, else flash attention where that is installed; on a CPU, eager.
    Attention with sinks (gpt-oss) is eager everywhere: `sdpa` leaves them out, and no GPU has proved flex attention's.
    """
    text = model_config.get_text_config()
    if text.model_type in SINKS:
        return "eager"
    if not getattr(text, "attn_logit_softcapping", None):
        return "default"
    if device != "cpu":
        if importlib.util.find_spec("triton"):
            return "flex_attention"
        if importlib.util.find_spec("flash_attn"):
            return "flash_attention_2"
    return "eager"


def slow_bfloat16(device: str) -> bool:
    """Whether bfloat16 is emulated there, at 40 times the time of a float32 product."""
    return device == "cpu" and not bfloat16_products()


def bfloat16_products() -> bool:
    """Whether this processor multiplies bfloat16 matrices itself, as far as oneDNN may use it."""
    import torch

    limited = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in NO_BFLOAT16_PRODUCTS
    if limited or not torch.backends.mkldnn.is_available() or not hasattr(torch.cpu, "get_capabilities"):
        return False  # torch 2.11 does not say what the processor has
    has = torch.cpu.get_capabilities()
    return any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
