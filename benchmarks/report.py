"""How the benchmarks end: a Markdown report of what ran, on what, when and from which commit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--commit", default="unknown", help="to name in the report")
    parser.add_argument("--output", type=Path, help="file of the report, besides the terminal")


def table(columns: Sequence[str], rows: Sequence[str]) -> str:
    """A Markdown table; rows are whole lines."""
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *rows])


def bullets(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def report(
    options: argparse.Namespace,
    title: str,
    *parts: str,
    command: str,
    packages: Sequence[str] = ("torch", "diffusers", "peft"),
    gpus: int = 1,
    limits: str = "",
) -> None:
    """Print the report, and write it to `--output`. gpus: that ran. limits: put on the device, to say beside it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    hardware = f"{gpus} x {device}" if gpus > 1 else device
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    facts = f"{hardware}{limits}, {versions}, {date.today()}, commit {options.commit}"
    text = "\n\n".join([f"# {title}", facts, *filter(None, parts), f"Command: `{command}`"]) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text)
