"""Language models: find, identify, load, and cut off what no site needs.

Weights are read from safetensors or GGUF only, and code from a model's repository is never run. Layers that no site
needs are cut from the configuration, so that their weights are never read.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actstore.builtin import model_path
from actstore.capture.config import Precision
from actstore.capture.forward import decoder_of
from actstore.capture.precision import attention_of
from actstore.capture.sites import hooks_of, site_widths
from actstore.errors import CaptureError, TokensError
from actstore.tokens.tokenizer import hub_is_out_of_reach, load_tokenizer, one_line, public_name

_SAMPLES, _SAMPLE_BYTES = 64, 1 << 12
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "_attn_implementation"}


def load_config(name: str, revision: str | None = None) -> Any:
    """The `transformers` configuration of a model; `CaptureError` says what was looked for.

    `revision` is the hub's commit, tag or branch, by default main. Local models have none.
    """
    from transformers import AutoConfig

    where, options = _locate(name, revision)
    with _loading(name):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    config._commit_hash = options.get("revision")  # noqa: SLF001 # transformers 5.23 no longer keeps it
    return config


def load_model(
    name: str,
    dtype: Precision = "float32",
    device: str = "cpu",
    *,
    revision: str | None = None,
    attention: str | None = None,
    layers: int | None = None,
) -> Any:
    """A causal language model ready for inference.

    `CaptureError` in one line if the model is missing, incomplete, of no known form or too big for the GPUs;
    `ValueError`, before weights are read, if its architecture has no table of sites.

    Args:
        name: a hub id, a local directory or a .gguf file.
        dtype: precision of all parameters.
        device: a torch device, or balanced to spread the layers over all GPUs.
        revision: the hub's commit, tag or branch; default main.
        attention: one of `ATTENTION`; default: as `attention_of` gives it.
        layers: load the first so many layers only; the model can't predict then.

    """
    from transformers import AutoModelForCausalLM

    config = load_config(name, revision)
    where, options = _locate(name, revision_of(config))
    hooks_of(config.model_type)
    packed = getattr(config, "quantization_config", {})
    if packed.get("quant_method") == "mxfp4":  # gpt-oss; the kernels for packed experts call no router
        packed["dequantize"] = True
    attention = attention or attention_of(config, device)
    if attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
        raise CaptureError(f"model {name}: its store was captured with flash attention; pip install flash-attn")
    if layers is not None:
        config = with_layers(config, layers)
    local = model_path(name)
    if local.is_dir():
        _weight_files(name)
    with _loading(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            where,
            config=config,
            dtype=getattr(torch, dtype),
            attn_implementation=None if attention == "default" else attention,
            device_map=None if device == "cpu" else device,
            use_safetensors=None if local.is_file() else True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise CaptureError(
            f"model {name}: {len(missing)} weights are missing, for example {missing[0]}; get a whole copy"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CaptureError(
            f"model {name}: the GPUs there are can't hold it; use more of them, or --dtype bfloat16 if it isn't yet"
        )
    return model.eval().requires_grad_(requires_grad=False)


def with_layers(config: Any, layers: int) -> Any:
    """A copy of a `transformers` configuration with the first `layers` layers: of the model, and of lists by layer.

    Models with per-layer inputs (Gemma 4 E2B and E4B) stay whole: the weights of these inputs are one table for all
    layers.
    """
    cut = deepcopy(config)
    text = cut.get_text_config()
    before = text.num_hidden_layers
    if layers >= before or getattr(text, "hidden_size_per_layer_input", None):
        return cut
    by_layer = {n: v for n, v in vars(text).items() if "layer" in n and isinstance(v, list) and len(v) == before}
    by_layer.pop("mlp_only_layers", None)  # numbers of layers
    text.num_hidden_layers = layers
    for name, values in by_layer.items():
        setattr(text, name, values[:layers])
    if shared := getattr(text, "num_kv_shared_layers", 0):  # the last so many layers
        text.num_kv_shared_layers = max(0, shared - before + layers)
    return cut


def without_head(model: Any) -> None:
    """Free the unembedding and a vision tower, which no site needs; the model can't predict afterwards."""
    decoder, whole = decoder_of(model), model.base_model
    model.set_output_embeddings(nn.Identity())
    if whole is not decoder:
        for part in [name for name, module in whole.named_children() if module is not decoder]:
            setattr(whole, part, nn.Identity())


