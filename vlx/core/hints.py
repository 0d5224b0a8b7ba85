"""What the type hints of a configuration say."""

from __future__ import annotations

import types
import typing
from typing import Any


def without_none(hint: Any) -> tuple[Any, bool]:
    """The type of a value that is there, and whether it may be None. No other unions are read."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        (inner,) = [option for option in typing.get_args(hint) if option is not type(None)]
        return inner, True
    return hint, False
