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
import hashlib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
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
        base: place of the class of the parts; any object is one if not given.
        classes: parts are classes that derive from it, not instances.
        check: place of a function of kind, name and part that raises LongtailError for one that cannot be used.
    """

    def __init__(
        self, kind: str, builtin: Mapping[str, str], base: str = "", classes: bool = False, check: str = ""
    ) -> None:
        self.kind, self._base, self._classes, self._check = kind, base, classes, check
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
        if _running:
            _running[-1].parts.add((self.kind, name))

    def register(self, name: str) -> Callable[[Part], Part]:
        """Return a decorator that registers a part under ``name``.

        Raises:
            LongtailError: another part has the name, or it is no part of this kind.
        """

        def add(part: Part) -> Part:
            place = f"{getattr(part, '__module__', '')}:{getattr(part, '__qualname__', '')}"
            known = self._parts.get(name)
            if known is not None and known is not part:
                raise LongtailError(f"{self.kind} '{name}': is registered already; choose another name")
            self.add(name, place)
            try:
                self._check_part(name, part)
            except LongtailError:
                del self._known[name]
                raise
            self._parts[name] = part
            return part

        return add

    def _check_part(self, name: str, part: object) -> None:
        if self._base:
            base: type = _attribute(self._base)
            derives = isinstance(part, type) and issubclass(part, base)
            if not (derives if self._classes else isinstance(part, base)):
                expected = f"a class derived from {base.__name__}" if self._classes else f"an object of {base.__name__}"
                raise LongtailError(f"{self.kind} '{name}': expected {expected}, got {part!r}")
        if self._check:
            _attribute(self._check)(self.kind, name, part)

    def __getitem__(self, name: str) -> Part:
        """Return the part of that name.

        Raises:
            LongtailError: there is none.
        """
        self.check(name, self.kind)
        if name not in self._parts:
            self._parts[name] = _attribute(self._places[name])
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


def _attribute(place: str) -> Any:
    """Return what ``module:attribute`` names."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


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
    base="longtail.methods.base:Method",
    classes=True,
    check="longtail.config.schema:check_part",
)
"""Training methods."""

TASKS: Registry[Task[Any]] = Registry(
    "task", {}, base="longtail.tasks.base:Task", check="longtail.config.schema:check_part"
)
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
    base="longtail.data.sources:Source",
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
    base="longtail.data.transforms:Transform",
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


@dataclass(frozen=True)
class _Plugin:
    """A file that registers parts."""

    path: str
    digest: str
    """Of what was run."""
    parts: set[tuple[str, str]] = field(default_factory=set)
    """Kind and name of each; networks, which are registered with timm, are of the kind network."""


_plugins: list[_Plugin] = []
_running: list[_Plugin] = []


def plugins() -> tuple[str, ...]:
    """Return the files that :func:`load_plugin` has run, in order: another process runs them again."""
    return tuple(plugin.path for plugin in _plugins)


def load_plugins(paths: Iterable[str]) -> None:
    """Run several files that register parts, see :func:`load_plugin`."""
    for path in paths:
        load_plugin(path)


def plugins_of(parts: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return name and digest of the plugins that what is made of some parts depends on.

    A plugin without parts, or with a task, which the data choose, may change anything.

    Args:
        parts: kind and name of each; kind network for a network.
    """
    return [
        (Path(plugin.path).name, plugin.digest)
        for plugin in _plugins
        if not plugin.parts or any(part in parts or part[0] == TASKS.kind for part in plugin.parts)
    ]


def network_parts(*names: str) -> set[tuple[str, str]]:
    """Return the parts, for :func:`plugins_of`, of networks of these names."""
    # with arguments, a decoder or a tag a network's name is several words
    return {("network", word) for name in names for word in re.findall(r"\w+", name)}


def load_plugin(path: str | Path) -> None:
    """Run a Python file that registers parts.

    Raises:
        LongtailError: it cannot be read, or fails.
    """
    file = Path(path)
    resolved = str(file.resolve())
    # files of one name in several folders are several modules
    name = f"longtail_plugin_{file.stem}_{hashlib.blake2b(os.fsencode(resolved), digest_size=4).hexdigest()}"
    if not file.is_file():
        raise LongtailError(f"--plugin {file}: there is no such file; expected a Python file that registers parts")
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise LongtailError(f"--plugin {file}: expected a Python file, its name ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    _load_task_packages()  # before, so that what they register is not taken for the file's
    plugin = _Plugin(resolved, hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest())
    _running.append(plugin)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file's own code, which may do anything
        del sys.modules[name]
        message = " ".join(str(error).split())
        reason = message if isinstance(error, LongtailError) else f"{type(error).__name__}: {message}"
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == resolved]
        where = f" (line {lines[-1]})" if lines else ""
        raise LongtailError(f"--plugin {file}: {reason}{where}") from None
    finally:
        _running.pop()
    if "timm" in sys.modules:
        plugin.parts.update(("network", network) for network in sys.modules["timm"].list_models(module=name))
    _plugins.append(plugin)
