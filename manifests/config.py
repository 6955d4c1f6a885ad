"""The model section of a recipe, shared by every stage, and what all sections have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Dtype = Literal["bfloat16", "float32"]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What PyTorch's generators take."""

Place = Annotated[str, Field(min_length=1)]
"""A path or URL: not empty, which would be the working directory."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The base checkpoint: a diffusers folder or a Hugging Face id.

    path: local folder with `model_index.json`, or a hub id such as `nvidia/Cosmos-Predict2.5-2B`.
    revision: hub branch, tag or commit; ignored for a local folder.
    family: which `<stage>/<family>.py` knows this model; dots are dropped and dashes become underscores
        to find the file (`cosmos2.5` -> `cosmos25`).
    controlnet: of Transfer models: a folder with the controlnet's `config.json` and weights, or a hub id; null means
        the checkpoint's own `controlnet` folder. controlnet_revision: of the hub id; released ones are branches.
    """

    path: str
    revision: str | None = None
    family: str = "cosmos2.5"
    controlnet: str | None = None
    controlnet_revision: str | None = None

    @property
    def family_module(self) -> str:
        return self.family.replace(".", "").replace("-", "_")
