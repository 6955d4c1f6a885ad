"""A folder with a recipe, videos of its own and the shared checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pipeline.recipes import write_recipe


@dataclass
class Place:
    root: Path
    values: dict[str, Any]

    @property
    def recipe(self) -> Path:
        return write_recipe(self.root, self.values)

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def made(self) -> set[str]:
        """Names of the outputs that exist."""
        return {path.name for path in self.root.iterdir()} & {"cache", "run", "videos"}
