import pytest
import torch
from safetensors.torch import load_file

from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.store import Store
from tests.train.caches import make_snapshot
from train.config import EmaConfig, TrainConfig
from train.ema import Ema, kept_share, power_exponent
from train.trainer import train


def test_the_power_average_is_nvidia_s():
    assert power_exponent(0.1) == pytest.approx(7.937, abs=1e-3)
    power = EmaConfig(kind="power", rate=0.1)
    assert kept_share(power, 0) == 0
    assert kept_share(power, 100) == pytest.approx(0.924, abs=1e-3)
    assert kept_share(power, 1000) == pytest.approx(0.992, abs=1e-3)
    assert kept_share(EmaConfig(kind="decay", decay=0.9), 7) == 0.9


@pytest.mark.parametrize("config", [EmaConfig(kind="power"), EmaConfig(kind="decay", decay=0.9)])
def test_the_average_is_the_recursion_written_out(config):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema = Ema(config, {"w": weight})
    expected = weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            weight.add_(torch.tensor([0.5, 0.25]) * (step + 1))
        ema.update(step)
        kept = kept_share(config, step)
        expected = kept * expected + (1 - kept) * weight.detach()
    torch.testing.assert_close(ema.averages["w"], expected)
    raw = weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), raw)
    torch.testing.assert_close(ema.averages["w"], expected)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_checkpoint):
    folder = tmp_path_factory.mktemp("cache")
    return ModelConfig(path=str(tiny_checkpoint)), make_snapshot(folder, tiny_checkpoint), Store(str(folder))


def go(world, output, on_checkpoint=None, **changes):
    settings = {"steps": 4, "batch_size": 2, "dtype": "float32", "lora": {"rank": 2}, "optimizer": {"lr": 1e-2}}
    settings |= {
        "checkpoint_every": 2,
        "track": {"tensorboard": False},
        "ema": {"kind": "power"},
        "output": str(output),
    }
    return train(world[0], TrainConfig(**settings | changes), *world[1:], on_checkpoint=on_checkpoint)


def test_the_average_is_exported_and_resumes_bit_by_bit(world, tmp_path):
    class Killed(Exception):
        pass

    def kill(step, folder):
        assert (folder / "ema.safetensors").is_file()
        raise Killed

    whole = go(world, tmp_path / "whole")
    with pytest.raises(Killed):
        go(world, tmp_path / "killed", on_checkpoint=kill)
    again = go(world, tmp_path / "killed")
    assert again.resumed_from == 2
    assert again.ema == tmp_path / "killed" / "adapter-ema" / again.adapter.name
    raw, average, expected = load_file(again.adapter), load_file(again.ema), load_file(whole.ema)
    assert raw.keys() == average.keys() == expected.keys()
    for name, tensor in average.items():
        assert torch.equal(tensor, expected[name])
        assert not torch.equal(tensor, raw[name])


def test_the_average_changes_no_training(world, tmp_path):
    with_average, without = go(world, tmp_path / "a"), go(world, tmp_path / "b", ema={"kind": "none"})
    first, second = load_file(with_average.adapter), load_file(without.adapter)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert without.ema is None
    assert not (tmp_path / "b" / "adapter-ema").exists()


def test_other_averages_cannot_resume(world, tmp_path):
    go(world, tmp_path / "run")
    with pytest.raises(UsageError, match=r"train\.ema\.kind \(was 'power', now None\)"):
        go(world, tmp_path / "run", ema={"kind": "none"}, steps=6)
