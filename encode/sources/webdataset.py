"""Uncompressed WebDataset tars, read in place: `<key>.mp4` with `<key>.txt` or `<key>.json` beside it.

`path` is one tar, or a folder with tars at any depth, as egocentric data comes in (`factory001/worker001/part00.tar`,
without captions: set `prompt`). With `media = "images"`, the videos are `<key>.jpg` or `<key>.png`. A text gives the
caption where there is one, else the JSON does (its forms: `encode.caption_files`); with either, the other values of the
JSON are what `filters.where` sees. Keys are unique in a tar; other members of a key are not looked at.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from encode.caption_files import CaptionFault, Captions, load_object, parse_json, parse_text
from encode.config import DatasetConfig
from encode.sources import Problems, SourceItem, media_suffixes, prefixed, prompt_of
from encode.tars import TarGroup, groups_of, read_member, tars_at
from manifests.errors import UsageError


def read(name: str, dataset: DatasetConfig, left_out: Counter[str]) -> list[SourceItem]:
    """Items in the order of the tars' paths, then of the members. With `prompt`, no captions are read.

    Raises UsageError for: no tar, a tar that is compressed or torn, no video in any, a key with two videos, a video
    without a caption, a caption without a video (unless `allow_missing_videos`), a caption that cannot be read.
    """
    where = f"data.datasets.{name}"
    root = Path(dataset.path)
    prompt = prompt_of(where, dataset)
    problems = Problems(where)
    items = []
    for tar in tars_at(where, root):
        inside = "" if tar == root else f"{tar.relative_to(root).with_suffix('')}/"
        for group in groups_of(where, tar):
            videos = [member for suffix, member in group.members.items() if suffix in media_suffixes(dataset)]
            shown = f"{tar.name}::{group.key}"
            if not videos:
                if not {".txt", ".json"} & group.members.keys():
                    continue
                if dataset.allow_missing_videos:
                    left_out["allow_missing_videos"] += 1
                else:
                    problems.add("captions without a video", shown)
                continue
            if len(videos) > 1:
                problems.add("keys with several videos", f"{shown} ({', '.join(group.members)})")
                continue
            try:
                captions = _captions(group, dataset, prompt)
            except CaptionFault as fault:
                problems.add(fault.kind, f"{shown}{fault.detail}")
                continue
            items.append(
                SourceItem(
                    dataset=name,
                    name=f"{inside}{group.key}",
                    video=videos[0],
                    captions=prefixed(dataset, captions.texts),
                    facts=captions.facts,
                )
            )
    problems.raise_any()
    if not items:
        raise UsageError(
            f"{where}: no tar at {root} holds {dataset.media} ({', '.join(sorted(media_suffixes(dataset)))})"
        )
    return items


def _captions(group: TarGroup, dataset: DatasetConfig, prompt: dict[str, str] | None) -> Captions:
    text, facts = group.members.get(".txt"), group.members.get(".json")
    if prompt is not None or text is not None:
        texts = prompt if prompt is not None else parse_text(read_member(text), dataset).texts if text else {}
        return Captions(texts, load_object(read_member(facts)) if facts and dataset.filters.where else {})
    if facts is None:
        raise CaptionFault("videos without a caption", "expected a .txt or .json beside it, or set prompt")
    return parse_json(read_member(facts), dataset)
