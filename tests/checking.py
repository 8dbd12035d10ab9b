"""The type checker that jaxtyping calls in tests.

beartype makes a checking function of each function that it is given, in a millisecond or two. It is given a nested
function every time the outer one runs, so a forward pass with hooks took longer to decorate than to compute. Nested
functions that name no shape go unchecked here; pyright checks their types.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let beartype check the function's arguments and result, if it names a shape or is not nested."""
    nested = "<locals>" in function.__qualname__
    return beartype(function) if not nested or any(map(names_a_shape, function.__annotations__.values())) else function


def names_a_shape(hint: Any) -> bool:
    """Whether there is a jaxtyping annotation in a type hint."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(names_a_shape, get_args(hint)))
