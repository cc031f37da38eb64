"""From arguments to options: tyro with errors of one line, recipes, data sources and plugins."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from longtail.cli.parse_errors import one_line
from longtail.errors import LongtailError

if TYPE_CHECKING:
    from longtail.config import Config, Data, Recipe

Options = TypeVar("Options")


def parse(kind: type[Options], command: str, arguments: Sequence[str], default: Options | None = None) -> Options:
    """Parse with tyro; its boxed messages become one line."""
    import tyro

    keywords: dict[str, Any] = {"prog": f"longtail {command}", "args": list(arguments), "use_underscores": True}
    keywords["registry"] = _without_none()
    hinted = _with_hints(kind)
    if default is not None:
        keywords["default"] = _converted(default, hinted)
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output), _joined_lines():
            options = tyro.cli(hinted, **keywords)
    except SystemExit as stop:
        if stop.code in {0, None}:
            raise
        raise LongtailError(one_line(output.getvalue(), command)) from None
    return _converted(options, kind)


def _without_none() -> Any:
    """Return tyro's rules, but without ``{None}`` in the help of what need not be given."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry, inside = ConstructorRegistry(), [False]

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if inside[0] or type(None) not in get_args(info.type):
            return None
        inside[0] = True  # which leaves it to tyro's own rules
        try:
            spec = ConstructorRegistry.get_primitive_spec(info)
        finally:
            inside[0] = False
        if not isinstance(spec, PrimitiveConstructorSpec):
            return None
        return dataclasses.replace(spec, metavar=spec.metavar.removeprefix("{None}|").replace("{None,", "{"))

    return registry


def _with_hints(kind: type[Options]) -> type[Options]:
    """Return a type of options whose help shows no default where it would say «None», or «False» of a plain flag."""
    import tyro

    types, fields = get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        annotated = types[field.name]
        inner, *extras = get_args(annotated) if get_origin(annotated) is Annotated else (annotated,)
        default, factory = field.default, field.default_factory
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            inner = _with_hints(inner)
            if factory is not dataclasses.MISSING:
                factory = functools.partial(_default_section, factory, inner)
        else:
            is_flag = tyro.conf.FlagCreatePairsOff in extras
            extras.append(tyro.conf.arg(help_behavior_hint="" if is_flag else _hint))
        default = dataclasses.field(default=default, default_factory=factory)
        fields.append((field.name, Annotated[(inner, *extras)] if extras else inner, default))
    made = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True, kw_only=True)
    # tyro shows no docstring that a dataclass has by default, which it recognises by the name and the signature
    automatic = kind.__name__ + str(inspect.signature(kind)).replace(" -> None", "")
    made.__doc__ = "" if kind.__doc__ == automatic else kind.__doc__
    return made


def _converted(options: Any, kind: type[Options]) -> Options:
    """Return options as those of another type with the same fields, see :func:`_with_hints`."""
    types, values = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        inner, value = types[field.name], getattr(options, field.name)
        is_section = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        values[field.name] = _converted(value, inner) if is_section else value
    return kind(**values)


def _default_section(factory: Callable[[], Any], kind: type[Options]) -> Options:
    return _converted(factory(), kind)


def _hint(default: str) -> str:
    return "" if default in {"None", ""} else f"(default: {default})"


@contextlib.contextmanager
def _joined_lines() -> Iterator[None]:
    """Let help be wrapped to the terminal: tyro joins only some of the lines of a docstring."""
    import docstring_parser  # of tyro

    parse_from_object, auto = docstring_parser.parse_from_object, docstring_parser.DocstringStyle.AUTO

    def without_indentation(obj: Any, style: docstring_parser.DocstringStyle = auto) -> docstring_parser.Docstring:
        parsed = parse_from_object(obj, style)
        for field in parsed.params:
            # of lines that begin with a number or a sign it would leave the breaks
            field.description = field.description and re.sub(r"\n+", " ", inspect.cleandoc(field.description))
        return parsed

    docstring_parser.parse_from_object = without_indentation
    try:
        yield
    finally:
        docstring_parser.parse_from_object = parse_from_object


