"""What the settings of a method or a task are: a section of the recipe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter
from pydantic.errors import PydanticUserError

from longtail.config.types import STRICT
from longtail.errors import LongtailError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one method or task: a section of a recipe, under the name of the method or task."""

    __pydantic_config__ = STRICT
    section: ClassVar[str]


@functools.cache
def check_settings(kind: Any, owner: str) -> None:
    """Raise LongtailError if a class cannot be a section.

    Args:
        kind: the class.
        owner: begins the message: "method 'gml'" for one.
    """
    if not (isinstance(kind, type) and issubclass(kind, Settings)):
        raise LongtailError(f"{owner}: settings_class: expected a class derived from longtail.config.Settings")
    where = f"{owner}: {kind.__name__}"
    if not isinstance(getattr(kind, "section", None), str):
        raise LongtailError(f'{where}: has no section; expected section: ClassVar[str] = "NAME"')
    if "__dataclass_fields__" not in vars(kind):
        raise LongtailError(f"{where}: is no dataclass; expected @dataclass(frozen=True, kw_only=True) above it")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise LongtailError(f"{where}.{field.name}: has no default; every setting needs one")
    try:
        TypeAdapter(kind)
        types = get_type_hints(kind)
    except (PydanticUserError, NameError) as error:
        raise LongtailError(f"{where}: {' '.join(str(error).split('For further')[0].split())}") from None
    for field in dataclasses.fields(kind):
        if {list, dict, set} & set(_origins(types[field.name])):
            raise LongtailError(f"{where}.{field.name}: settings never change; use tuple[X, ...], not a list or dict")


def _origins(kind: Any) -> Iterator[Any]:
    """Yield a type and those in it, each without its arguments."""
    yield get_origin(kind) or kind
    for argument in get_args(kind):
        yield from _origins(argument)
