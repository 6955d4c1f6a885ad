"""Values no model makes on purpose: what encode refuses to store and verify reports."""

from __future__ import annotations

import torch

from manifests.schema import Kind


def fault_of(kind: Kind, tensor: torch.Tensor) -> str | None:
    """Say what is wrong with an entry's values: not finite or, for latents, all equal; None if nothing is.

    A context may be constant: that of dropped text is all zeros where contexts are stored raw.
    """
    if not bool(torch.isfinite(tensor).all()):
        return f"{kind} are not finite" if kind == "latents" else f"{kind} is not finite"
    if kind == "latents" and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
        return f"{kind} are constant: every value is {tensor.flatten()[0].item():g}"
    return None
