"""The forms captions have in files, whatever the layout: text, and JSON with one caption or several.

JSON is one of:

    {"caption": "..."}   or "text", or "prompt"; other keys are facts
    {"long": "...", "medium": "...", "short": "..."}   the names of several captions
    {"<model>": {"long": "...", "short": "..."}}   the same under a model's name

The outermost braces may be missing, as they are in some public sets. Text is UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from encode.config import DatasetConfig

_SINGLE = ("caption", "text", "prompt")
_NAMES = ("long", "medium", "short")


class CaptionFault(ValueError):
    """What is wrong with captions, as the kind `Problems` counts. detail: what to say of this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind)
        self.kind = kind
        self.detail = f" ({detail})" if detail else ""


@dataclass(frozen=True)
class Captions:
    """texts: by name, a single one without a name under "". facts: other values of the same file."""

    texts: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)


def parse_text(data: bytes, dataset: DatasetConfig) -> Captions:
    """Read a text file: one caption, without the white space around it."""
    return Captions(_alone(_decode(data), "", dataset))


def parse_json(data: bytes, dataset: DatasetConfig) -> Captions:
    """Read a JSON file of captions, those that `DatasetConfig.captions` names where it has several."""
    value = load_object(data)
    single = [key for key in _SINGLE if key in value]
    if len(single) > 1:
        raise CaptionFault("files with several captions of one meaning", ", ".join(single))
    if single:
        facts = {key: fact for key, fact in value.items() if key != single[0]}
        return Captions(_alone(value[single[0]], single[0], dataset), facts)
    named = {key: text for key, text in value.items() if key in _NAMES}
    if named:
        return Captions(select(dataset, named), {key: fact for key, fact in value.items() if key not in _NAMES})
    models = {key: texts for key, texts in value.items() if isinstance(texts, dict)}
    if dataset.caption_model is not None:
        if dataset.caption_model not in models:
            raise CaptionFault(f"captions without the model {dataset.caption_model!r}", f"has {_list(models)}")
        models = {dataset.caption_model: models[dataset.caption_model]}
    if len(models) > 1:
        raise CaptionFault("files with captions of several models (set caption_model)", _list(models))
    if not models:
        raise CaptionFault("files without a caption", f"it has {_list(value)}; expected caption, text or prompt")
    [texts] = models.values()
    return Captions(select(dataset, texts), {k: fact for k, fact in value.items() if not isinstance(fact, dict)})


def load_object(data: bytes) -> dict[str, Any]:
    """Read a JSON object whose outermost braces may be missing."""
    text = _decode(data).strip()
    if not text:
        raise CaptionFault("empty captions")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        try:
            value = json.loads(f"{{{text.rstrip(',')}}}") if text.startswith('"') else None
        except json.JSONDecodeError:
            value = None
        if value is None:
            raise CaptionFault("files that are not JSON", f"line {error.lineno}: {error.msg}") from error
    if not isinstance(value, dict):
        raise CaptionFault("files that are not a JSON object")
    return value


def select(dataset: DatasetConfig, texts: Mapping[str, Any]) -> dict[str, str]:
    """Those of several captions that `DatasetConfig.captions` names, or all; each must be there and not empty."""
    names = list(dataset.captions) if dataset.captions is not None else list(texts)
    missing = [name for name in names if texts.get(name) is None]
    if missing or not names:
        raise CaptionFault(f"captions without {_list(missing) or 'any name'}", f"has {_list(texts)}")
    return {name: _text(texts[name], name) for name in sorted(names)}


def _alone(value: Any, name: str, dataset: DatasetConfig) -> dict[str, str]:
    """A caption without a name, which cannot be one that was asked for by name."""
    if dataset.captions is not None:
        raise CaptionFault(f"captions without {_list(dataset.captions)}", "it has a single one")
    return {"": _text(value, name)}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise CaptionFault("captions that are not text", name)
    if not value.strip():
        raise CaptionFault("empty captions", name)
    return value.strip()


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionFault("captions that are not UTF-8") from error


def _list(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"
