"""Imports point one way: pipeline -> encode, train, infer -> manifests, and infer -> train."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "manifests": set(),
    "encode": {"manifests"},
    "train": {"manifests"},
    "infer": {"manifests", "train"},
    "pipeline": {"manifests", "encode", "train", "infer"},
}
MODEL_CODE = {"diffusers", "transformers", "peft", "accelerate"}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write relative imports in full"
            assert node.module
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    ours = imports(path) & (set(ALLOWED) | {"tests", "benchmarks"})
    assert ours - {package} <= ALLOWED[package]


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "manifests"], ids=lambda path: path.name)
def test_the_contract_imports_no_model_code(path):
    assert not imports(path) & MODEL_CODE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_pickled(path):
    assert not imports(path) & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}


def test_there_is_something_to_check():
    assert len(FILES) > 30
    assert sys.version_info >= (3, 11)
