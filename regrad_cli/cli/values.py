"""Reads the values of options and arguments as str, int, float, Path or a choice. Knows no command.

Recent versions of Typer read every value, even one that was left out, through pydantic, whose import costs `bank stats`
more than all of its own work (0.1 to 0.15 s on 2 cores). Handing each parameter its reader beforehand keeps pydantic
out; a test looks at `sys.modules`, so that a Typer that no longer asks for this reader is noticed.
"""

import math
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import typer

_NAMES = {int: "a whole number", float: "a number"}


class Reader:
    """One parameter's reader, in the place where Typer keeps its own."""

    def __init__(self, annotation: Any, minimum: float | None) -> None:
        self.kind = _plain_type(annotation)
        self.minimum = minimum

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        """A parsed value (text, a tuple of texts, a default, or None) as the declared type.

        raises  typer.BadParameter where the text is none of that type
        """
        many = param.multiple or param.nargs == -1
        if value is None:
            return [] if many else None
        if many:
            return [self._one(each, param, ctx) for each in value]
        return self._one(value, param, ctx)

    def _one(self, value: Any, param: Any, ctx: Any) -> Any:
        if issubclass(self.kind, Enum):
            if isinstance(value, self.kind):
                return value
            choices = [member.value for member in self.kind]
            if value not in choices:
                raise typer.BadParameter(f"'{value}' is not one of {', '.join(choices)}", ctx=ctx, param=param)
            return self.kind(value)
        if self.kind is Path and value == "":
            raise typer.BadParameter("a path is empty; . is this folder", ctx=ctx, param=param)
        if self.kind in (str, Path):
            return self.kind(value)
        if self.kind is bool:
            return bool(value)
        try:
            number = self.kind(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or (self.minimum is not None and number < self.minimum):
            least = "" if self.minimum is None else f" of at least {self.minimum:g}"
            raise typer.BadParameter(f"'{value}' is not {_NAMES[self.kind]}{least}", ctx=ctx, param=param)
        return number


def _plain_type(annotation: Any) -> Any:
    """`T` for T, T | None and list[T]."""
    inner = [each for each in get_args(annotation) if each is not NoneType]
    return _plain_type(inner[0]) if inner else annotation


def read_plainly(parameters: list[Any]) -> list[Any]:
    """The same parameters, those of a plain type with their reader; a Typer without a place for it needs none."""
    for parameter in parameters:
        descriptor = getattr(parameter, "type_descriptor", None)
        if descriptor is None or getattr(parameter, "_runtime_param", True) is not None:
            continue
        kind = _plain_type(descriptor.annotation)
        if isinstance(kind, type) and issubclass(kind, str | int | float | Path):
            parameter._runtime_param = Reader(kind, getattr(descriptor.parameter_info, "min", None))
    return parameters
