"""Cutting networks: bit-equal to the whole network where it is allowed, refused with the reason where it is not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl.backbones import MLP, SmallCNN
from mtl.stages import CutError, cut, keep_only, legal_points, probe


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    network = resnet18(weights=None)
    network.fc = nn.Identity()
    return network


NETWORKS = {
    "small_cnn": (lambda: SmallCNN((1, 12, 12), 0.2), ["pool1", "pool2", "fc3"], (1, 12, 12)),
    "mlp": (lambda: MLP(7, (6, 5, 4), 0.5), ["fc1", "fc2", "fc3"], (7,)),
    "resnet18": (resnet, ["layer1", "layer2.0", "layer3", "layer4"], (3, 32, 32)),
    "resnet18 whole": (resnet, [], (3, 32, 32)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_equal_the_whole_network_bitwise(name: str) -> None:
    """Outputs, gradients and buffers, in training mode with dropout on, and outputs in evaluation mode."""
    make, points, shape = NETWORKS[name]
    torch.manual_seed(0)
    whole = make()
    parts = copy.deepcopy(whole)
    stages = cut(parts, points)
    assert [stage.point for stage in stages] == [*points, "<end>"]
    x = torch.randn(4, *shape)

    def staged(x: Tensor) -> Tensor:
        for stage in stages:
            x = stage(parts, x)
        return x

    torch.manual_seed(1)
    expected = whole.train()(x)
    torch.manual_seed(1)
    got = staged(x)
    assert torch.equal(got, expected)
    expected.square().sum().backward()
    got.square().sum().backward()
    for (key, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    for (key, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    whole.eval()
    parts.eval()
    assert torch.equal(staged(x), whole(x))


def test_the_same_stages_run_another_tower() -> None:
    torch.manual_seed(0)
    first, second = SmallCNN((1, 8, 8), 0.1).eval(), SmallCNN((1, 8, 8), 0.1).eval()
    x = torch.randn(2, 1, 8, 8)
    y = x
    for stage in cut(first, ["pool1", "fc3"]):
        y = stage(second, y)
    assert torch.equal(y, second(x))
    assert not torch.equal(y, first(x))


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda stage: pickle.loads(pickle.dumps(stage))], ids=["deepcopy", "pickle"])
def test_stages_copy_and_pickle(remake) -> None:  # type: ignore[no-untyped-def]
    network = resnet().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = network(x)
    y = x
    for stage in map(remake, cut(network, ["layer2"])):
        y = stage(network, y)
    assert torch.equal(y, expected)


class Functional(nn.Module):
    """Code above its layers that depends on the mode: the case that would silently be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.a(x), 0.5, self.training))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


class WithToken(nn.Module):
    """Reads a parameter of its own above its layers, as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.token = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return self.b(self.a(x) + self.token) * scale


@pytest.mark.parametrize(
    ("network", "points", "message"),
    [
        (resnet, ["layer5"], r"unknown layer point 'layer5'; known: .* \(did you mean 'layer"),
        (resnet, ["layer2", "layer1"], r"must be in execution order: layer1, layer2; found layer2, layer1"),
        (resnet, ["layer1", "layer1"], r"named twice"),
        (resnet, ["layer1.0.conv1"], r"cannot cut at 'layer1.0.conv1': add.* also needs .*, which skips past it"),
        (Functional, ["a"], r"reads self.training"),
        (Twice, ["a"], r"'a' runs more than once"),
        (Branching, ["a"], r"cannot be traced"),
    ],
)
def test_what_cannot_be_cut_is_refused(network, points: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    made = network()
    made.eval()
    with pytest.raises(CutError, match=message):
        cut(made, points)
    assert not made.training


def test_parameters_read_above_the_points_and_default_arguments() -> None:
    network = WithToken()
    x = torch.randn(3, 4)
    y = x
    for stage in cut(network, ["a"]):
        y = stage(network, y)
    assert torch.equal(y, network(x))
    y.sum().backward()
    assert network.token.grad is not None


def test_a_network_that_cannot_be_traced_runs_whole() -> None:
    network = Branching()
    x = torch.randn(3, 4)
    (stage,) = cut(network, [])
    assert torch.equal(stage(network, x), network(x))


def test_legal_points_of_a_residual_network() -> None:
    legal, illegal = legal_points(resnet())
    assert {"layer1", "layer1.0", "layer4.1", "maxpool", "avgpool"} <= set(legal)
    assert "layer1.0.bn1" in illegal
    assert "skips past" in illegal["layer1.0.bn1"]


def test_keep_only_deletes_the_rest() -> None:
    network = resnet()
    stages = cut(network, ["layer2"])
    x = torch.randn(2, 3, 32, 32)
    network.eval()
    expected = stages[0](network, x)
    keep_only(network, stages[0].modules)
    assert torch.equal(stages[0](network, x), expected)
    assert {key.split(".")[0] for key in network.state_dict()} == {"conv1", "bn1", "layer1", "layer2"}


def test_probe_gives_shapes_and_explains_failures() -> None:
    network = resnet()
    stages = cut(network, ["layer1", "layer3"])
    network.train()
    assert probe(network, stages, torch.zeros(2, 3, 64, 64)) == [(64, 16, 16), (256, 4, 4), (512,)]
    assert network.training
    assert int(network.bn1.num_batches_tracked) == 0
    with pytest.raises(CutError, match=r"fails on its way to 'layer1' with an input of shape \(5, 8, 8\)"):
        probe(network, stages, torch.zeros(2, 5, 8, 8))
