"""Settings that are given and change nothing, because of the other settings."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from longtail.config import Config, load_recipe, recipe_names
from longtail.methods.base import Method
from longtail.nn.network_name import is_decoder_network, is_timm_network
from longtail.registry import METHODS

_Condition = Callable[[Config, type[Method]], bool]


def _trains_teacher(config: Config, method: type[Method]) -> bool:
    return method.needs_teacher(config) and config.teacher.sources == ("train",)


def _distils(config: Config, method: type[Method]) -> bool:
    return method.distillation_weight(config) > 0


def _distils_several_views(config: Config, method: type[Method]) -> bool:
    return _distils(config, method) and method.view_plan(config).num_classified > 1


def _plans_by_every_view(config: Config, method: type[Method]) -> bool:
    other = config.replace(classifier={"every_view": not config.classifier.every_view})
    return method.view_plan(config) != method.view_plan(other)


def _trains_layers_of_timm(config: Config, _method: type[Method]) -> bool:
    # of a network KIND:ENCODER the layers are not told apart
    whole_images = not is_decoder_network(config.network)
    return config.tune != "head" and whole_images and is_timm_network(config.network)


def _is(name: str, *values: str) -> _Condition:
    """Return the condition that a setting has one of these values."""
    return lambda config, _: operator.attrgetter(name)(config) in values


def _is_not(name: str, *values: str) -> _Condition:
    """Return the condition that a setting has another value; a plugin's part may use what none of ours does."""
    return lambda config, _: operator.attrgetter(name)(config) not in values


_HAS_EFFECT: Mapping[str, _Condition] = {
    "teacher.network": _trains_teacher,
    "teacher.count": _trains_teacher,
    "teacher.generations": _trains_teacher,
    "teacher.cache": lambda config, method: method.needs_teacher(config),
    "teacher.distillation_temperature": _distils,
    "classifier.every_view": _plans_by_every_view,
    "classifier.distill_every_view": _distils_several_views,
    "schedule.milestones": _is("schedule.name", "multistep"),
    "schedule.gamma": _is("schedule.name", "multistep"),
    "optimizer.momentum": _is("optimizer.name", "sgd"),
    "optimizer.nesterov": _is("optimizer.name", "sgd"),
    "optimizer.layer_decay": _trains_layers_of_timm,
    "optimizer.rho": _is_not("optimizer.sharpness", "none"),
    "optimizer.sharpness_below": _is("optimizer.sharpness", "imbsam"),
    "optimizer.sharpness_gamma": _is("optimizer.sharpness", "focal"),
    "optimizer.sharpness_weight": _is("optimizer.sharpness", "focal"),
    "mixing.alpha": _is_not("mixing.kind", "none"),
    "mixing.probability": _is_not("mixing.kind", "none"),
    "mixing.until": _is_not("mixing.kind", "none"),
    "mixing.count_ratio": _is("mixing.kind", "remix"),
    "mixing.threshold": _is("mixing.kind", "remix"),
    "data.deferred_from": _is_not("data.sampler", "instance", "class", "sqrt", "progressive", "repeat_factor"),
    "data.repeat_threshold": _is_not("data.sampler", "instance", "class", "sqrt", "progressive", "deferred"),
    "feature_views": _is("tune", "head"),
    "second_stage_fraction": _is_not("second_stage", "none"),
}
"""The condition under which a setting has an effect; every other setting has one, or its remark is elsewhere."""


def remarks_on_unused(config: Config, methods: Sequence[str] = ()) -> list[str]:
    """Return one remark on the settings that are given and have no effect; empty if there are none.

    Given is what is neither the default nor the recipe's own value: a recipe is for several methods.

    Args:
        config: settings of the run, without open ones.
        methods: those that have the settings in common, in a comparison; what one of them uses is not remarked on.
    """
    default = load_recipe(config.recipe).config if config.recipe in recipe_names() else Config()
    each = [config.replace(method=name) for name in dict.fromkeys((config.method, *methods))]
    names = [
        name
        for name, has_effect in _HAS_EFFECT.items()
        if _is_given(operator.attrgetter(name), config, default)
        and not any(has_effect(settings, METHODS[settings.method]) for settings in each)
    ]
    unused = [f"{name} {_shown(operator.attrgetter(name)(config))}" for name in names]
    unused += _of_other_methods(config, default, {METHODS[settings.method].settings_class for settings in each})
    return [f"{', '.join(unused)}: without effect with the other settings"] if unused else []


def _is_given(value_of: Callable[[Config], Any], config: Config, default: Config) -> bool:
    return value_of(config) not in (value_of(default), value_of(Config()))


def _of_other_methods(config: Config, default: Config, used: set[type[Any] | None]) -> Iterator[str]:
    """Yield what is given of the settings of methods that are not trained."""
    for section in config.settings:
        if section.section not in METHODS or type(section) in used:
            continue
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if value not in (field.default, getattr(default.section(type(section)), field.name)):
                yield f"{section.section}.{field.name} {_shown(value)}"


def _shown(value: object) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
