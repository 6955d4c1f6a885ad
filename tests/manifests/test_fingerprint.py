import shutil

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.fingerprint import component_folder, files_digest, weights_digest

TENSORS = {f"layer.{i}.weight": torch.arange(i, i + 12, dtype=torch.float32).reshape(3, 4) for i in range(6)}


@pytest.fixture(autouse=True)
def _memo(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def save(folder, tensors, files=1):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = list(tensors)
    for index in range(files):
        part = {name: tensors[name] for name in names[index::files]}
        safetensors.torch.save_file(part, folder / f"model-{index}.safetensors")
    return folder


@pytest.mark.parametrize("files", [2, 3, 6])
def test_weights_are_the_same_however_they_are_split_into_files(tmp_path, files):
    assert weights_digest(save(tmp_path / "a", TENSORS)) == weights_digest(save(tmp_path / "b", TENSORS, files))


def test_weights_are_the_same_after_a_move(tmp_path):
    before = weights_digest(save(tmp_path / "a", TENSORS))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert weights_digest(tmp_path / "b") == before


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(TENSORS)), index=st.integers(0, 11), bit=st.integers(0, 31))
def test_any_bit_of_any_weight_changes_the_digest(tmp_path, name, index, bit):
    original = weights_digest(save(tmp_path / "a", TENSORS))
    flipped = TENSORS[name].clone()
    flipped.view(torch.int32).view(-1)[index] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
    assert weights_digest(save(tmp_path / "a", TENSORS | {name: flipped})) != original


def test_names_shapes_and_types_count_too(tmp_path):
    original = weights_digest(save(tmp_path / "a", TENSORS))
    first = "layer.0.weight"
    renamed = {name.replace("layer.0", "layer.9"): value for name, value in TENSORS.items()}
    for changed in (
        renamed,
        TENSORS | {first: TENSORS[first].reshape(4, 3)},
        TENSORS | {first: TENSORS[first].view(torch.int32)},
        {name: value for name, value in TENSORS.items() if name != first},
    ):
        assert weights_digest(save(tmp_path / "b", changed)) != original


def test_a_prefix_covers_its_tensors_alone(tmp_path):
    one = weights_digest(save(tmp_path / "a", TENSORS), "layer.1")
    assert one == weights_digest(save(tmp_path / "b", TENSORS | {"layer.2.weight": torch.zeros(2)}), "layer.1")
    assert one != weights_digest(save(tmp_path / "c", TENSORS | {"layer.1.weight": torch.zeros(2)}), "layer.1")
    with pytest.raises(UsageError, match=r"no tensor named nope\*"):
        weights_digest(tmp_path / "a", "nope")


def test_a_folder_without_weights_and_a_file_that_is_none_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no safetensors weights"):
        weights_digest(tmp_path / "empty")
    (tmp_path / "empty/a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UsageError, match="not a safetensors file"):
        weights_digest(tmp_path / "empty")
    path = save(tmp_path / "cut", TENSORS) / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UsageError, match="ends before its header says"):
        weights_digest(tmp_path / "cut")


def test_small_files_are_hashed_by_name_and_bytes(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.bin").write_text("ignored")
    before = files_digest(tmp_path, ("*.json",))
    (tmp_path / "b.bin").write_text("still ignored")
    assert files_digest(tmp_path, ("*.json",)) == before
    (tmp_path / "a.json").write_text("{ }")
    assert files_digest(tmp_path, ("*.json",)) != before
    with pytest.raises(UsageError, match="none of"):
        files_digest(tmp_path, ("*.txt",))


def test_components_of_a_local_checkpoint_are_found_or_named(tmp_path, tiny_checkpoint):
    assert component_folder(ModelConfig(path=str(tiny_checkpoint)), "vae").is_dir()
    with pytest.raises(UsageError, match="no 'nope' folder"):
        component_folder(ModelConfig(path=str(tiny_checkpoint)), "nope")
    with pytest.raises(UsageError, match="no such folder"):
        component_folder(ModelConfig(path=str(tmp_path / "nowhere")), "vae")
