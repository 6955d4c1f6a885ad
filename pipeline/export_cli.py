"""`latentline export`: weights from one format to another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from manifests.config import Dtype, ModelConfig
from manifests.errors import UsageError
from pipeline.options import JsonOption
from pipeline.report import emit, log, quiet_libraries


def export(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="An adapter's or a model's file or folder, or a DCP checkpoint.")
    ],
    to: Annotated[
        Literal["diffusers", "peft", "nvidia", "comfyui", "model"],
        typer.Option("--to", help="model: a whole model's folder, the adapter fused in. comfyui: untested with 2.5."),
    ],
    output: Annotated[Path, typer.Option(metavar="PATH", help="The file (.pt, .safetensors) or folder to make.")],
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model's folder or id; names and shapes must fit it.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the base model, if it is an id.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert to it; by default tensors keep their bits.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average (net_ema.) of NVIDIA's file.")] = False,
    alpha: Annotated[
        float | None, typer.Option(min=1e-9, help="lora_alpha of an adapter whose file does not say it.")
    ] = None,
    fold_alpha: Annotated[
        bool, typer.Option("--fold-alpha", help="Scale B so that alpha = rank, for loaders that assume it.")
    ] = False,
    family: Annotated[str, typer.Option(help="The model family.")] = "cosmos2.5",
    as_json: JsonOption = False,
) -> None:
    """Convert adapters and models between formats. Of DCP checkpoints only your own: their metadata are a pickle."""
    import torch

    from train.formats.adapter import Adapter
    from train.weights import check_output, load_weights, save_weights

    quiet_libraries()
    check_output(to, output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output}: {output.parent} cannot be made: {error.strerror}") from error
    loaded = load_weights(source, family=family, alpha=alpha, ema=ema, scratch=output.parent)
    model = ModelConfig(path=base, revision=revision, family=family) if base else None
    wanted = {None: None, "bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    notes = save_weights(loaded, to, output, base=model, dtype=wanted, fold=fold_alpha)
    for note in notes:
        log(note)
    weights = loaded.weights
    result: dict[str, object] = {
        "output": str(output),
        "from": loaded.source,
        "to": to,
        "tensors": len(weights.tensors),
    }
    if isinstance(weights, Adapter):
        config = weights.config
        result |= {"method": "dora" if weights.is_dora else "lora", "modules": len(weights.modules)}
        result |= {"rank": config["r"], "alpha": config["r"] if fold_alpha else config["lora_alpha"]}
    emit(result | {"notes": notes} if as_json else result, as_json=as_json)
