"""Text to token table: everything that decides order happens here, where data is 1,000 times smaller.

`sources` finds files, `documents` reads them, `pack` makes sequences, `spool` keeps them until `build` writes the table
in keyed order. `table` reads it, and `rule` and `rows` number its rows.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from actstore.tokens.config import TokenizeConfig

if TYPE_CHECKING:
    from actstore.tokens.build import tokenize
    from actstore.tokens.rows import Rows, Span, row_starts, rows_in, span_of
    from actstore.tokens.rule import RowRule, kept
    from actstore.tokens.table import TokenTable, copy_tokens, open_tokens

__all__ = [
    "RowRule",
    "Rows",
    "Span",
    "TokenTable",
    "TokenizeConfig",
    "copy_tokens",
    "kept",
    "open_tokens",
    "row_starts",
    "rows_in",
    "span_of",
    "tokenize",
]


def __getattr__(name: str) -> object:
    """Load what is heavy only when it is asked for: the command line needs the settings alone."""
    if name in __all__:
        for module in ("rule", "table", "rows", "build"):
            found = getattr(import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
