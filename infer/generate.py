"""Requests in, videos out: load the model once, make each video that is not there yet, write what was made and how.

    OUTPUT/<name>.mp4           one a request; an older one of that name is replaced
    OUTPUT/contact_sheet.png    a row of frames for each of the first 100
    OUTPUT/grid.mp4             side by side, with `infer.grid`
    OUTPUT/results.json         prompts, sizes, seconds, scores, errors, model, adapters; rewritten as videos appear

The noise of a video depends on its seed and size alone: not on the device, the other requests or their order. Files
appear whole or not at all, and a video whose fingerprint is the wanted one is kept, so a run that was ended goes on
where it was. A request that fails is recorded and the others are made.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from infer.adapters import check_adapters
from infer.compare import check_ground_truth, compare_videos
from infer.config import InferConfig
from infer.controls import side_by_side_path
from infer.grid import write_grid
from infer.inputs import check_names
from infer.progress import VideoProgress, track
from infer.request import Request
from infer.results import Result, fingerprints, read_fingerprint, read_records, write_results
from infer.studio import Studio, check_base_linears
from infer.team import Team, choose_layout, from_rank_0, in_team, open_store
from infer.video import contact_sheet, read_spread
from manifests.config import ModelConfig
from manifests.errors import LatentlineError, UsageError
from manifests.family import find_family
from manifests.text import is_utf8
from train.parallel import Ranks, join

SHEET_COLUMNS = 6
SHEET_ROWS = 100
RESERVED_NAMES = ("grid",)


def check_requests(model: ModelConfig, requests: Sequence[Request]) -> None:
    """Raise UsageError unless the model's family can make all of these; loads nothing."""
    if not requests:
        raise UsageError("infer.inputs: nothing to generate; give a prompt, a folder, or a .json, .jsonl or .yaml file")
    check_names(requests, "infer.inputs")
    family = find_family("infer", model)
    for request in requests:
        if request.name in RESERVED_NAMES:
            raise UsageError(f"infer.inputs: name {request.name!r} is another file's in the output folder; change it")
        if not all(map(is_utf8, (request.name, request.prompt, request.negative_prompt or ""))):
            raise UsageError(
                f"infer.inputs: {request.name!a}: name or prompt has half a character (a broken \\uD800 escape, or no "
                "UTF-8 locale); write it anew"
            )
        family.check_request(request)
        check_ground_truth(request)


def check_controls(model: ModelConfig, config: InferConfig, requests: Sequence[Request]) -> None:
    """Raise UsageError unless the settings of control fit the model and the requests; loads nothing."""
    family = find_family("infer", model)
    if hasattr(family, "check_controls"):
        family.check_controls(model, config, requests)
        return
    for name, given in (("controlnets", config.controlnets), ("side_by_side", config.side_by_side)):
        if given:
            raise UsageError(f'infer.{name}: this model takes no control; set model.family = "cosmos-transfer2.5"')


def generate(
    model: ModelConfig,
    config: InferConfig,
    requests: Sequence[Request],
    *,
    guardrail: bool,
    force: bool = False,
    on_ready: Callable[[], None] | None = None,
    on_video: Callable[[Result], None] | None = None,
    ranks: Ranks | None = None,
    accelerate_vae: Callable[[Any], None] = lambda vae: None,
) -> list[Result]:
    """Make the requests' videos in `config.output`, on the GPU if there is one; a result each, in their order.

    guardrail: False lets prompts and videos pass unchecked. force: make videos again that are there already.
    on_ready: called on rank 0 when the first video is about to be made. on_video: called after each video this rank
    wrote. ranks: that share the work as `config.parallel` says, all of which call this; None means those that the
    environment describes, as torchrun does. Rank 0 returns all results, the others none. accelerate_vae: called with
    the loaded VAE, may give it a faster `decode`.
    Requests, output folder, model and adapters are checked before the first video and before anything is written:
    UsageError.
    """
    check_requests(model, requests)
    check_controls(model, config, requests)
    check_adapters(config.adapters, fuse=config.fuse)
    family = find_family("infer", model)
    requests = [
        replace(request, negative_prompt=family.DEFAULT_NEGATIVE_PROMPT) if request.negative_prompt is None else request
        for request in requests
    ]
    if guardrail:
        family.require_guardrail()
    output = Path(config.output)
    _check_output(output)
    _check_videos(output, requests, force)
    with join() if ranks is None else nullcontext(ranks) as ranks:
        check_base_linears(config, ranks.device)
        store = open_store(ranks)
        prints, kept = from_rank_0(
            ranks,
            store,
            "wanted",
            _find_kept(model, config, requests, output, guardrail, force) if ranks.is_main else None,
        )
        pending = [request for request in requests if request.name not in kept]
        layout = choose_layout(
            config.parallel,
            ranks.world,
            videos=len(pending),
            guided=all(request.guidance > 1 for request in pending),
            tokens=sorted({family.num_tokens(request) for request in pending}),
        )
        earlier = read_records(output / "results.json") if ranks.is_main else {}
        book = _Book(config, requests, prints, output, _report(model, config, guardrail, ranks))
        for name in kept:
            book.add(book.result(name, "kept", seconds=earlier.get((name, prints[name]), {}).get("seconds")))
        with in_team(ranks, layout, store) as team, _progress(ranks, len(pending)) as progress:
            if pending:
                studio = Studio.open(
                    model, config, pending, guardrail=guardrail, team=team, accelerate_vae=accelerate_vae
                )
                output.mkdir(parents=True, exist_ok=True)
                if on_ready is not None and ranks.is_main:
                    on_ready()
            for turn, index in enumerate(team.turns(len(pending))):
                request = pending[index]
                result = studio.make(request, output, prints[request.name], turn=turn, progress=progress)
                if result is None:
                    continue  # another rank of the team leads
                result = _compared(result)
                team.report(index, result.facts())
                book.add(result)
                if result.video is not None and on_video is not None:
                    on_video(result)
                if ranks.is_main:
                    book.add_reported(pending, team, wait=False)
                    book.write()
                progress.done(result, team.num_done())
            if not ranks.is_main:
                return []
            book.add_reported(pending, team, wait=True)
        if config.side_by_side:
            _add_side_by_side(family, book.in_order())
        return book.finish()


