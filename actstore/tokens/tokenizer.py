"""Tokenizers as packing needs them: text in, plain ids out, and the three special ids.

Text is data: a document that spells `<eos>` is encoded letter by letter, never as the special token, so no document
can forge a boundary.
"""

import hashlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from actstore.builtin import NAME, model_path
from actstore.errors import TokensError


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer reduced to what a token table depends on."""

    name: str
    """As given, without a machine's directories."""
    vocab_size: int
    """Added tokens included."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    """Falls back to EOS, then BOS."""
    digest: str
    """BLAKE2b-128 of the vocabulary (token strings by id): equal where ids mean the same."""
    encode: Callable[[list[str]], list[list[int]]]
    """Ids of each text, without special tokens."""


def load_tokenizer(name: str, revision: str | None = None) -> Tokenizer:
    """Load a tokenizer from a hub id, a local directory or a .gguf file; `TokensError` says why it can't be used.

    `revision` is the hub's commit, tag or branch; default main.
    """
    loaded = _load(name, revision)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise TokensError(f"tokenizer {name}: no fast version (tokenizer.json); convert it with transformers first")
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    bos, eos, pad = loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id
    return Tokenizer(
        name=public_name(name),
        vocab_size=len(loaded),
        bos_id=bos,
        eos_id=eos,
        pad_id=next((i for i in (pad, eos, bos) if i is not None), None),
        digest=_digest(backend.get_vocab(with_added_tokens=False)),
        encode=encode,
    )


def public_name(name: str) -> str:
    """The last part of a local path; a hub id, or `builtin`, as it is."""
    return name if name == NAME or not model_path(name).exists() else model_path(name).resolve().name


@cache
def hub_is_out_of_reach() -> bool:
    """Whether the hub's name can't even be resolved: its client would retry for 20 seconds a file to find out."""
    from huggingface_hub import constants

    if any(name.lower() in ("https_proxy", "all_proxy") for name in os.environ):
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _load(name: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    path = model_path(name)
    if name.endswith(".gguf") and not path.is_file():
        raise TokensError(f"tokenizer {name}: no such file")
    if path.is_dir() and not (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        raise TokensError(f"tokenizer {name}: the directory has no tokenizer.json")
    try:
        if name.endswith(".gguf"):
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        if path.is_dir():
            return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(
            name, revision=revision or "main", local_files_only=hub_is_out_of_reach(), trust_remote_code=False
        )
    except ImportError as e:
        raise TokensError(f"tokenizer {name}: needs more packages: {one_line(e)}; pip install gguf accelerate") from e
    except Exception as e:  # transformers and gguf raise what they meet in a damaged file
        raise TokensError(f"tokenizer {name}: no local directory, .gguf file or reachable hub id: {one_line(e)}") from e


def _digest(vocabulary: dict[str, int]) -> str:
    ordered = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]))
    return hashlib.blake2b(ordered.encode(), digest_size=16).hexdigest()


def one_line(error: BaseException) -> str:
    """The error's text without line breaks, cut at 240 characters; its type if that alone says what it is."""
    text = " ".join(str(error).split())[:240]
    if isinstance(error, KeyError):
        return f"{text} is missing"
    return text or type(error).__name__
