"""An adapter's folder made whole: beside the weights a recipe, a config, metrics, pictures and a README.md.

The folder is what the Hugging Face Hub calls a model: uploaded as it is, it says what it adapts, what it was trained on
and how to use it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from manifests.config import ModelConfig
from manifests.errors import LatentlineError
from pipeline.recipe import Recipe, resolved, write_resolved
from pipeline.run_facts import read_dataset_facts, size_line
from train.adapters import WEIGHTS_NAME
from train.metrics import METRICS_NAME, read_metrics

CONFIG_NAME = "config.json"
PICTURES = "samples"
MAX_PICTURES = 4

_METHOD_NAMES = {
    "lora": "a LoRA adapter",
    "dora": "a DoRA adapter",
    "adapters": "temporal adapters",
    "full": "fine-tuned weights",
    "control": "a control branch",
}
_LICENSE = "NVIDIA Open Model License"
_LICENSE_LINK = "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license"


def write_model_folder(recipe: Recipe, run: Path, *, repo_id: str | None = None) -> Path:
    """Complete `run`/adapter, which holds the weights already, from what the run's folder says; return it.

    repo_id: where it will be found; None writes the folder's own path into the three lines that use it.
    Raises `LatentlineError` if the folder cannot be written to.
    """
    folder = run / "adapter"
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    if not weights:
        raise LatentlineError(f"{folder}: holds no weights; train first")
    records = read_metrics(run)
    dataset = read_dataset_facts(run)
    try:
        write_resolved(recipe, folder)
        if (run / METRICS_NAME).is_file():
            shutil.copyfile(run / METRICS_NAME, folder / METRICS_NAME)
        config = _config(recipe, dataset)
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        pictures = _copy_pictures(run, folder)
        used_as = repo_id or str(folder.resolve())
        title = repo_id or run.resolve().name
        card = _card(recipe, records, dataset, pictures, weights, title=title, used_as=used_as)
        card.save(folder / "README.md")
    except OSError as error:
        raise LatentlineError(f"{folder}: cannot be written to: {error.strerror or error}") from error
    return folder


def _config(recipe: Recipe, dataset: Mapping[str, Any] | None) -> dict[str, Any]:
    values = resolved(recipe)["train"]
    return {
        "base_model": recipe.model.path,
        "revision": recipe.model.revision,
        "family": recipe.model.family,
        "method": values["method"],
        "lora": values["lora"],
        "steps": values["steps"],
        "snapshot": dataset["snapshot"] if dataset else None,
    }


def _copy_pictures(run: Path, folder: Path) -> list[str]:
    """Copy the last step's sample pictures; return their paths in the folder."""
    steps = [path for path in (run / PICTURES).glob("step_*") if any(path.glob("*.png"))]
    if not steps:
        return []
    last = max(steps, key=lambda path: int("".join(re.findall(r"\d+", path.name)) or 0))
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    (folder / PICTURES).mkdir()
    chosen = sorted(last.glob("*.png"))[:MAX_PICTURES]
    for picture in chosen:
        shutil.copyfile(picture, folder / PICTURES / picture.name)
    return [f"{PICTURES}/{picture.name}" for picture in chosen]


