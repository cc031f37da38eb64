"""Recipes: named YAML files of settings, with a header that says where they come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict

from longtail.config.schema import Config, parse_config, validate
from longtail.errors import LongtailError, did_you_mean


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; the first value would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for position, key in enumerate(keys) if key in keys[:position]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class About:
    """A recipe's header."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    summary: str
    """One line."""
    paper: str = ""
    """Source of the protocol."""
    command: str = ""
    """The exact command."""
    expected: str = ""
    """Expected score; «paper» marks one that was published and not run here."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named configuration with its header."""

    name: str
    about: About
    config: Config


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """Read a recipe by name, or from a file that ends in ``.yaml``.

    Raises:
        LongtailError: there is no such recipe or file, or a field in it is wrong.
    """
    path, values = _find(name)
    about = _header(path, values)
    return Recipe(name=path.stem, about=about, config=parse_config({**values, "recipe": path.stem}, path.name))


def load_header(name: str) -> About:
    """Read the header of a recipe without checking its settings, which would import their methods."""
    path, values = _find(name)
    return _header(path, values)


def _find(name: str) -> tuple[Path, dict[str, Any]]:
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        if name not in recipe_names():
            raise LongtailError(f"recipe '{name}' is not known{did_you_mean(name, recipe_names())}")
        path = RECIPES / f"{name}.yaml"
    return path, _read_yaml(path)


def _header(path: Path, values: dict[str, Any]) -> About:
    about: About = validate(About, values.pop("about", {"summary": f"recipe in {path.name}"}), f"{path.name}: about")
    return about


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe's values; ``base: NAME`` starts from another recipe's."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise LongtailError(f"recipe {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise LongtailError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise LongtailError(f"recipe {path}: expected fields with values, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if base not in recipe_names():
        raise LongtailError(f"recipe {path}: base '{base}' is not known{did_you_mean(str(base), recipe_names())}")
    merged = _read_yaml(RECIPES / f"{base}.yaml")
    merged.pop("about", None)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def read_config(path: Path) -> Config:
    """Read the ``config.yaml`` of a run.

    Raises:
        LongtailError: it cannot be read, or is another version's.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LongtailError(
            f"{path}: cannot be read as a run's configuration: {' '.join(str(error).split())}"
        ) from None
    try:
        return parse_config(values, str(path))
    except LongtailError as error:
        raise LongtailError(
            f"{error} (of a plugin? name its file with --plugin; of another version? train it again with --overwrite)"
        ) from None
