"""The `latentline cache` commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manifests.errors import UsageError
from pipeline.options import CacheArgument, JsonOption, RecipeArgument, SetOption, cache_url, recipe_of, seconds_of
from pipeline.recipe import load_recipe
from pipeline.report import emit

cache_app = typer.Typer(no_args_is_help=True, help="Look into a cache and keep it whole.")


@cache_app.command("status")
def status(cache: CacheArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Count what the cache holds, and say how far its newest job is."""
    from pipeline.cache_commands import cache_status

    url = cache_url(cache, overrides or ())
    emit(cache_status(url, shown=None) if as_json else cache_status(url), as_json=as_json)


@cache_app.command("verify")
def verify(
    cache: CacheArgument,
    overrides: SetOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set damaged shards aside, so that the next encode makes them again.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read everything and check it: checksums, counts, shapes, values, keys, snapshots. Exits with 1 for damage."""
    from pipeline.cache_commands import cache_verify

    result, code = cache_verify(cache_url(cache, overrides or ()), repair_damage=repair, as_json=as_json)
    emit(result, as_json=as_json)
    raise typer.Exit(code)


@cache_app.command("explain")
def explain(
    recipe: RecipeArgument,
    video: Annotated[str, typer.Argument(metavar="VIDEO", help="A video of the recipe: its path or its name.")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether a video is cached; if not, which field of the key changed, and from what to what."""
    from pipeline.cache_commands import cache_explain

    emit(cache_explain(load_recipe(recipe, overrides or ()), video, as_json=as_json), as_json=as_json)


@cache_app.command("preview")
def preview(
    cache: CacheArgument,
    overrides: SetOption = None,
    count: Annotated[int, typer.Option(min=1, help="Samples to decode, spread over the snapshot.")] = 4,
    snapshot: Annotated[str | None, typer.Option(help="Name or hash; default: the recipe's, or `train`.")] = None,
    output: Annotated[Path, typer.Option(help="Folder the videos are written to.")] = Path("preview"),
    as_json: JsonOption = False,
) -> None:
    """Decode latents back to videos and a contact sheet, with PSNR against the source."""
    from pipeline.preview import cache_preview

    recipe = recipe_of(cache, overrides or ())
    url = recipe.encode.cache if recipe else cache
    name = snapshot or (recipe.encode.snapshot if recipe else "train")
    emit(cache_preview(url, recipe, snapshot=name, count=count, output=output), as_json=as_json)


@cache_app.command("plan")
def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a GPU-hour, for the cost.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what encode would do: entries to encode, reused and orphaned, bytes, GPU-hours from measured throughput."""
    from pipeline.cache_commands import cache_plan

    emit(cache_plan(load_recipe(recipe, overrides or ()), price=price), as_json=as_json)


@cache_app.command("gc")
def gc(
    cache: CacheArgument,
    overrides: SetOption = None,
    older_than: Annotated[str, typer.Option(metavar="AGE", help="Leave what is younger, e.g. 90m, 24h, 7d.")] = "24h",
    delete: Annotated[bool, typer.Option("--delete", help="Remove it; without this, only list it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List, or remove, what no manifest and no snapshot names: abandoned tars, what repairs set aside, spent plans."""
    from pipeline.cache_commands import cache_gc

    age = seconds_of(older_than, "--older-than")
    emit(cache_gc(cache_url(cache, overrides or ()), older_than=age, delete=delete, as_json=as_json), as_json=as_json)


@cache_app.command("snapshot")
def snapshot(
    cache: CacheArgument,
    name: Annotated[str, typer.Option(help="Name of the new snapshot.")],
    overrides: SetOption = None,
    base: Annotated[str | None, typer.Option("--from", help="Snapshot to start from; default: the recipe's.")] = None,
    where: Annotated[
        str | None, typer.Option(metavar="CONDITION", help="Like SQL's WHERE, e.g. \"dataset = 'gr1' and fps >= 16\".")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(metavar="PART=SHARE", help="Put this share of the videos into NAME-PART; repeatable."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Name a new snapshot: some samples of another, split into train and validation by video if wanted."""
    from pipeline.cache_commands import cache_snapshot

    if not where and not split:
        raise UsageError("cache snapshot: give --where, --split or both")
    recipe = recipe_of(cache, overrides or ())
    url = recipe.encode.cache if recipe else cache
    start = base or (recipe.encode.snapshot if recipe else None)
    emit(cache_snapshot(url, base=start, name=name, where=where, split=split), as_json=as_json)
