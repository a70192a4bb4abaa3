"""torchvision's networks as backbones: every one of them, and one of each family closely."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import _api

import mtl
from mtl import build
from mtl.factory import backbone_maker, describe_backbone
from mtl.registry import BACKBONES
from mtl.stages import cut, module_outputs
from mtl.torchvision_backbones import FAMILIES, TorchvisionOptions, family_of
from mtl.weights import load_state

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.cutting import compare

ALL = sorted(models.list_models(module=models))
SMALLEST = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "regnet_y_400mf", "resnet18",
    "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_16",
]  # fmt: skip
"""One of each family; `python -m benchmarks.cutting` does all of them."""
SLOW = {
    "maxvit_t",
    "inception_v3",
    "alexnet",
    "vgg11_bn",
    "vit_b_16",
    "convnext_tiny",
    "swin_t",
    "efficientnet_v2_s",
    "densenet121",
}


def make(name: str, shape: tuple[int, ...], **options: Any) -> mtl.Backbone:
    made = BACKBONES.get(name).create(shape, options=TorchvisionOptions(**options))
    assert isinstance(made, mtl.Backbone)
    return made


def test_every_classification_network_is_registered_and_belongs_to_one_family() -> None:
    assert set(ALL) <= set(BACKBONES.names())
    for name in ALL:
        assert BACKBONES.get(name).name == name
        assert family_of(name) in FAMILIES.values()
    tried = {id(family_of(name)) for name in SMALLEST}
    assert {id(family_of(name)) for name in ALL} - tried == {id(FAMILIES[r"vit_\w+_32"]), id(FAMILIES[r"vit_\w+_14"])}


@pytest.mark.parametrize("name", SMALLEST)
def test_stages_are_the_whole_network_in_float64(name: str) -> None:
    """Outputs, gradients and buffers bit for bit; dropout and stochastic depth on."""
    found = compare(name, side=32)
    assert [found[what] for what in ("eval", "train", "gradients", "buffers")] == [0.0] * 4
    assert len(found["points"]) >= 3
    assert len(found["features"]) == 1


@pytest.mark.parametrize("name", [name for name in SMALLEST if name not in SLOW])
def test_features_are_what_the_last_linear_consumed(name: str) -> None:
    torch.manual_seed(0)
    made = make(name, (3, 64, 64))
    whole = models.get_model(name, weights=None, **family_of(name).arguments((64, 64)))
    state = whole.state_dict()
    load_state(made.network, {key: state[key] for key in made.network.state_dict()})
    x = made.prepare(torch.randn(2, 3, 64, 64))
    last = [m for m in whole.modules() if isinstance(m, nn.Linear)][-1:]
    features = made.network.eval()(x)
    whole.eval()
    if last:
        assert torch.equal(last[0](features), whole(x))
    assert features.ndim == 2


@pytest.mark.parametrize("name", [name for name in ALL if name in SMALLEST and name not in SLOW] + ["swin_t"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 40, 56)])
def test_grayscale_and_small_images_train(name: str, shape: tuple[int, ...]) -> None:
    """With four tasks' towers exchanging at the default points, forward and backward; every tower gets a gradient."""
    tasks = [mtl.Task("tiny", "a", mtl.Classification(("x", "y")), name=f"t{i}") for i in range(2)]
    from mtl.model import MultiTaskModel
    from mtl.standardize import Standardize

    maker = backbone_maker(BACKBONES.get(name), shape, None)
    model = MultiTaskModel(tasks, maker, mtl.CrossStitch(), {"tiny": Standardize(shape, "none")}, shape, 0)
    outputs = model({"tiny": torch.rand(3, *shape)}).outputs
    sum(y.square().sum() for y in outputs.values()).backward()  # type: ignore[union-attr]
    silent = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not silent
    for point, unit in model.exchange().items():
        channels = next(p.shape[0] for p in model.points if p.name == point)
        assert unit.alpha.shape == (2, 2, channels)


def test_transformers_are_stitched_by_channel_not_by_position() -> None:
    """Swin's features are (B, H, W, C) and a ViT's (B, N, C): alpha has an entry per C."""
    about = describe_backbone(BACKBONES.get("swin_t"), (3, 64, 64))
    points = {point["name"]: point for point in about["points"]}
    assert points["features.3"] == {"name": "features.3", "channels": 192, "stride": 8, "shape": [192, 8, 8], "default": True}
    assert points["permute"]["channels"] == 768
    made = make("vit_b_16", (3, 32, 32))
    assert made.points == tuple(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11))
    assert made.is_channels_last("encoder.layers.encoder_layer_2")
    assert not made.is_channels_last("conv_proj")


