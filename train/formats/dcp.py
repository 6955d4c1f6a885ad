"""PyTorch's distributed checkpoints (a folder with `.metadata`) to one file.

The `.metadata` file of such a checkpoint is a pickle, which can run code when it is read: load only your own.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from manifests.errors import UsageError
from train.formats.adapter import Adapter, FullModel
from train.formats.names import NameMap
from train.formats.nvidia import read_nvidia

METADATA_NAME = ".metadata"
WARNING = "the metadata of a distributed checkpoint are a pickle, which can run code: export only your own"


def read_dcp(folder: Path, names: NameMap, scratch: Path, *, alpha: float | None, ema: bool) -> Adapter | FullModel:
    """Gather a checkpoint of NVIDIA's trainer (`net.` names) and read it as its `.pt`.

    scratch: an existing folder with room for the whole checkpoint, used while this runs.
    """
    with tempfile.TemporaryDirectory(prefix=".gathering-", dir=scratch) as building:
        gathered = Path(building) / "gathered.pt"
        try:
            dcp_to_torch_save(folder, gathered)
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            raise UsageError(
                f"{folder}: not a readable distributed checkpoint: {str(error).strip().splitlines()[0]}"
            ) from error
        return read_nvidia(gathered, names, alpha=alpha, ema=ema, where=folder)