def model_identity(name: str, config: Any, dtype: Precision, attention: str) -> dict[str, object]:
    """What a store's provenance says about the model: no machine's path, and the same on every machine.

    `weights` is the hub's commit, or a digest of size and 64 samples of every local weight file. `batch_dependent` is
    there, and true, for mixtures of experts: a row's rounding depends on the other rows of its batch.
    """
    settings = {k: v for k, v in config.to_dict().items() if k not in _VOLATILE}
    return {
        "name": public_name(name),
        "type": config.model_type,
        "config": _digest(json.dumps(settings, sort_keys=True, default=str).encode()),
        "weights": revision_of(config) or _digest(*(part for file in _weight_files(name) for part in _sample(file))),
        "dtype": dtype,
        "attention": attention,
        **({"batch_dependent": True} if any(site.kind == "router" for site in site_widths(config)) else {}),
        **versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the values of a forward pass."""
    return {"torch": version("torch").partition("+")[0], "transformers": version("transformers")}


def revision_of(config: Any) -> str | None:
    """The hub's commit that a configuration came from, or None for local models."""
    return getattr(config, "_commit_hash", None)


def recorded_revision(recorded: dict[str, object]) -> str | None:
    """The hub's commit in what a store says about its model; None if that was a local model."""
    weights = str(recorded.get("weights"))
    return weights if re.fullmatch(r"[0-9a-f]{40}", weights) else None


def tokenizer_digest(name: str, revision: str | None) -> str | None:
    """Digest of the vocabulary that the model brings, or None if it brings none that can be read."""
    try:
        return load_tokenizer(name, revision).digest
    except TokensError:
        return None


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` needs: a directory or hub id, and options. A hub id's `revision` becomes its commit."""
    from huggingface_hub import hf_hub_download

    path = model_path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise CaptureError(f"model {name}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CaptureError(f"model {name}: the directory has no config.json, so it is not a transformers model")
        return str(path), {}
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise CaptureError(f"model {name}: no such directory; give a hub id, a model directory or a .gguf file")
    offline = hub_is_out_of_reach()
    with _loading(name):
        file = hf_hub_download(name, "config.json", revision=revision, local_files_only=offline)
    return name, {"local_files_only": offline, "revision": Path(file).parent.name}


@contextmanager
def _loading(name: str) -> Generator[None]:
    """Turn whatever loading raises into one line, and keep `transformers` from printing meanwhile."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except ImportError as e:
        raise CaptureError(f"model {name}: needs more packages: {one_line(e)}; pip install gguf accelerate") from e
    except Exception as e:  # transformers, gguf and safetensors raise what they meet in a damaged file
        where = "can't be read" if model_path(name).exists() else "no such directory, and the hub gave none"
        raise CaptureError(f"model {name}: {where}: {one_line(e)}") from e
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _weight_files(name: str) -> list[Path]:
    path = model_path(name)
    if path.is_file():
        return [path]
    if files := sorted(path.glob("*.safetensors")):
        return files
    raise CaptureError(f"model {name}: no .safetensors file; save it again with model.save_pretrained")


def _sample(file: Path) -> list[bytes]:
    size = file.stat().st_size
    parts = [file.name.encode() if file.suffix == ".safetensors" else b"", str(size).encode()]
    with file.open("rb") as f:
        for i in range(_SAMPLES):
            f.seek(max(0, size - _SAMPLE_BYTES) * i // max(_SAMPLES - 1, 1))
            parts.append(f.read(_SAMPLE_BYTES))
    return parts


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
