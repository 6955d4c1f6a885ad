"""The `latentline` command.

A recipe is read before the stages are imported: a mistake in it is told at once, and not after torch has loaded.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from manifests.disk import refusal
from manifests.errors import EXIT_DONE, EXIT_FAILURE, LatentlineError, UsageError
from pipeline.cache_cli import cache_app
from pipeline.export_cli import export
from pipeline.launch import follow_launcher, is_first_to_say
from pipeline.options import DryRunOption, JsonOption, RecipeArgument, SetOption
from pipeline.recipe import builtin_recipes, load_recipe, resolved, to_toml
from pipeline.report import emit, log

app = typer.Typer(
    name="latentline",
    help="Encode once, train many: a latent cache and a light trainer for NVIDIA Cosmos-Predict2.5.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipe_app = typer.Typer(no_args_is_help=True, help="List and show recipes.")
app.add_typer(cache_app, name="cache")
app.add_typer(recipe_app, name="recipe")
app.command()(export)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"latentline {version('latentline')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What every command has."""


@app.command()
def encode(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    executor: Annotated[str | None, typer.Option(help="ray or local; overrides encode.executor.")] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="I[/N]", help="Run only the shards of array task I of N, or of as many as --plan said."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Plan only, for an array of --tasks tasks.")] = False,
    tasks: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tasks of the array, with --plan.")] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Say which array tasks have work left.")] = False,
    form: Annotated[
        Literal["slurm"] | None,
        typer.Option("--format", help="With --missing: print nothing but the expression for `sbatch --array`."),
    ] = None,
    retry_quarantined: Annotated[bool, typer.Option(help="Try quarantined windows again.")] = False,
    make: Annotated[
        Literal["depth", "seg"] | None,
        typer.Option(help="Make the control videos that the dataset lacks, by the models of encode.extract; no more."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Encode what the cache lacks, and freeze a snapshot."""
    if make is not None:
        if task or plan or missing or dry_run:
            raise UsageError("--make makes control videos and encodes nothing; give it alone")
        from pipeline.make_hints import make_stage

        result, code = make_stage(load_recipe(recipe, overrides or ()), make)
        emit(result, as_json=as_json)
        raise typer.Exit(code)
    _check_encode_options(task=task, plan=plan, tasks=tasks, missing=missing, form=form, dry_run=dry_run)
    if executor is not None:
        overrides = [*(overrides or ()), f'encode.executor="{executor}"']
    index, total = _task(task)
    loaded = load_recipe(recipe, overrides or ())
    from pipeline.encode_stage import array_stage, encode_stage

    if plan or missing:
        result = array_stage(loaded, tasks=tasks, retry_quarantined=retry_quarantined)
        if form == "slurm" and not as_json:
            sys.stdout.write(f"{result['array']}\n" if result["array"] else "")
        else:
            emit(result, as_json=as_json)
        return
    result, code = encode_stage(loaded, index=index, total=total, dry_run=dry_run, retry_quarantined=retry_quarantined)
    emit(result, as_json=as_json, hide_zero=("quarantined_videos", "duplicate_samples", "truncated_captions"))
    raise typer.Exit(code)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="Train on N GPUs of this machine, or all; without GPUs, on N CPU ranks."),
    ] = None,
    node: Annotated[
        str | None,
        typer.Option(metavar="I/N@HOST:PORT", help="With --gpus: this is machine I of N; HOST, PORT are machine 0's."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace of steps 4 to 6 to OUTPUT/profile.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO_ID", help="Upload the adapter's folder to the Hugging Face Hub; needs HF_TOKEN."),
    ] = None,
    overfit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Check that N samples can be learnt by heart; exit code 1 if not."),
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on a snapshot, on several GPUs with --gpus or under torchrun; resumes by itself."""
    loaded = load_recipe(recipe, overrides or ())
    if node is not None and gpus is None:
        raise UsageError("--node belongs to --gpus")
    if push is not None and overfit is not None:
        raise UsageError("--overfit only checks a recipe; leave --push for the run itself")
    if gpus is not None and not dry_run:
        from pipeline.launch import count_gpus, launch, parse_node

        ranks = count_gpus(gpus)
        if node is not None or ranks > 1:
            settings = [part for override in overrides or () for part in ("--set", override)]
            arguments = ["train", recipe, *settings, *(["--json"] if as_json else [])]
            arguments += ["--profile"] if profile else []
            arguments += ["--push", push] if push else []
            arguments += ["--overfit", str(overfit)] if overfit is not None else []
            raise typer.Exit(launch(arguments, ranks=ranks, node=parse_node(node) if node else None))
    from pipeline.stages import train_stage

    code = EXIT_DONE
    if overfit is None:
        result = train_stage(loaded, dry_run=dry_run, profile=profile, push_to=push)
    else:
        from pipeline.overfit import overfit_stage

        result, code = overfit_stage(loaded, overfit, dry_run=dry_run)
    if int(os.environ.get("RANK", "0")) == 0:
        emit(result, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def infer(
    recipe: RecipeArgument,
    inputs: Annotated[
        str | None, typer.Argument(help="A prompt, a folder of .png/.txt pairs, or a .json/.jsonl/.yaml file.")
    ] = None,
    overrides: SetOption = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH", help="An adapter folder or file, instead of infer.adapters; repeatable."),
    ] = None,
    guardrail: Annotated[
        bool,
        typer.Option(help="NVIDIA's Open Model License asks for a guardrail; without one, keeping to it is up to you."),
    ] = True,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N|all", help="Use N GPUs of this machine, or all; without GPUs, N CPU ranks."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Make videos again that are there already.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Generate videos with the base model and adapters; videos that are there already are kept."""
    loaded = load_recipe(recipe, overrides or ())
    if gpus is not None and not dry_run:
        from pipeline.launch import count_gpus, launch

        if (ranks := count_gpus(gpus)) > 1:
            arguments = ["infer", recipe, *([inputs] if inputs is not None else [])]
            arguments += [part for override in overrides or () for part in ("--set", override)]
            arguments += [part for path in adapter or () for part in ("--adapter", path)]
            arguments += ["--guardrail" if guardrail else "--no-guardrail"]
            arguments += [*(["--force"] if force else []), *(["--json"] if as_json else [])]
            raise typer.Exit(launch(arguments, ranks=ranks))
    from pipeline.stages import infer_stage

    result, code = infer_stage(loaded, inputs, adapters=adapter, guardrail=guardrail, force=force, dry_run=dry_run)
    if int(os.environ.get("RANK", "0")) == 0:
        emit(result, as_json=as_json, hide_zero=("kept", "failed"))
        raise typer.Exit(code)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder everything is written to.")] = Path("demo-run"),
    executor: Annotated[str, typer.Option(help="ray or local.")] = "ray",
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline on a tiny model and videos made on the spot, on a CPU, in minutes."""
    from pipeline.demo.run import run_demo

    emit(run_demo(output, executor=executor), as_json=as_json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder: train.output of its recipe.")],
    output: Annotated[Path | None, typer.Option(help="The page to write; by default RUN/report.html.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one HTML page about a training run, finished or not: losses, speed, memory, samples, data, recipe."""
    from pipeline.run_report import write_report

    emit(write_report(run, output), as_json=as_json)


@recipe_app.command("list")
def recipe_list(as_json: JsonOption = False) -> None:
    """List the built-in recipes."""
    emit(dict(builtin_recipes()), as_json=as_json)


@recipe_app.command("show")
def recipe_show(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Print a recipe with every default spelled out."""
    values = resolved(load_recipe(recipe, overrides or ()))
    if as_json:
        emit(values, as_json=True)
    else:
        sys.stdout.write(to_toml(values))


def _task(task: str | None) -> tuple[int, int | None]:
    """(index, total); total None where the plan knows it."""
    if task is None:
        return 0, 1
    index, separator, total = task.partition("/")
    if index.isdecimal() and not separator:
        return int(index), None
    if not (index.isdecimal() and total.isdecimal() and int(index) < int(total)):
        raise UsageError(f"--task {task!r}: write it as I/N with 0 <= I < N, or as I after --plan --tasks N")
    return int(index), int(total)


def _check_encode_options(
    *, task: str | None, plan: bool, tasks: int | None, missing: bool, form: str | None, dry_run: bool
) -> None:
    if (task is not None) + plan + missing + dry_run > 1:
        raise UsageError("--task, --plan, --missing and --dry-run are different things to do; give one of them")
    if plan != (tasks is not None):
        raise UsageError("--plan and --tasks N belong together")
    if form and not missing:
        raise UsageError("--format belongs to --missing")


def _log_setup() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)


def main() -> None:
    """Run the command line; user errors become one line on stderr and an exit code."""
    _log_setup()
    follow_launcher()
    try:
        app()
    except LatentlineError as error:
        message = " ".join(str(error).splitlines())
        if is_first_to_say(message):
            log(f"error: {message}")
        sys.exit(error.exit_code)
    except OSError as error:
        reason = refusal(error)
        if reason is None:
            raise
        log(f"error: {error.filename or 'an output'}: {reason}")
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        log("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()
