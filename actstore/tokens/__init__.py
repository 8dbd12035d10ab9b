"""Text to token table: everything that decides order happens here, where data is 1,000 times smaller."""

from actstore.tokens.build import tokenize
from actstore.tokens.config import TokenizeConfig
from actstore.tokens.rows import Rows, Span, row_starts, rows_in, rows_of, span_of
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
    "rows_of",
    "span_of",
    "tokenize",
]
