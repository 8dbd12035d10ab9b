"""The built-in test bed: paths to a tiny Gemma 2 model and to its text, all shipped inside the package.

Importing this module reads nothing and imports no deep-learning library; README.md beside it says what the files are.
"""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
"""Directory of the model and its tokenizer, as `transformers` loads them."""

TRAIN_TEXT: Path = Path(__file__).parent / "text" / "train.parquet"
"""Documents (`source`, `title`, `text`) that the tokenizer and the model were trained on."""

HELDOUT_TEXT: Path = Path(__file__).parent / "text" / "heldout.parquet"
"""Documents of the same sources that no weight was fitted to."""

NAME = "builtin"
"""What command lines call the shipped model."""

TEXTS: dict[str, Path] = {NAME: TRAIN_TEXT, f"{NAME}-heldout": HELDOUT_TEXT}
"""What command lines call the shipped texts."""


def model_path(name: str) -> Path:
    """The shipped model for `builtin`, else the path that `name` may be."""
    return MODEL if name == NAME else Path(name).expanduser()


__all__ = ["HELDOUT_TEXT", "MODEL", "NAME", "TEXTS", "TRAIN_TEXT", "model_path"]
