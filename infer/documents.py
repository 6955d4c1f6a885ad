"""JSON, JSONL and YAML as plain values, strictly: a key given twice or a number that is none is an error.

Each value comes with its place in the file, for errors about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from manifests.errors import UsageError

SAMPLES = "samples"
"""The key of the older form, {defaults, "samples": {name: object}}."""


def read_documents(path: Path) -> list[tuple[str, Any]]:
    """(place, value) of each request of a `.json`, `.jsonl`, `.yaml` or `.yml` file.

    A list gives its elements, and {defaults, "samples": {name: {...}}} gives the samples, each with its name and
    with the defaults it does not say itself. Raises UsageError with file and line for what cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        places = [(f"{path}: line {number}", line) for number, line in enumerate(read_text(path).splitlines(), start=1)]
        return [(place, _parse_json(place, line, told=True)) for place, line in places if line.strip()]
    document = READERS[suffix](path)
    if isinstance(document, list) and len(document) != 1:
        return [(f"{path}: entry {number}", value) for number, value in enumerate(document, start=1)]
    if isinstance(document, dict) and SAMPLES in document:
        return _samples(path, document)
    return [(str(path), document[0] if isinstance(document, list) else document)]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{path}: cannot read this file: {reason}") from error


def _samples(path: Path, document: dict[str, Any]) -> list[tuple[str, Any]]:
    defaults = {key: value for key, value in document.items() if key != SAMPLES}
    samples = document[SAMPLES]
    if not isinstance(samples, dict):
        raise UsageError(f"{path}: {SAMPLES}: expected an object of name: {{'prompt': ...}}")
    if "name" in defaults:
        raise UsageError(f"{path}: name: the keys of {SAMPLES} are the names; remove it")
    entries: list[tuple[str, Any]] = []
    for name, sample in samples.items():
        where = f"{path}: {SAMPLES}.{name}"
        if not isinstance(sample, dict):
            raise UsageError(f"{where}: expected an object such as {{'prompt': ...}}")
        if "name" in sample:
            raise UsageError(f"{where}: name: the sample is named {name!r} already; remove it")
        # A sample's prompt overrides a default in either of its forms.
        own = {"prompt", "prompt_path"} & sample.keys()
        kept = {key: value for key, value in defaults.items() if not (own and key in ("prompt", "prompt_path"))}
        entries.append((where, {"name": name, **kept, **sample}))
    return entries


def _parse_json(where: str, text: str, *, told: bool = False) -> Any:
    """The value of a text. told: `where` says the line already."""

    def refuse(constant: str) -> Any:
        raise UsageError(f"{where}: {constant} is not a number that JSON has")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UsageError(f"{where}: key {key!r} is given twice; keep one of them")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as error:
        line = "" if told else f" line {error.lineno}:"
        raise UsageError(f"{where}:{line} not JSON: {error.msg}") from error
    except RecursionError as error:
        raise UsageError(f"{where}: nested too deeply") from error


def _read_json(path: Path) -> Any:
    return _parse_json(str(path), read_text(path))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is an error: it keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    problem = f"key {key_node.value!r} is given twice; keep one of them"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.load(read_text(path), _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}:" if mark else ""
        raise UsageError(f"{path}:{line} not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a plain ValueError
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


READERS: dict[str, Callable[[Path], Any]] = {".json": _read_json, ".yaml": _read_yaml, ".yml": _read_yaml}
SUFFIXES = (*READERS, ".jsonl")
