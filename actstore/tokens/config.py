"""The settings of `actstore tokenize`; importing this module loads no deep-learning library."""

from dataclasses import dataclass

from tyro.conf import Positional

MIN_SEQ_LEN, MAX_SEQ_LEN = 2, 1 << 20


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Turn documents into a token table."""

    sources: Positional[tuple[str, ...]]
    """Text: builtin, builtin-heldout, or paths or fsspec URLs of .parquet, .jsonl, .txt (a file is a document) and
    .arrow (a saved Hugging Face data set) files, .gz and .zst of the text ones, or directories of them."""
    tokenizer: str
    """builtin, a hub id, a local directory, or a .gguf file."""
    out: str
    """Where the token table goes: a directory or an fsspec URL."""
    seq_len: int = 1024
    """Tokens per sequence, BOS included. Gemma Scope used 1024."""
    seed: int = 0
    """Key of the order of sequences."""
    text_column: str = "text"
    """Column or field that holds the text; a column `input_ids` is used instead where this one is missing."""

    def __post_init__(self) -> None:
        """Check the numbers; `ValueError` names the field."""
        if not self.sources:
            raise ValueError("sources is empty: name at least one file or directory of text")
        if not MIN_SEQ_LEN <= self.seq_len <= MAX_SEQ_LEN:
            raise ValueError(f"seq_len is {self.seq_len}, expected {MIN_SEQ_LEN} to {MAX_SEQ_LEN}")
