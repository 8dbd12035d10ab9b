"""The settings of `actstore tokenize`; importing this module loads no deep-learning library."""

import operator
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

MIN_SEQ_LEN, MAX_SEQ_LEN = 2, 1 << 20

Packing = Literal["joined", "separate", "ready"]


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Turn documents into a token table."""

    sources: Positional[tuple[str, ...]]
    """Text: builtin, builtin-heldout, or paths or fsspec URLs of .parquet, .jsonl and .json (JSON lines), .txt (a file
    is a document) and .arrow (a saved Hugging Face data set) files, .gz and .zst of the text ones, or directories."""
    tokenizer: str
    """builtin, a hub id, a local directory, or a .gguf file."""
    out: str
    """Where the token table goes: a directory or an fsspec URL."""
    seq_len: int = 1024
    """Tokens per sequence, BOS included. Gemma Scope used 1024."""
    packing: Packing = "joined"
    """joined: documents follow each other with EOS between them, cut where a sequence is full. separate: no sequence
    holds two documents; ends are padded. ready: each document's input_ids are one sequence, stored as they are."""
    bos: bool = True
    """Put BOS first in every sequence, where the tokenizer has one; not with ready."""
    seed: int = 0
    """Key of the order of sequences."""
    skip_first: int = 0
    """So many tokens at the start of every sequence are never rows; BOS counts as one, padding does not."""
    skip_ids: tuple[int, ...] = ()
    """Token ids that are never rows, wherever they are, beside BOS, EOS and padding where packing put them."""
    text_column: str = "text"
    """Column or field that holds the text; a column `input_ids` is used instead where this one is missing or null."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do about a malformed document: end with an error, or leave it out and count it."""

    def __post_init__(self) -> None:
        """Check the fields, and make integers of other kinds plain ones; `ValueError` names the field."""
        for name in ("seq_len", "seed", "skip_first"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        object.__setattr__(self, "skip_ids", tuple(_integer("skip_ids", i) for i in self.skip_ids))
        if not self.sources or not all(self.sources):
            raise ValueError("sources is empty: name at least one file or directory of text")
        if not str(self.out).strip():
            raise ValueError("out is empty: name the directory or URL of the token table")
        if not MIN_SEQ_LEN <= self.seq_len <= MAX_SEQ_LEN:
            raise ValueError(f"seq_len is {self.seq_len}, expected {MIN_SEQ_LEN} to {MAX_SEQ_LEN}")
        if not 0 <= self.skip_first < self.seq_len:
            raise ValueError(f"skip_first is {self.skip_first}, expected 0 to {self.seq_len - 1}, below seq_len")
        if any(i < 0 for i in self.skip_ids):
            raise ValueError(f"skip_ids holds {min(self.skip_ids)}, expected token ids, which are not negative")


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]  what has no index raises
    except TypeError as e:
        raise ValueError(f"{name} is {value!r:.40}, expected a whole number") from e
