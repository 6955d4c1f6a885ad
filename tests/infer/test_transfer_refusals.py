"""What Transfer cannot make from, said in one line before anything is made: entries, hints, controlnets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infer import cosmos_transfer25 as family
from infer.config import AdapterConfig, ControlnetConfig
from infer.controls import hint_frames
from infer.generate import check_controls, check_requests, generate
from infer.inputs import read_requests
from infer.video import write_mp4
from manifests.config import ModelConfig
from manifests.errors import UsageError
from manifests.hints import write_kinds
from tests.infer.transfer import requests_of, small_config, transfer_model

VIDEO = {"video_path": "in.mp4"}
REFUSED = [
    ({}, "no hint; give one of edge, vis, depth and seg"),
    ({**VIDEO, "edges": {}}, "unknown key 'edges'; did you mean edge?"),
    ({**VIDEO, "edge": {"weight": 1}}, "unknown key 'edge.weight'"),
    ({**VIDEO, "edge": {"preset_edge_threshold": "strong"}}, "edge.preset_edge_threshold = 'strong'"),
    ({**VIDEO, "edge": {"control_weight": -1}}, "edge.control_weight = -1"),
    ({**VIDEO, "depth": {}}, "depth: control_path is missing; `latentline encode --make depth`"),
    ({"edge": {}}, "edge: give control_path, or video_path"),
    ({**VIDEO, "seg": {"control_path": "none.mp4"}}, "none.mp4: no such file"),
    ({**VIDEO, "seg": {"control_path": "in.txt"}}, "is no video"),
    ({**VIDEO, "depth": {"control_path": "short.mp4"}}, "short.mp4 has 5 frames, 17 are to be made; see max_frames"),
    ({**VIDEO, "edge": {"mask_path": "short.mp4"}}, "the edge mask "),
    ({**VIDEO, "depth": {"control_path": "slow.mp4"}}, "has 6 fps, "),
    ({**VIDEO, "edge": {}, "num_conditional_frames": 2}, "num_conditional_frames = 2: Input should be 1 or 5"),
    ({**VIDEO, "edge": {}, "resolution": "1080"}, "resolution = '1080': give 'height,width' in pixels; '480' and"),
    (
        {**VIDEO, "edge": {"preset_blur_strength": "low"}},
        "did you mean preset_edge_threshold?",
    ),
    ({**VIDEO, "edge": {}, "show_input": True}, "unknown key 'show_input'; remove it, and set infer.side_by_side"),
    ({**VIDEO, "edge": {"mask_prompt": "car"}}, "unknown key 'edge.mask_prompt'; give mask_path"),
    ({**VIDEO, "edge": {}, "resolution": "30,48"}, "height = 30 is not divisible by 16"),
    ({**VIDEO, "edge": {}, "name": "a/b"}, "becomes a file name"),
    (
        {**VIDEO, "edge": {}, "image_context_path": "in.png"},
        "unknown key 'image_context_path'; give image_context, a file with",
    ),
    ({**VIDEO, "edge": {}, "image_context": "in.txt"}, "in.txt is no embedding; known suffixes: .npy .safetensors"),
    ({**VIDEO, "vis": {}, "image_context": "in.npy"}, "vis and image_context both say how the video looks"),
    ({**VIDEO, "edge": {}, "image_context": "in.npy"}, "in.npy is of shape [3, 24], the model takes [4, 24]"),
    ({**VIDEO, "edge": {}, "image_context": "torn.npy"}, "torn.npy is unreadable: "),
    (
        {**VIDEO, "edge": {}, "image_context": "two.safetensors"},
        "two.safetensors is unreadable: holds 2 tensors, not one",
    ),
    ({**VIDEO, "edge": {}, "image_context": "whole.npy"}, "whole.npy is unreadable: holds int64"),
]


@pytest.mark.parametrize(("entry", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_a_wrong_entry_is_one_line_that_names_it(
    tiny_transfer: Path, video: Path, tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    shutil.copy(video, tmp_path / "in.mp4")
    (tmp_path / "in.txt").write_text("no video")
    write_mp4(tmp_path / "short.mp4", np.zeros((5, 16, 16, 3), np.uint8), 12.0)
    write_mp4(tmp_path / "slow.mp4", np.zeros((17, 16, 16, 3), np.uint8), 6.0)
    np.save(tmp_path / "in.npy", np.zeros((3, 24), np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((4, 24), np.int64))
    (tmp_path / "torn.npy").write_bytes((tmp_path / "in.npy").read_bytes()[:20])
    save_file({"a": torch.zeros(4, 24), "b": torch.zeros(4, 24)}, tmp_path / "two.safetensors")
    config = small_config(tmp_path / "out")
    with pytest.raises(UsageError) as error:
        generate(transfer_model(tiny_transfer), config, requests_of(tmp_path, config, entry), guardrail=False)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_may_differ_and_weights_exceed_one(tiny_transfer: Path, video: Path, tmp_path: Path) -> None:
    write_mp4(tmp_path / "small.mp4", np.zeros((17, 16, 32, 3), np.uint8), 12.0)
    config = small_config(tmp_path / "out")
    hint = {"control_path": "small.mp4", "mask_path": "small.mp4", "control_weight": 3.0}
    requests = requests_of(tmp_path, config, {"video_path": str(video), "depth": hint})
    check_requests(transfer_model(tiny_transfer), requests)
    assert hint_frames(requests[0], requests[0].controls[0], 0, 2).shape == (2, 32, 48, 3)


def test_a_hint_nothing_was_trained_for_is_refused(tiny_transfer: Path, video: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path / "out")
    [edge] = requests_of(tmp_path, config, {"video_path": str(video), "edge": {}})
    [both] = requests_of(tmp_path, config, {"video_path": str(video), "edge": {}, "vis": {}})
    model = transfer_model(tiny_transfer)
    check_controls(model, config, [edge])
    with pytest.raises(UsageError, match=r"2 hints \(edge, vis\) need a controlnet each"):
        check_controls(model, config, [both])
    shutil.copytree(tiny_transfer / "controlnet", tmp_path / "net")
    write_kinds(tmp_path / "net", ["vis"])
    trained = replace(model, controlnet=str(tmp_path / "net"))
    with pytest.raises(
        UsageError, match=rf"no controlnet was trained for edge: {tmp_path / 'net'} is for vis; name one"
    ):
        check_controls(trained, config, [edge])
    named = replace(config, controlnets={"edge": ControlnetConfig(path=str(tmp_path / "net"))})
    with pytest.raises(UsageError, match=rf"infer\.controlnets\.edge: {tmp_path / 'net'} was trained for vis"):
        check_controls(model, named, [edge])
    beside = {"edge": ControlnetConfig(path=str(tiny_transfer / "controlnet"))}
    check_controls(trained, replace(config, controlnets=beside), [both])
    with pytest.raises(UsageError, match=r"trained for vis: infer\.controlnets has edge; name one in infer"):
        check_controls(model, replace(config, controlnets=beside), [both])


def test_a_controlnet_may_not_stand_where_an_adapter_trained_one(
    tiny_transfer: Path, video: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"controlnet.patch_embed.proj.weight": torch.zeros(1)}, adapter / "trained_weights.safetensors")
    write_kinds(adapter, ["edge"])
    nets = {"vis": ControlnetConfig(path=str(tiny_transfer / "controlnet"))}
    config = small_config(tmp_path / "out", adapters={"mine": AdapterConfig(path=str(adapter))}, controlnets=nets)
    [both] = requests_of(tmp_path, config, {"video_path": str(video), "edge": {}, "vis": {}})
    check_controls(transfer_model(tiny_transfer), config, [both])
    twice = replace(config, controlnets={"edge": nets["vis"]})
    with pytest.raises(UsageError, match=r"would take the place of what infer\.adapters\.mine trained"):
        check_controls(transfer_model(tiny_transfer), twice, [both])
    save_file({"transformer_blocks.0.x": torch.zeros(1)}, adapter / "trained_weights.safetensors")
    check_controls(transfer_model(tiny_transfer), replace(twice, controlnets=nets | twice.controlnets), [both])


def _without_config(net: Path) -> None:
    (net / "config.json").write_text("{")


def _of_the_base(net: Path) -> None:
    config = json.loads((net / "config.json").read_text())
    (net / "config.json").write_text(json.dumps(config | {"_class_name": "CosmosTransformer3DModel"}))


def _with_wider_heads(net: Path) -> None:
    config = json.loads((net / "config.json").read_text())
    (net / "config.json").write_text(json.dumps(config | {"num_attention_heads": 1}))


def _with_other_positions(net: Path) -> None:
    config = json.loads((net / "config.json").read_text())
    (net / "config.json").write_text(json.dumps(config | {"rope_scale": [1.0, 1.0, 1.0]}))


def _with_another_projection(net: Path) -> None:
    file = net / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"crossattn_proj.0.bias": tensors["crossattn_proj.0.bias"] + 1}, file)


def _with_a_torn_header(net: Path) -> None:
    (net / "diffusion_pytorch_model.safetensors").write_bytes((40).to_bytes(8, "little") + b"{" * 40)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_without_config, "NET/config.json: not readable as JSON"),
        (_of_the_base, "NET/config.json: is of a CosmosTransformer3DModel, not of a CosmosControlNetModel"),
        (_with_wider_heads, "NET: cannot be loaded: "),
        (_with_other_positions, "NET: the controlnet is for another transformer: rope_scale differ"),
        (_with_another_projection, "NET has another text projection than model.controlnet CHECKPOINT, and a prompt is"),
        (_with_a_torn_header, "NET/diffusion_pytorch_model.safetensors: not a safetensors file"),
        (shutil.rmtree, "'NET': no such folder"),
    ],
)
def test_a_controlnet_that_cannot_serve_is_one_line_that_names_it(
    tiny_transfer: Path, video: Path, tmp_path: Path, break_it: Callable[[Path], None], message: str
) -> None:
    net = tmp_path / "net"
    shutil.copytree(tiny_transfer / "controlnet", net)
    break_it(net)
    config = small_config(tmp_path / "out", controlnets={"edge": ControlnetConfig(path=str(net))})
    requests = requests_of(tmp_path, config, {"video_path": str(video), "edge": {}, "max_frames": 5})
    with pytest.raises(UsageError) as error:
        generate(transfer_model(tiny_transfer), config, requests, guardrail=False)
    assert message.replace("NET", str(net)).replace("CHECKPOINT", str(tiny_transfer)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_of_resolution_is_the_size_of_the_nearest_shape(video: Path, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    tall = tmp_path / "tall.mp4"
    write_mp4(tall, np.zeros((1, 96, 64, 3), np.uint8), 12.0)
    # 96 x 64 is nearer to 4:3 than to 16:9.
    for path, resolution, size in ((video, "720", (704, 960)), (tall, "480", (640, 480)), (tall, "48,32", (48, 32))):
        [request] = requests_of(tmp_path, config, {"video_path": str(path), "edge": {}, "resolution": resolution})
        assert (request.height, request.width) == size


def test_text_alone_is_refused_and_predict_takes_no_control(
    tiny_transfer: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = small_config(tmp_path / "out")
    requests = read_requests("a red square", config, family.parse_entry)
    with pytest.raises(UsageError, match=r"needs hints; give a \.json file"):
        check_requests(transfer_model(tiny_transfer), requests)
    with pytest.raises(UsageError, match=r"infer\.side_by_side: this model takes no control"):
        check_controls(ModelConfig(path=str(tiny_checkpoint)), replace(config, side_by_side=True), requests)