def parse_with_config(
    kind: type[Options], command: str, arguments: Sequence[str], config: Config, hidden: Sequence[str] = ()
) -> tuple[Options, Config]:
    """Parse the options of a command that has a field ``config``, with the sections of all methods and tasks as flags.

    Args:
        kind: type of the options.
        command: its name.
        arguments: of the command line.
        config: the defaults.
        hidden: fields of the configuration that the help does not show, since the command refuses them.

    Returns:
        The options, whose ``config`` is not to be used, and the checked configuration.
    """
    import tyro

    from longtail.config import FLAGS, Config, parse_config, settings_types

    sections = settings_types()
    fields: list[Any] = [
        (name, section, dataclasses.field(default_factory=section)) for name, section in sorted(sections.items())
    ]
    types = get_type_hints(Config, include_extras=True) if hidden else {}
    fields += [
        (name, Annotated[types[name], tyro.conf.Suppress], dataclasses.field(default=getattr(config, name)))
        for name in hidden
    ]
    flags = dataclasses.make_dataclass("Flags", fields, bases=(Config,), frozen=True, kw_only=True)
    core = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config) if f.name != "settings"}
    default = flags(**core, **{name: config.section(section) for name, section in sections.items()})
    # the type of the field is known only now, since plugins may have added methods
    field: Any = Annotated[flags, tyro.conf.arg(name="")]
    namespace = {"__doc__": kind.__doc__}
    special: Any = dataclasses.make_dataclass(
        kind.__name__, [("config", field)], bases=(kind,), namespace=namespace, frozen=True, kw_only=True
    )
    options = parse(special, command, arguments, special(config=default))
    values = dataclasses.asdict(options.config)
    values.pop("settings")
    return options, parse_config(values, FLAGS)


def split_recipe(arguments: Sequence[str], default: str) -> tuple[str, list[str]]:
    """Return the name of the recipe, the first argument if it is not a flag, and the other arguments."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return default, list(arguments)


def recipe_with_data(arguments: Sequence[str], default: str) -> tuple[Recipe, list[str]]:
    """Return the recipe with its data replaced by ``--data SOURCE``, and the other arguments.

    Without a recipe's name ``--data`` selects the recipe for your own data, or that of the set itself where its images
    have labels of pixels or boxes. A folder or a table in place of the recipe's name is taken as ``--data``.
    """
    from longtail.config import load_recipe, recipe_names
    from longtail.data.source_spec import TABLES, source_of

    name, rest = split_recipe(arguments, default)
    if name not in recipe_names() and Path(name).suffix not in {".yaml", ".yml"}:
        is_data = name.startswith("hub:") or "/" in name or Path(name).suffix.lower() in TABLES
        if is_data or Path(name).exists():
            name, rest = default, ["--data", *arguments]
    recipe, named = load_recipe(name), len(rest) < len(arguments)
    for place, argument in enumerate(rest):
        if argument != "--data" and not argument.startswith("--data="):
            continue
        width = 1 if "=" in argument else 2
        text = argument.partition("=")[2] if width == 1 else next(iter(rest[place + 1 : place + 2]), "")
        if not text or text.startswith("--"):
            raise LongtailError("--data: expected a named set, a folder, a list, a table or hub:NAME")
        changes = source_of(text)
        recipe = recipe if named else _recipe_for(changes)
        # the run is named after the data; what follows a dot in the name of a folder is not the kind of a file
        path = Path(text.removeprefix("hub:")).resolve()
        name = path.stem if path.suffix.lower() in TABLES and not path.is_dir() else path.name
        rest = rest[:place] + rest[place + width :]
        return dataclasses.replace(recipe, name=name, config=recipe.config.replace(data=changes)), rest
    return recipe, rest


def _recipe_for(changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe for the fields of ``data`` that ``--data`` stands for."""
    from longtail.config import load_recipe, recipe_names

    source = changes["source"]
    if source not in recipe_names():
        return load_recipe("folder")
    recipe = load_recipe(source)
    # fine-tuning a network for whole images, as the recipe for folders does, suits any set of whole images
    return recipe if "root" in changes or ":" in recipe.config.network else load_recipe("folder")


def split_source(command: str, arguments: Sequence[str]) -> tuple[Data, list[str]]:
    """Return the data that SOURCE stands for, and the other arguments."""
    from longtail.config import Data, load_recipe, recipe_names
    from longtail.data.source_spec import source_of

    if arguments and arguments[0] in recipe_names() and arguments[0] != "folder":
        return load_recipe(arguments[0]).config.data, list(arguments[1:])  # the tail that training on it would have
    if {"-h", "--help"} & set(arguments):
        return Data(), list(arguments)
    if not arguments or arguments[0].startswith("-"):
        raise LongtailError(
            f"SOURCE: expected a named set, a folder, a list, a table or hub:NAME (longtail {command} --help)"
        )
    return Data(**source_of(arguments[0])), list(arguments[1:])


def load_plugins(arguments: Sequence[str]) -> list[str]:
    """Run the files named by ``--plugin FILE`` and return the other arguments."""
    from longtail.registry import load_plugin

    rest, pending = [], list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument == "--plugin":
            if not pending:
                raise LongtailError("--plugin: expected a Python file that registers methods, tasks or data sources")
            load_plugin(pending.pop(0))
        elif argument.startswith("--plugin="):
            load_plugin(argument.partition("=")[2])
        else:
            rest.append(argument)
    return rest
