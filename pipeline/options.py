"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

import typer

from manifests.errors import UsageError
from pipeline.recipe import Recipe, builtin_recipes, load_recipe

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a built-in recipe's name.")]
CacheArgument = Annotated[
    str, typer.Argument(metavar="CACHE|RECIPE", help="A cache's path or URL, or a recipe.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. train.lora.rank=16; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def recipe_of(name: str, overrides: Sequence[str]) -> Recipe | None:
    """The recipe, if a `CACHE|RECIPE` argument names one."""
    if name.endswith(".toml") or name in builtin_recipes():
        return load_recipe(name, overrides)
    return None


def cache_url(name: str, overrides: Sequence[str]) -> str:
    """The cache that a `CACHE|RECIPE` argument names."""
    recipe = recipe_of(name, overrides)
    return recipe.encode.cache if recipe else name


def seconds_of(text: str, option: str) -> float:
    """Read a duration such as `90s`, `30m`, `24h` or `7d`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if match is None:
        raise UsageError(f"{option} {text!r}: write a number and s, m, h or d, such as 24h")
    return float(match.group(1)) * _SECONDS[match.group(2)]
