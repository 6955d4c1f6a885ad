"""Which controlnet serves which kind of hint: those that `infer.controlnets` names, else `model.controlnet`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import CosmosControlNetModel
from torch import nn

from infer.config import ControlnetConfig, InferConfig
from infer.request import Request
from infer.results import weight_files
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.fingerprint import component_config, component_folder
from manifests.hints import read_kinds
from manifests.image_context import fault_of_file, wanted_shape
from train.activation import set_levels
from train.cosmos_transfer25 import load_controlnet
from train.trained import tensor_names
from train.transfer_dit import add_controlnet


def check_controls(model: ModelConfig, config: InferConfig, requests: Sequence[Request]) -> None:
    """Raise UsageError for a hint that no controlnet was trained for, as far as the weights say what they were.

    Also for image contexts that the model does not take, and for a controlnet in the place of one that an adapter
    trained.
    """
    for kind, given in config.controlnets.items():
        kinds = read_kinds(_folder_of(model, kind, given))
        if kinds is not None and kind not in kinds:
            raise UsageError(f"infer.controlnets.{kind}: {given.path} was trained for {', '.join(kinds)}")
    own = read_kinds(component_folder(model, "controlnet"))
    where = model.controlnet or model.path
    for name, adapter in config.adapters.items():
        kinds = read_kinds(Path(adapter.path))
        names = (key for file in weight_files(adapter) for key in tensor_names(file))
        if kinds is None or not any("controlnet." in key for key in names):
            continue
        own, where = kinds, adapter.path
        if twice := [kind for kind in kinds if kind in config.controlnets]:
            raise UsageError(
                f"infer.controlnets.{twice[0]}: {config.controlnets[twice[0]].path} would take the place of what "
                f"infer.adapters.{name} trained ({adapter.path}); leave one of them out"
            )
    for request in requests:
        _check_request(request, config, own, where)
        path = request.image_context
        if path is not None and (fault := fault_of_file(path, wanted_shape(model))):
            raise UsageError(f"{request.name}: image_context {path} is {fault}")


def _check_request(request: Request, config: InferConfig, own: Sequence[str] | None, where: str) -> None:
    """own: kinds that the model's own controlnet was trained for, None where it does not say. where: its place."""
    kinds = [control.kind for control in request.controls]
    served = set(config.controlnets) | set(own or ())
    strangers = [kind for kind in kinds if served and kind not in served]
    if strangers:
        trained = [f"{where} is for {', '.join(own)}"] if own else []
        named = [f"infer.controlnets has {', '.join(sorted(config.controlnets))}"] if config.controlnets else []
        raise UsageError(
            f"{request.name}: no controlnet was trained for {strangers[0]}: {'; '.join(trained + named)}; name one in "
            f"infer.controlnets.{strangers[0]}"
        )
    if len(kinds) > 1 and not served:
        raise UsageError(
            f"{request.name}: {len(kinds)} hints ({', '.join(kinds)}) need a controlnet each; name them in "
            "infer.controlnets"
        )


def add_controlnets(pipe: Any, model: ModelConfig, nets: Mapping[str, ControlnetConfig], *, dtype: torch.dtype) -> None:
    """Load the controlnet of each kind of hint into the pipeline.

    Raises UsageError for one that does not fit, or whose text projection is not that of `model.controlnet`: prompts are
    projected once.
    """
    transformer = pipe.transformer
    device = transformer.device
    own = transformer.controlnet.crossattn_proj
    for kind, given in nets.items():
        net = load_controlnet(_named(model, given), dtype)
        if own is not None and not equal_weights(own, net.crossattn_proj):
            raise UsageError(
                f"infer.controlnets.{kind}: {given.path} has another text projection than model.controlnet "
                f"{model.controlnet or model.path}, and a prompt is projected once; use controlnets of one base"
            )
        try:
            add_controlnet(transformer, kind, net.to(device).eval().requires_grad_(False))
        except ValueError as error:
            raise UsageError(f"infer.controlnets.{kind}: {given.path}: {error}") from error
        compile_blocks(list(net.control_blocks), device)


def compile_blocks(blocks: list[nn.Module], device: torch.device) -> None:
    """On CUDA, compile blocks, once for each size of video."""
    if device.type == "cuda":
        set_levels(blocks, ["none"] * len(blocks), compiled=True)


def equal_weights(first: nn.Module, second: nn.Module | None) -> bool:
    """Say whether two modules hold the same tensors."""
    if second is None:
        return False
    theirs = second.state_dict()
    return all(torch.equal(tensor.cpu(), theirs[name].cpu()) for name, tensor in first.state_dict().items())


def _named(model: ModelConfig, given: ControlnetConfig) -> ModelConfig:
    """The model with another controlnet."""
    return replace(model, controlnet=given.path, controlnet_revision=given.revision)


def _folder_of(model: ModelConfig, kind: str, given: ControlnetConfig) -> Path:
    try:
        component_config(_named(model, given), "controlnet", CosmosControlNetModel.__name__)
        return component_folder(_named(model, given), "controlnet")
    except UsageError as error:
        raise UsageError(f"infer.controlnets.{kind}: {str(error).removeprefix('model.controlnet ')}") from error
