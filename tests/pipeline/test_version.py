from __future__ import annotations

from importlib.metadata import version

from typer.testing import CliRunner

from pipeline.cli import app


def test_the_version_is_the_packages() -> None:
    outcome = CliRunner().invoke(app, ["--version"])
    assert outcome.exit_code == 0
    assert outcome.stdout == f"latentline {version('latentline')}\n"