def test_images_are_resized_to_what_the_network_takes() -> None:
    assert make("resnet18", (3, 28, 28)).size is None
    assert make("vgg11", (1, 28, 40)).size == (32, 40)
    assert make("resnet18", (3, 28, 28), image_size=64).size == (64, 64)
    assert make("vit_b_16", (3, 28, 40)).size == (48, 48)
    assert make("mobilenet_v3_small", (1, 28, 28), image_size=64).prepare(torch.rand(2, 1, 28, 28)).shape == (2, 3, 64, 64)
    for shape, options, message in [
        ((3, 64, 64), {"image_size": 50}, r"image_size=50: 'vit_b_16' takes a multiple of 16 .*; the next is 64"),
        ((4, 64, 64), {}, r"takes images of 1 or 3 channels; found samples of shape \(4, 64, 64\)"),
        ((100,), {}, r"takes images \(C, H, W\) .*; use 'mlp'"),
    ]:
        with pytest.raises(mtl.ConfigError, match=message):
            make("vit_b_16", shape, **options)


def test_illegal_points_are_listed_with_their_reason() -> None:
    about = describe_backbone(BACKBONES.get("mobilenet_v3_small"), (1, 28, 28))
    assert [point["name"] for point in about["points"] if point["default"]] == list(
        make("mobilenet_v3_small", (1, 28, 28)).points
    )
    assert "skips past" in about["illegal"]["features.3.block.0"]
    assert about["illegal"]["features.3.block.0"].startswith("inside 'features.3.block': cannot cut at 'features.3.block'")
    assert {point["stride"] for point in about["points"] if point["name"].startswith("features")} <= {2, 4, 8, 16, 32}
    network = make("mobilenet_v3_small", (3, 64, 64)).network
    for point in about["points"]:  # what is listed as legal can be cut at
        cut(network, [point["name"]])
    assert {*(p["name"] for p in about["points"]), *about["illegal"]} == {name for name, _ in network.named_modules() if name}


# --- pretrained weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Stands in for downloaded weights of mobilenet_v3_small, where torch keeps them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    torch.manual_seed(7)
    state = models.mobilenet_v3_small(weights=None).state_dict()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    url = models.MobileNet_V3_Small_Weights.IMAGENET1K_V1.url
    torch.save(state, folder / url.rpartition("/")[2])
    return state


def test_every_tower_begins_with_the_pretrained_weights(
    cached: dict[str, torch.Tensor], tiny_config: dict[str, Any], in_tmp: Path
) -> None:
    tiny_config["backbone"] = {"name": "mobilenet_v3_small", "weights": "DEFAULT"}
    tiny_config["data"] = {"validation": 12, "standardize": "imagenet"}
    state = build.run(mtl.RunConfig(**tiny_config), in_tmp / "run").model.state_dict()
    for task in ("tiny_a", "tiny_b"):
        own = {n.removeprefix(f"towers.{task}."): v for n, v in state.items() if n.startswith(f"towers.{task}.")}
        assert own.keys() == {name for name in cached if not name.startswith("classifier.3.")}
        assert all(torch.equal(own[name], cached[name]) for name in own)
    assert state["inputs.tiny.mean"].flatten().tolist() == pytest.approx([255 * (0.485 + 0.456 + 0.406) / 3])
    assert state["inputs.tiny.std"].flatten().tolist() == pytest.approx([255 * (0.229 + 0.224 + 0.225) / 3])


