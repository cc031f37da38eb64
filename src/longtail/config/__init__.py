"""Settings and recipes; imports no torch."""

from longtail.config.auto_method import choose_method
from longtail.config.optimization import Mixing, Optimizer, Schedule
from longtail.config.recipes import About, Recipe, load_header, load_recipe, read_config, recipe_names
from longtail.config.schema import (
    FLAGS,
    Classifier,
    Config,
    Data,
    Shots,
    field_names,
    first_stage_epochs,
    parse_config,
    settings_type,
    settings_types,
    validate_section,
)
from longtail.config.sections import Settings
from longtail.config.teacher import Teacher
from longtail.config.types import Fraction, Positive, PositiveFloat, Weight

__all__ = [
    "FLAGS",
    "About",
    "Classifier",
    "Config",
    "Data",
    "Fraction",
    "Mixing",
    "Optimizer",
    "Positive",
    "PositiveFloat",
    "Recipe",
    "Schedule",
    "Settings",
    "Shots",
    "Teacher",
    "Weight",
    "choose_method",
    "field_names",
    "first_stage_epochs",
    "load_header",
    "load_recipe",
    "parse_config",
    "read_config",
    "recipe_names",
    "settings_type",
    "settings_types",
    "validate_section",
]