def _card(
    recipe: Recipe,
    records: list[dict[str, Any]],
    dataset: Mapping[str, Any] | None,
    pictures: list[str],
    weights: list[str],
    *,
    title: str,
    used_as: str,
) -> ModelCard:
    model = recipe.model
    is_local = Path(model.path).expanduser().exists()
    base = Path(model.path).name if is_local else model.path
    methods = recipe.train.methods
    what = " and ".join(_METHOD_NAMES[method] for method in methods)
    what = what[0].upper() + what[1:]
    data = ModelCardData(
        base_model=None if is_local else model.path,
        base_model_relation=None if is_local else "finetune" if "full" in methods else "adapter",
        library_name="diffusers" if WEIGHTS_NAME in weights else "latentline",
        license="other",
        license_name="nvidia-open-model-license",
        license_link=_LICENSE_LINK,
        pipeline_tag="image-to-video",
        tags=[*methods, "cosmos", "video", "world-model", "latentline", "template:sd-lora"],
    )
    sections = [
        f"# {title}",
        f"{what} for {base}{f' (revision `{model.revision}`)' if model.revision else ''}, trained with latentline.",
        "## Use",
        *_usage(model, used_as, weights),
        *(["## Samples", *(f"![{Path(picture).stem}]({picture})" for picture in pictures)] if pictures else []),
        "## Data",
        _table(_data_rows(dataset)) if dataset else "The run's folder does not say what it was trained on.",
        "## Training",
        _table(_training_rows(recipe)),
        "## Results",
        _table(_result_rows(records)) if records else "No metrics were recorded.",
        "`metrics.jsonl` has every record, `recipe.toml` the whole recipe as it was on the machine that trained this.",
        "## Licence",
        f"The base model is under the [{_LICENSE}]({_LICENSE_LINK}), which requires a guardrail. What the owners of "
        "the data allow is not recorded here.",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _usage(model: ModelConfig, used_as: str, weights: list[str]) -> list[str]:
    """How to load the folder. Stock diffusers reads files of LoRA and DoRA, and into its Transfer pipeline none."""
    parts = []
    stock = WEIGHTS_NAME in weights and "transfer" not in model.family
    if stock:
        parts.append("```python\n" + "\n".join(usage_lines(model.path, model.revision, used_as)) + "\n```")
        parts.append(
            "Alpha and rank are in the file. The pipeline's safety checker needs `pip install cosmos_guardrail`."
        )
    if others := [name for name in weights if name != WEIGHTS_NAME or not stock]:
        given = "inputs.json" if "transfer" in model.family else '"a prompt"'
        parts.append(
            f"{', '.join(f'`{name}`' for name in others)}: read by latentline, not by stock diffusers: "
            f"`latentline infer recipe.toml {given} --adapter FOLDER`."
        )
    if "transfer" in model.family:
        parts.append(
            '`inputs.json`: `{"name": "a", "prompt": "...", "video_path": "a.mp4", "KIND": {}}`, KIND a hint below.'
        )
    return parts


def usage_lines(base: str, revision: str | None, adapter: str) -> list[str]:
    """The three lines of Python that use the adapter in diffusers."""
    at = f", revision={revision!r}" if revision else ""
    return [
        "from diffusers import Cosmos2_5_PredictBasePipeline",
        f"pipe = Cosmos2_5_PredictBasePipeline.from_pretrained({base!r}{at})",
        f"pipe.load_lora_weights({adapter!r})",
    ]


def _data_rows(dataset: Mapping[str, Any]) -> dict[str, Any]:
    names = ", ".join(f"{name} ({count})" for name, count in dataset["datasets"].items())
    return {
        "datasets (samples)": names,
        "samples": dataset["samples"],
        "videos": dataset["videos"],
        "captions": dataset["captions"],
        "sizes": "; ".join(map(size_line, dataset["sizes"])),
        "snapshot": f"`{dataset['snapshot']}`",
    }


def _training_rows(recipe: Recipe) -> dict[str, Any]:
    config = recipe.train
    rows: dict[str, Any] = {"method": " + ".join(config.methods)}
    if {"lora", "dora"} & set(config.methods):
        rows["rank, alpha"] = f"{config.lora.rank}, {config.lora.alpha:g}"
        rows["targets"] = ", ".join(config.lora.targets) or "the family's default"
    return rows | {
        "steps x batch": f"{config.steps} x {config.batch_size}",
        "learning rate": f"{config.optimizer.lr:g}, {config.schedule.kind}, warm-up {config.schedule.warmup}",
        "conditioning frames": ", ".join(f"{n}: {p:g}" for n, p in sorted(config.objective.conditioning.items())),
        **({"hints": ", ".join(sorted(config.hints))} if config.hints else {}),
        "text dropout": f"{config.objective.text_dropout:g}",
        "dtype of the base": config.dtype,
        "seed": config.seed,
    }


def _result_rows(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean loss of the last tenth of the records, and the last value of what validation wrote."""
    losses = [record["loss"] for record in records if isinstance(record.get("loss"), int | float)]
    rows: dict[str, Any] = {"steps done": max(record["step"] for record in records)}
    if losses:
        tail = losses[-max(1, len(losses) // 10) :]
        rows[f"training loss, mean of the last {len(tail)} records"] = f"{sum(tail) / len(tail):.4g}"
    last: dict[str, Any] = {}
    for record in records:
        last |= {name: value for name, value in record.items() if name.startswith("validation/")}
    return rows | {name: f"{value:.4g}" for name, value in sorted(last.items()) if isinstance(value, int | float)}


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
