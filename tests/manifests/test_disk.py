import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from manifests.disk import refusal, writing
from manifests.errors import LatentlineError
from tests.small_files import small_files

FULL = Path("/dev/full")


def test_a_full_disk_is_one_line():
    message = "^/dev/full: cannot be written: No space left on device; make room there$"
    with pytest.raises(LatentlineError, match=message), writing(FULL), open(FULL, "w") as file:
        file.write("x")


def test_one_that_safetensors_meets_is_the_same_line(tmp_path):
    path = tmp_path / "a.safetensors"
    message = r"a\.safetensors: cannot be written: File too large; raise the limit"
    with small_files(1000), pytest.raises(LatentlineError, match=message), writing(path):
        safetensors.torch.save_file({"a": torch.zeros(10_000)}, path)


def test_other_errors_stay_what_they_are():
    assert refusal(ValueError("x")) is None
    missing = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "b")
    assert refusal(missing) is None
    with pytest.raises(FileNotFoundError), writing(Path("a")):
        raise missing