def _find_kept(
    model: ModelConfig, config: InferConfig, requests: Sequence[Request], output: Path, guardrail: bool, force: bool
) -> tuple[dict[str, str], list[str]]:
    """(fingerprint by name, names of the videos that are there)."""
    for request in requests:
        for left_over in output.glob(f".{glob.escape(request.name)}.mp4.*.part"):  # of a run that was killed
            left_over.unlink(missing_ok=True)
    prints = fingerprints(model, config, requests, guardrail=guardrail)
    names = [] if force else [name for name, each in prints.items() if read_fingerprint(output / f"{name}.mp4") == each]
    return prints, names


class _Book:
    """Results as they come in, and the files that are made of them."""

    def __init__(
        self,
        config: InferConfig,
        requests: Sequence[Request],
        prints: dict[str, str],
        output: Path,
        report: dict[str, Any],
    ) -> None:
        self._config, self._output, self._report = config, output, report
        self._requests = {request.name: request for request in requests}
        self._prints = prints
        self._results: dict[str, Result] = {}

    def result(self, name: str, status: str, **facts: Any) -> Result:
        video = None if status == "failed" else self._output / f"{name}.mp4"
        return Result(request=self._requests[name], fingerprint=self._prints[name], status=status, video=video, **facts)

    def add(self, result: Result) -> None:
        self._results[result.request.name] = result

    def add_reported(self, pending: Sequence[Request], team: Team, *, wait: bool) -> None:
        unknown = [index for index, request in enumerate(pending) if request.name not in self._results]
        for index, facts in team.reported(unknown, wait=wait).items():
            self.add(self.result(pending[index].name, **facts))

    def in_order(self) -> list[Result]:
        return [self._results[name] for name in self._requests if name in self._results]

    def write(self) -> None:
        write_results(self._output / "results.json", self._report, [result.record() for result in self.in_order()])

    def finish(self) -> list[Result]:
        """Compare the videos that were there already with their ground truth, and write the files about all."""
        for result in track([result for result in self.in_order() if result.status == "kept"], "comparing"):
            self.add(_compared(result))
        results = self.in_order()
        self.write()
        shown = [(f"{r.request.name}: {r.request.prompt}", r.video, r.request) for r in results if r.video is not None]
        if shown:
            rows = [
                (label, read_spread(video, SHEET_COLUMNS))
                for label, video, _ in track(shown[:SHEET_ROWS], "contact sheet")
            ]
            contact_sheet(self._output / "contact_sheet.png", rows, columns=SHEET_COLUMNS)
        if shown and self._config.grid:
            cells = []
            for _, video, request in shown:
                if request.ground_truth is not None:
                    cells.append((f"{request.name}: ground truth", request.ground_truth))
                cells.append((request.name, video))
            together = 2 if len(cells) == 2 * len(shown) else 1
            write_grid(self._output / "grid.mp4", cells, self._config.fps, together=together)
        return results


def _add_side_by_side(family: ModuleType, results: Sequence[Result]) -> None:
    """Of videos that are kept too, if they were made without."""
    lacking = [r for r in results if r.video is not None and not side_by_side_path(r.video).is_file()]
    for result in track(lacking, "side by side"):
        assert result.video is not None
        family.write_side_by_side(result.request, result.video)


def _compared(result: Result) -> Result:
    if result.video is None or result.request.ground_truth is None:
        return result
    try:
        psnr, ssim = compare_videos(result.video, result.request.ground_truth)
    except LatentlineError as error:
        return replace(result, error=f"there, but not compared: {error}")
    return replace(result, psnr=psnr, ssim=ssim)


def _progress(ranks: Ranks, count: int) -> VideoProgress:
    return VideoProgress(count, bars=ranks.is_main)


def _check_output(output: Path) -> None:
    """Raise UsageError unless `output` is a folder that can be written to, or can be made."""
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise UsageError(f"infer.output: {output}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"infer.output: {output}: cannot write into {existing}")


def _check_videos(output: Path, requests: Sequence[Request], force: bool) -> None:
    """Raise UsageError if a video would take the place of an input, or without `force` of what `infer` did not make."""
    for request in requests:
        path = output / f"{request.name}.mp4"
        controls = [file for control in request.controls for file in (control.path, control.mask)]
        inputs = [request.image, request.video, request.ground_truth, request.source, *controls]
        if path.resolve() in [file.resolve() for file in inputs if file is not None]:
            raise UsageError(f"infer.output: {path} is an input of {request.name!r}; choose another folder")
        if not force and path.exists() and read_fingerprint(path) is None:
            raise UsageError(
                f"infer.output: {path} was not made by `latentline infer`; choose another folder, or give --force"
            )


def _report(model: ModelConfig, config: InferConfig, guardrail: bool, ranks: Ranks) -> dict[str, Any]:
    device = ranks.device
    return {
        "model": {name: value for name, value in asdict(model).items() if value is not None or name == "revision"},
        "adapters": {name: asdict(adapter) for name, adapter in config.adapters.items()},
        "fused": config.fuse,
        "guardrail": guardrail,
        "fps": config.fps,
        "conditioning_timestep": config.conditioning_timestep,
        "dtype": config.dtype,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": ranks.world,
    }
