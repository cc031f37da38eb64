"""Named parts that a recipe can ask for: methods, tasks, data sources, augmentations. Imports no torch.

A part registers itself with a decorator, from a module of the package or of anybody's:

    @METHODS.register("half")
    class HalfAdjusted(Method): ...

The package's own parts are listed below by the place where they live and are imported when they are asked for, so that
``longtail --help`` does not wait for torch. What a task brings along (its methods, its data sources) is said by the
``__init__`` of its folder in ``longtail.tasks``. An unknown or doubled name is an error; nothing falls back to a
default.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from longtail.errors import LongtailError, did_you_mean

if TYPE_CHECKING:
    from longtail.data.samplers import ClassShares, ImageWeights
    from longtail.data.sources import Source
    from longtail.data.transforms import Transform
    from longtail.methods.base import Method
    from longtail.tasks.base import Task

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Parts of one kind by name.

    Args:
        kind: what the parts are, for messages: "method".
        builtin: where the package's own parts live, ``module:attribute`` by name.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self._known = dict(builtin)
        self._parts: dict[str, Part] = {}

    @property
    def _places(self) -> dict[str, str]:
        _load_task_packages()
        return self._known

    def add(self, name: str, place: str) -> None:
        """Register a part that is imported when it is asked for.

        Args:
            name: of the part.
            place: ``module:attribute``.

        Raises:
            LongtailError: another part has the name.
        """
        if self._known.setdefault(name, place) != place:
            raise LongtailError(f"{self.kind} '{name}': is registered already; choose another name")

    def register(self, name: str) -> Callable[[Part], Part]:
        """Return a decorator that registers a part under ``name``.

        Raises:
            LongtailError: another part has the name.
        """

        def add(part: Part) -> Part:
            place = f"{getattr(part, '__module__', '')}:{getattr(part, '__qualname__', '')}"
            known = self._parts.get(name)
            if known is not None and known is not part:
                raise LongtailError(f"{self.kind} '{name}': is registered already; choose another name")
            self.add(name, place)
            self._parts[name] = part
            return part

        return add

    def __getitem__(self, name: str) -> Part:
        """Return the part of that name.

        Raises:
            LongtailError: there is none.
        """
        self.check(name, self.kind)
        if name not in self._parts:
            module, _, attribute = self._places[name].partition(":")
            self._parts[name] = getattr(importlib.import_module(module), attribute)
        return self._parts[name]

    def check(self, name: str, where: str) -> None:
        """Raise a LongtailError that begins with ``where`` if there is no part of that name."""
        if name not in self._places:
            raise LongtailError(f"{where} '{name}' is not known{did_you_mean(name, self._places)}")

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


METHODS: Registry[type[Method]] = Registry(
    "method",
    {
        "ce": "longtail.methods.classifier:CrossEntropy",
        "la": "longtail.methods.classifier:LogitAdjustment",
        "focal": "longtail.methods.reweighting:Focal",
        "cb": "longtail.methods.reweighting:ClassBalanced",
        "ldam": "longtail.methods.ldam:LDAM",
        "experts": "longtail.methods.experts:ProductOfExperts",
        "supcon": "longtail.methods.supcon:SupCon",
        "paco": "longtail.methods.paco:PaCo",
        "gpaco": "longtail.methods.paco:GPaCo",
        "bcl": "longtail.methods.bcl:BCL",
        "proco": "longtail.methods.proco:ProCo",
        "gml": "longtail.methods.gml:GML",
    },
)
"""Training methods."""

TASKS: Registry[Task[Any]] = Registry("task", {})
"""What a network is trained to predict."""

SOURCES: Registry[Source] = Registry(
    "data.source",
    {
        "digits-lt": "longtail.data.sources.digits:DIGITS",
        "cifar10-lt": "longtail.data.sources.cifar:CIFAR10",
        "cifar100-lt": "longtail.data.sources.cifar:CIFAR100",
        "imagenet-lt": "longtail.data.sources.benchmarks:IMAGENET_LT",
        "places-lt": "longtail.data.sources.benchmarks:PLACES_LT",
        "inat2018": "longtail.data.sources.benchmarks:INAT2018",
        "folder": "longtail.data.sources.files:FOLDER",
        "list": "longtail.data.sources.files:LIST",
        "hub": "longtail.data.sources.hub:HUB",
    },
)
"""Data sets and kinds of them."""

TRANSFORMS: Registry[Transform] = Registry(
    "augmentation",
    {
        "none": "longtail.data.transforms.batched:NONE",
        "digits": "longtail.data.transforms.batched:DIGITS",
        "cifar": "longtail.data.transforms.batched:CIFAR",
        "cifar-plain": "longtail.data.transforms.batched:CIFAR_PLAIN",
        "cifar-rand": "longtail.data.transforms.batched:CIFAR_RAND",
        "photo": "longtail.data.transforms.batched:PHOTO",
        "imagenet": "longtail.data.transforms.per_image:IMAGENET",
        "imagenet-contrast": "longtail.data.transforms.per_image:IMAGENET_CONTRAST",
    },
)
"""Augmentations."""


SAMPLERS: Registry[ClassShares | ImageWeights] = Registry(
    "data.sampler",
    {
        **{
            name: f"longtail.data.samplers:{name}_shares"
            for name in ("instance", "class", "sqrt", "progressive", "deferred")
        },
        "repeat_factor": "longtail.data.samplers:REPEAT_FACTOR",
    },
)
"""How often an epoch shows each class."""


@functools.cache
def _load_task_packages() -> None:
    """Import the folders in ``longtail.tasks``, which register what they bring; none of them imports torch."""
    package = importlib.import_module("longtail.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            importlib.import_module(f"longtail.tasks.{module.name}")


_plugins: list[str] = []


def plugins() -> tuple[str, ...]:
    """Return the files that :func:`load_plugin` has run, in order: another process runs them again."""
    return tuple(_plugins)


def load_plugin(path: str | Path) -> None:
    """Run a Python file that registers parts.

    Raises:
        LongtailError: it cannot be read, or fails.
    """
    file = Path(path)
    name = f"longtail_plugin_{file.stem}"
    if not file.is_file():
        raise LongtailError(f"--plugin {file}: there is no such file; expected a Python file that registers parts")
    if getattr(sys.modules.get(name), "__file__", None) == str(file.resolve()):
        return
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    if spec is None or spec.loader is None:
        raise LongtailError(f"--plugin {file}: expected a Python file, its name ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        _plugins.append(str(file.resolve()))
    except LongtailError:
        del sys.modules[name]
        raise
    except Exception as error:  # the file's own code, which may do anything
        del sys.modules[name]
        raise LongtailError(f"--plugin {file}: {type(error).__name__}: {' '.join(str(error).split())}") from None
