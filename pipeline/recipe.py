"""Recipes: one TOML file that says everything, validated as a whole before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from encode.config import DataConfig, EncodeConfig
from infer.config import InferConfig
from manifests.config import STRICT, ModelConfig
from manifests.errors import UsageError
from train.config import TrainConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A whole job. The sections are documented where they are defined, in `<stage>/config.py`."""

    model: ModelConfig
    encode: EncodeConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    infer: InferConfig = Field(default_factory=InferConfig)


_ADAPTER = TypeAdapter(Recipe)


def builtin_recipes() -> dict[str, str]:
    """Names of the built-in recipes and the first comment line of each."""
    folder = resources.files("pipeline") / "recipes"
    found = {}
    for item in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if item.name.endswith(".toml"):
            found[item.name.removesuffix(".toml")] = item.read_text().splitlines()[0].lstrip("# ")
    return found


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe file, or a built-in one by name, and apply `section.key=value` overrides in order.

    Values are TOML (`8`, `true`, `[1, 2]`); what is not TOML is taken as text. Raises `UsageError` naming the
    dotted key of every problem, with the nearest valid name for an unknown one.
    """
    values = _read(recipe)
    for override in overrides:
        _apply(values, override)
    return validate(values, recipe)


def validate(values: dict[str, Any], where: str) -> Recipe:
    """Turn plain values into a `Recipe`; `where` names their origin in errors."""
    try:
        return _ADAPTER.validate_python(values)
    except ValidationError as error:
        raise UsageError(f"recipe {where}: {_problems(error.errors())}") from None


def resolved(recipe: Recipe) -> dict[str, Any]:
    """The whole recipe with every default spelled out, as JSON-like values."""
    return _ADAPTER.dump_python(recipe, mode="json")


def to_toml(values: dict[str, Any]) -> str:
    """Write a resolved recipe as TOML that `load_recipe` reads back to the same recipe."""
    return tomli_w.dumps(_without_none(values))


def write_resolved(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe beside an output, whole or not at all; never over a recipe that a person wrote."""
    target, temporary = folder / "recipe.toml", folder / ".recipe.toml.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if target.exists() and not _is_resolved(target.read_bytes()):
            raise UsageError(f"output {folder}: {target} was not made by latentline; choose another folder, or move it")
        temporary.write_text(to_toml(resolved(recipe)), encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        raise UsageError(f"output {folder}: cannot be a folder to write to: {error.strerror or error}") from error


def _is_resolved(text: bytes) -> bool:
    """Whether a recipe is whole and as `to_toml` writes it, without a comment or a line of its own."""
    try:
        values = tomllib.loads(text.decode())
    except ValueError:
        return False
    sections = {field.name for field in dataclasses.fields(Recipe)}
    return sections <= values.keys() and tomli_w.dumps(values).encode() == text


def _without_none(value: Any) -> Any:
    """TOML has no null; every setting that can be None is None by default, so leaving it out says the same."""
    if isinstance(value, dict):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    return value


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe).expanduser()
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise UsageError(f"recipe {recipe}: cannot read this file: {reason}") from error
    elif recipe in builtin_recipes():
        text = (resources.files("pipeline") / "recipes" / f"{recipe}.toml").read_text()
    else:
        names = builtin_recipes()
        near = difflib.get_close_matches(recipe, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; built in: {', '.join(names)}"
        raise UsageError(f"recipe {recipe!r}: no such file or built-in recipe{hint}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe {recipe}: not valid TOML: {error}") from None


def _apply(values: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    names = dotted.strip().split(".")
    if not separator or not all(names):
        raise UsageError(f"--set {override!r}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for name in names[:-1]:
        child = values.setdefault(name, {})
        if not isinstance(child, dict):
            raise UsageError(f"--set {override!r}: {name!r} is a value, not a section")
        values = child
    values[names[-1]] = value


def _problems(errors: Sequence[Any]) -> str:
    """One clause a dotted key; a value that fits no member of a union has one error a member."""
    clauses: dict[str, list[str]] = {}
    for item in errors:
        location = _fields_only([str(part) for part in item["loc"]])
        dotted = ".".join(location)
        if item["type"] == "unexpected_keyword_argument":
            clauses[dotted] = [f"unknown key {dotted!r}{_hint(location)}"]
        elif item["type"] in ("missing", "missing_argument"):
            clauses[dotted] = [f"{dotted} is required"]
        else:
            message = item["msg"].removeprefix("Value error, ")
            known = clauses.setdefault(dotted, [])
            start = "" if known else f"{dotted} = {item['input']!r}: "
            known.append(f"{start}{message[0].lower()}{message[1:]}")
    return "; ".join(" or ".join(parts) for parts in clauses.values())


def _hint(location: Sequence[str]) -> str:
    """The key of that name deeper in the section, else a near name beside it, else that name anywhere."""
    name, section = location[-1], location[:-1]
    same = [path for path in _all_keys() if path.rsplit(".", 1)[-1] == name]
    inside = [path for path in same if path.split(".")[: len(section)] == list(section)]
    near = difflib.get_close_matches(name, list(_keys_at(section)), n=1)
    beside = [".".join([*section, near[0]])] if near else []
    best = [*inside, *beside, *same]
    return f", did you mean {best[0]!r}?" if best else ""


def _fields_only(location: list[str]) -> list[str]:
    """Drop what pydantic appends for the members of a union."""
    kind: Any = Recipe
    kept = []
    for part in location:
        members = [member for member in get_args(kind) if member is not type(None)]
        if get_origin(kind) is UnionType and len(members) == 1:
            kind = members[0]
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            break
        kept.append(part)
    return kept


def _keys_at(location: Sequence[str]) -> Iterator[str]:
    """Names of the fields of the section at a dotted path; a mapping's own keys are passed through."""
    kind: Any = Recipe
    for part in location:
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind).get(part)
        else:
            kind = (get_args(kind) or (None,))[-1]
    if dataclasses.is_dataclass(kind):
        yield from (field.name for field in dataclasses.fields(kind))


def _all_keys(kind: Any = Recipe, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(kind).items():
        if name.startswith("__"):
            continue
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _all_keys(hint, f"{prefix}{name}.")