def test_a_run_that_is_restored_needs_no_download(
    cached: dict[str, torch.Tensor], tiny_config: dict[str, Any], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config |= {"backbone": {"name": "mobilenet_v3_small", "weights": "DEFAULT"}, "epochs": 1}
    result = mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")
    monkeypatch.setenv("TORCH_HOME", str(in_tmp / "empty"))
    assert mtl.evaluate_run(in_tmp / "run") == result.test


def test_weights_that_cannot_be_had_are_explained(
    tiny_config: dict[str, Any], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(in_tmp / "empty"))

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(_api, "load_state_dict_from_url", offline)
    tiny_config["backbone"] = {"name": "resnet18", "weights": "IMAGENET1K_V1"}
    with pytest.raises(
        mtl.ConfigError, match=r"IMAGENET1K_V1 of resnet18 cannot be had: .*; put resnet18-\w+.pth into .*empty"
    ):
        mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")
    tiny_config["backbone"] = {"name": "resnet18", "weights": "IMAGENET1K_V3"}
    with pytest.raises(mtl.ConfigError, match=r"unknown weights of resnet18 'IMAGENET1K_V3'; known: .*IMAGENET1K_V1"):
        mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")
    assert not (in_tmp / "run").exists()


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "densenet121", "vit_b_32"])
def test_pretrained_weights_fit_families_with_peculiarities(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Auxiliary classifiers in the file, a transformed input, position embeddings of one size."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    extra = {"init_weights": False, "aux_logits": True} if name in ("googlenet", "inception_v3") else {}
    whole = models.get_model(name, weights=None, **extra)
    weights = models.get_model_weights(name).IMAGENET1K_V1
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(whole.state_dict(), tmp_path / "hub" / "checkpoints" / weights.url.rpartition("/")[2])
    made = make(name, (3, 40, 40), weights="IMAGENET1K_V1")
    assert made.pretrained is not None
    made.pretrained(made.network)
    x = made.prepare(torch.randn(2, 3, 40, 40))
    reference = models.get_model(name, weights=weights).eval()
    last = [m for m in reference.modules() if isinstance(m, nn.Linear)][-1]
    if name in ("googlenet", "inception_v3"):
        last = reference.fc
        assert made.network.transform_input is reference.transform_input is True
    torch.testing.assert_close(last(made.network.eval()(x)), reference(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t", "vit_b_16"])
def test_no_convolution_is_taken_for_channels_last(name: str) -> None:
    made = make(name, (3, 32, 32))
    modules = dict(made.network.named_modules())
    outputs = module_outputs(made.network, made.prepare(torch.zeros(2, 3, 32, 32)))
    for point, shape in outputs.items():
        module = modules[point]
        if isinstance(module, nn.Conv2d):
            assert not made.is_channels_last(point), point
        if isinstance(module, nn.LayerNorm) and not isinstance(shape, str) and len(shape) > 1:
            assert made.is_channels_last(point), point


def test_a_size_that_weights_do_not_take_is_refused() -> None:
    with pytest.raises(mtl.ConfigError, match=r"image_size=384: DEFAULT of 'vit_b_32' takes 224"):
        make("vit_b_32", (3, 32, 32), weights="DEFAULT", image_size=384)


def test_a_damaged_download_is_explained(cached: dict[str, torch.Tensor], tiny_config: dict[str, Any], in_tmp: Path) -> None:
    import os

    (file,) = (Path(os.environ["TORCH_HOME"]) / "hub" / "checkpoints").iterdir()
    file.write_text("<html>Sign in to the network</html>")
    tiny_config["backbone"] = {"name": "mobilenet_v3_small", "weights": "DEFAULT"}
    with pytest.raises(
        mtl.ConfigError, match=r"IMAGENET1K_V1 of mobilenet_v3_small cannot be had: .*in place of a damaged one"
    ):
        mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5", "efficientnet_b5"])
def test_a_short_training_from_random_weights_can_be_evaluated(name: str) -> None:
    """After 120 steps on one distribution statistics are those of batches; at a momentum like mnasnet's they are not."""

    def gap(**options: Any) -> float:
        torch.manual_seed(0)
        network = make(name, (3, 32, 32), **options).network
        norm = next(m for m in reversed(list(network.modules())) if isinstance(m, nn.BatchNorm2d))
        x = 0.1 * torch.randn(64, norm.num_features, 2, 2)
        with torch.no_grad():
            for _ in range(120):
                norm.train()(x)
            return float((norm.eval()(x).std() - norm.train()(x).std()).abs())

    assert gap() < 0.1
    assert gap(norm_momentum=0.003) > 0.5


def test_pretrained_networks_keep_their_own_momentum(cached: dict[str, torch.Tensor]) -> None:
    norms = [
        m for m in make("mobilenet_v3_small", (3, 32, 32), weights="DEFAULT").network.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert {m.momentum for m in norms} == {0.01}
