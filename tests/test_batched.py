"""Towers run as one network against one by one: outputs, gradients, buffers, and everything that handles parameters."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision import models, ops
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

import mtl
from mtl.backbones import SmallCNN
from mtl.batchable import Gap, calm, reason_against
from mtl.batched import Batched
from mtl.config import RunConfig
from mtl.execution import Execution, OneByOne, Segment
from mtl.factory import backbone_maker
from mtl.model import MultiTaskModel
from mtl.optim import L2, OptimConfig, lay_out_gradients, make_optimizer
from mtl.registry import BACKBONES
from mtl.sharing import Sharing
from mtl.stacking import apart
from mtl.stages import cut, probe
from mtl.standardize import Standardize
from mtl.weights import load_weights, weights_of, write_weights

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import batching
from benchmarks.cutting import networks

Step = dict[str, list[Tensor]]


def registered(name: str, shape: tuple[int, ...] = (3, 32, 32)) -> Callable[[], tuple[nn.Module, tuple[str, ...]]]:
    def make() -> tuple[nn.Module, tuple[str, ...]]:
        made = BACKBONES.get(name).create(shape)
        assert isinstance(made, mtl.Backbone)
        return made.network, made.points

    return make


def small_cnn() -> tuple[nn.Module, tuple[str, ...]]:
    return SmallCNN((3, 32, 32), 0.25, 0.2), SmallCNN.points


def features_of(network: nn.Module, *points: str) -> tuple[nn.Module, tuple[str, ...]]:
    return network, points


def small_vgg(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Without its hundred million weights of fully connected layers."""
    network = models.get_model(name)
    network.classifier = nn.Sequential(nn.Linear(network.classifier[-7 if name.startswith("vgg") else 1].in_features, 8))
    return network, tuple(n for n, m in network.named_modules() if isinstance(m, nn.MaxPool2d))


def small_swin(**kinds: Any) -> tuple[nn.Module, tuple[str, ...]]:
    network = SwinTransformer(
        [4, 4], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.2, num_classes=5, dropout=0.1, **kinds
    )
    return features_of(network, "features.1", "features.3")


def small_convnext() -> tuple[nn.Module, tuple[str, ...]]:
    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)]
    network = ConvNeXt(blocks, stochastic_depth_prob=0.3, layer_scale=0.5, num_classes=5)
    return features_of(network, "features.1", "features.3")


def small_efficientnet_v2() -> tuple[nn.Module, tuple[str, ...]]:
    blocks = [FusedMBConvConfig(1, 3, 1, 24, 24, 1), FusedMBConvConfig(4, 3, 2, 24, 32, 2), MBConvConfig(4, 3, 2, 32, 40, 2)]
    network = EfficientNet(blocks, dropout=0.2, last_channel=64, num_classes=5)
    return features_of(network, "features.1", "features.2", "features.3")


def small_vit() -> tuple[nn.Module, tuple[str, ...]]:
    network = VisionTransformer(32, 16, 2, 4, 32, 64, dropout=0.1, attention_dropout=0.1, num_classes=5)
    return features_of(network, "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1")


def small_maxvit() -> tuple[nn.Module, tuple[str, ...]]:
    network = MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 4, 0.3, num_classes=5)
    return features_of(network, "blocks.0", "blocks.1")


SWIN, VIT = ("features.1", "features.3"), ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1")
FAMILIES: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[str, ...]]], int, tuple[str, ...]]] = {
    "small_cnn": (small_cnn, 32, ()),
    "mlp": (registered("mlp"), 32, ()),
    "alexnet": (partial(small_vgg, "alexnet"), 64, ()),
    "convnext": (small_convnext, 32, ()),
    "densenet121": (registered("densenet121"), 32, ()),
    "efficientnet_b0": (registered("efficientnet_b0"), 32, ()),
    "efficientnet_v2": (small_efficientnet_v2, 32, ()),
    "googlenet": (registered("googlenet"), 32, ()),
    "inception_v3": (registered("inception_v3", (3, 75, 75)), 75, ()),
    "maxvit": (small_maxvit, 32, ()),
    "mnasnet0_5": (registered("mnasnet0_5"), 32, ()),
    "mobilenet_v2": (registered("mobilenet_v2"), 32, ()),
    "mobilenet_v3_large": (registered("mobilenet_v3_large"), 32, ()),
    "mobilenet_v3_small": (registered("mobilenet_v3_small"), 32, ()),
    "regnet_y_400mf": (registered("regnet_y_400mf"), 32, ()),
    "resnet18": (registered("resnet18"), 32, ()),
    "shufflenet_v2_x0_5": (registered("shufflenet_v2_x0_5"), 32, ()),
    "squeezenet1_0": (registered("squeezenet1_0"), 32, ()),
    "squeezenet1_1": (registered("squeezenet1_1"), 32, ()),
    "swin": (small_swin, 32, SWIN),
    "swin_v2": (partial(small_swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 32, SWIN),
    "vgg11_bn": (partial(small_vgg, "vgg11_bn"), 32, ()),
    "vit": (small_vit, 32, VIT),
}
"""Family -> maker, image size, and the points with channels last. `benchmarks.batching` does full-size networks."""


def towers_of(name: str, tasks: int, granularity: str = "channel") -> tuple[list[nn.Module], list[Segment], Tensor]:
    """T towers in float64 with weights and statistics of their own, stitched by random alphas; and an input."""
    torch.manual_seed(0)
    make, size, channels_last = FAMILIES[name]
    made = [make() for _ in range(tasks)]
    points = made[0][1]
    towers = [network.double().to(memory_format=torch.channels_last) for network, _ in made]  # type: ignore[call-overload]
    for buffer in (b for tower in towers for n, b in tower.named_buffers() if n.endswith(("running_mean", "running_var"))):
        buffer.add_(torch.rand_like(buffer))
    x = torch.randn(3, 3, size, size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    stages = cut(towers[0], points)
    segments = []
    for stage, shape in zip(stages, probe(towers[0], stages, x), strict=True):
        last = stage.point in channels_last
        unit = mtl.CrossStitchUnit(tasks, (shape[-1], *shape[:-1]) if last else shape, granularity).double()
        unit.alpha.data += 0.2 * torch.randn_like(unit.alpha)
        segments.append(Segment((stage,), unit if stage.point in points else None, last))
    return towers, segments, x


def one_step(
    execution: Execution, towers: Sequence[nn.Module], segments: Sequence[Segment], inputs: Sequence[Tensor], seed: int = 1
) -> Step:
    """Outputs, gradients of inputs, towers and units, and buffers, after a forward and a backward pass."""
    units = [segment.unit for segment in segments if segment.unit is not None]
    for module in (*towers, *units):
        module.zero_grad()
    leaves: dict[int, Tensor] = {id(x): x.detach().requires_grad_() for x in inputs}
    torch.manual_seed(seed)
    outputs = execution.run(towers, segments, [leaves[id(x)] for x in inputs])
    torch.stack([y.square().mean() for y in outputs]).sum().backward()
    parameters = [p for module in (*towers, *units) for p in module.parameters()]
    return {
        "outputs": [y.detach() for y in outputs],
        "gradients": [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in (*leaves.values(), *parameters)],
        "buffers": [b.clone() for tower in towers for b in tower.buffers()],
    }


def assert_agree(found: Step, expected: Step, tolerance: float = 1e-9) -> None:
    """To `tolerance` of the largest of all outputs, gradients or buffers where that is above 1."""
    assert expected["outputs"]
    assert found.keys() == expected.keys()
    for what, values in expected.items():
        largest = max([1.0, *(float(b.abs().max()) for b in values if b.numel())])
        for a, b in zip(found[what], values, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance * largest, msg=lambda text, what=what: f"{what}: {text}"
            )


def both(towers: list[nn.Module], segments: list[Segment], inputs: list[Tensor]) -> tuple[Step, Step]:
    """A step of each execution from the same start."""
    start = copy.deepcopy(towers)
    expected = one_step(OneByOne(), start, segments, inputs)
    return one_step(Batched(), towers, segments, inputs), expected


def stacked(towers: Sequence[nn.Module]) -> bool:
    """Whether the towers' parameters lie in common storages: whether they ran as one."""
    first = [next(p for p in tower.parameters() if p.numel()).untyped_storage().data_ptr() for tower in towers]
    return len(set(first)) == 1


# --- equivalence ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_that_of_one_by_one(name: str) -> None:
    """In training mode, then in evaluation mode; stitched, in float64."""
    towers, segments, x = towers_of(name, 2)
    calm(towers)
    before = [b.clone() for b in towers[1].buffers()]
    assert_agree(*both(towers, segments, [x, x]))
    assert stacked(towers)
    if before and name not in ("swin", "swin_v2", "maxvit"):  # whose other buffers are indices
        assert not all(torch.equal(a, b) for a, b in zip(before, towers[1].buffers(), strict=True))
    for tower in towers:
        tower.eval()
    before = [b.clone() for tower in towers for b in tower.buffers()]
    found, expected = both(towers, segments, [x, x])
    assert_agree(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, found["buffers"], strict=True))


@pytest.mark.parametrize("granularity", ["scalar", "channel", "dense"])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_any_number_of_towers_and_inputs_of_their_own(tasks: int, granularity: str) -> None:
    towers, segments, x = towers_of("mlp", tasks, granularity)
    calm(towers)
    assert_agree(*both(towers, segments, [x + i for i in range(tasks)]))
    assert stacked(towers)


@pytest.mark.parametrize("name", ["small_cnn", "densenet121", "shufflenet_v2_x0_5", "vit", "swin", "maxvit"])
def test_nothing_speaks_against_these(name: str) -> None:
    """With dropout and stochastic depth as they come, in float32."""
    towers, segments, x = towers_of(name, 2)
    assert reason_against([t.float() for t in towers], segments, [x.float()] * 2) is None


@pytest.mark.parametrize("name", ["small_cnn", "mlp", "resnet18", "convnext", "vit", "swin", "efficientnet_v2"])
def test_autocast_rounds_alike(name: str) -> None:
    """bf16: the same dtypes, and numbers that differ from fp32's by no more than those of one by one do, or little more."""
    towers, segments, x = towers_of(name, 2)
    calm(towers)
    for module in (*towers, *(s.unit for s in segments if s.unit is not None)):
        module.float().eval()
    inputs = [x.float()] * 2
    exact = one_step(OneByOne(), towers, segments, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = both(towers, segments, inputs)
        assert reason_against(towers, segments, inputs) is None
    for a, b, truth in zip(found["outputs"], expected["outputs"], exact["outputs"], strict=True):
        assert a.dtype == b.dtype
        assert (a - truth).norm() <= 2 * (b - truth).norm() + 1e-6
        assert (a - b).norm() <= 0.05 * truth.norm()
    assert [g.dtype for g in found["gradients"]] == [g.dtype for g in expected["gradients"]]


def test_random_layers_draw_apart_and_as_they_should() -> None:
    """Towers, rows and passes differ; survivors are scaled up; evaluation draws nothing."""
    for layer in (ops.StochasticDepth(0.25, "row"), nn.Dropout(0.25)):
        towers = [nn.Sequential(nn.Linear(1, 1, bias=False), copy.deepcopy(layer)) for _ in range(3)]
        for tower in towers:
            nn.init.ones_(tower[0].weight)
        [stage] = cut(towers[0], ())
        x = torch.ones(4000, 1)
        torch.manual_seed(0)
        first, second = (torch.cat(Batched().run(towers, [Segment((stage,))], [x] * 3), 1).detach() for _ in range(2))
        torch.testing.assert_close(first.unique(), torch.tensor([0.0, 1 / 0.75]))
        torch.testing.assert_close((first == 0).float().mean(0), torch.full((3,), 0.25), atol=0.03, rtol=0)
        draws = torch.cat([first, second], 1)
        together = torch.corrcoef(draws.T) - torch.eye(6)
        assert together.abs().max() < 0.08
        for tower in towers:
            tower.eval()
        assert torch.equal(torch.cat(Batched().run(towers, [Segment((stage,))], [x] * 3), 1), x.expand(-1, 3))


def test_dropout_of_an_input_that_towers_share_draws_apart() -> None:
    towers = [nn.Sequential(nn.Dropout(0.5), nn.Linear(1, 1, bias=False)) for _ in range(2)]
    [stage] = cut(towers[0], ())
    a, b = Batched().run(towers, [Segment((stage,))], [torch.ones(200, 1)] * 2)
    assert not torch.equal(a == 0, b == 0)


def test_stochastic_depth_of_a_whole_batch_drops_towers_apart() -> None:
    towers = [nn.Sequential(nn.Linear(1, 1), ops.StochasticDepth(0.5, "batch")) for _ in range(2)]
    [stage] = cut(towers[0], ())
    torch.manual_seed(0)
    runs = [Batched().run(towers, [Segment((stage,))], [torch.ones(5, 1)] * 2) for _ in range(20)]
    dropped = {tuple(bool((y == 0).all()) for y in ys) for ys in runs}
    assert dropped == {(False, False), (False, True), (True, False), (True, True)}


def test_every_network_of_torchvision_is_on_record_and_exact() -> None:
    recorded = json.loads((batching.RESULTS / "batching.json").read_text())["rows"]
    missing = set(networks()) - {row["network"] for row in recorded}
    assert missing <= {"vit_l_16"}, "whose comparison took more than the 24 GB of the machine"
    for row in recorded:
        assert row["reason"] is None
        if "left_out" in row:
            assert row["parameters"] * batching.BYTES > 24 * 2**30, "only for lack of memory"
            continue
        assert all(Gap(*row[what]).relative < 1e-9 for what in batching.WHAT), row["network"]
    fresh = batching.compare("shufflenet_v2_x0_5", side=32)
    assert fresh["reason"] is None
    assert all(Gap(*fresh[what]).relative < 1e-9 for what in batching.WHAT)


# --- what cannot be batched -------------------------------------------------------------------------------------------------


class Body(nn.Module):
    """A layer, and whatever a test does after it."""

    def __init__(self, then: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.norm, self.then = nn.Linear(4, 4), nn.BatchNorm1d(4), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self, self.norm(self.layer(x)))


def averaged(module: nn.Module, y: Tensor) -> Tensor:
    return y / float(module.norm.num_batches_tracked + 1)


def kept(module: nn.Module, y: Tensor) -> Tensor:
    module.last = y
    return y


def drawn(module: nn.Module, y: Tensor) -> Tensor:
    return y + torch.rand_like(y) if module.training else y


def branching(module: nn.Module, y: Tensor) -> Tensor:
    return y if y.sum() > 0 else -y


def counting(module: nn.Module, y: Tensor) -> Tensor:
    return y * (1 + torch.histc(y.detach(), 4).max())


def factored(module: nn.Module, y: Tensor) -> Tensor:
    return y * float(module.factor)


def plain(module: nn.Module, y: Tensor) -> Tensor:
    return y


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (plain, None),
        (kept, "Body keeps a tensor in its attribute 'last' when it runs"),
        (drawn, "in training mode it draws random numbers that no probability of a module switches off"),
        (
            branching,
            "in training mode: RuntimeError: vmap: It looks like you're attempting to use a Tensor in some",
        ),
        (averaged, "in training mode: RuntimeError: vmap: It looks like you're calling .item() on a Tensor."),
        (counting, "in training mode torch would loop: it has no batched aten::histc"),
    ],
)
def test_networks_that_are_refused(then: Callable[[nn.Module, Tensor], Tensor], reason: str | None) -> None:
    towers = [Body(then) for _ in range(3)]
    [stage] = cut(towers[0], ())
    found = reason_against(towers, [Segment((stage,))], [torch.randn(4, 4)] * 3)
    assert (found or "").startswith(reason or "")
    assert (found is None) == (reason is None)


def test_towers_that_are_refused() -> None:
    def refused(change: Callable[[list[Body]], object]) -> str | None:
        towers = [Body(plain) for _ in range(2)]
        change(towers)
        [stage] = cut(towers[0], ())
        return reason_against(towers, [Segment((stage,))], [torch.randn(4, 4)] * 2)

    assert refused(lambda towers: None) is None
    assert refused(lambda towers: towers[1].layer.requires_grad_(False)) is None
    assert refused(lambda towers: [t.norm.eval() for t in towers]) is None
    assert refused(lambda towers: towers[1].norm.eval()) == (
        "towers differ in what is in training mode: norm of one tower is, of another it is not (frozen?)"
    )
    assert refused(lambda towers: setattr(towers[1].norm, "eps", 1e-3)) == "towers differ in architecture"
    assert refused(lambda towers: setattr(towers[1], "layer", nn.Linear(4, 5))) == "towers differ in architecture"
    assert refused(lambda towers: towers[1].layer.register_forward_hook(lambda *_: None)) == (
        "layer has hooks, which would be called for one tower instead of each"
    )


def test_inputs_and_numbers_that_are_refused() -> None:
    towers = [Body(plain) for _ in range(2)]
    segments = [Segment((cut(towers[0], ())[0],))]
    assert reason_against(towers[:1], segments, [torch.randn(4, 4)]) == "there is a single tower"
    assert reason_against(towers, segments, [torch.randn(4, 4), torch.randn(3, 4)]) == (
        "towers differ in their inputs: (3, 4), (4, 4)"
    )


def test_what_a_tower_knows_beside_its_tensors_is_found_out() -> None:
    """A number of each tower's own would be the first tower's for all, in whatever it is kept."""
    towers = [Body(factored) for _ in range(3)]
    [stage] = cut(towers[0], ())
    for tower, factor in zip(towers, (1.0, 2.0, 1.0), strict=True):
        tower.factor = factor
    found = reason_against(towers, [Segment((stage,))], [torch.randn(4, 4)] * 3)
    assert found == "towers differ in the attribute 'factor' of the network"
    for tower, factor in zip(towers, (1.0, 1.0, 2.0), strict=True):
        tower.factor = Fraction(factor)
    found = reason_against(towers, [Segment((stage,))], [torch.randn(4, 4)] * 3)
    assert found == "in training mode outputs differ from those of one by one"


def test_tensors_in_the_same_memory_would_come_apart() -> None:
    towers = [Body(plain) for _ in range(2)]
    for tower in towers:
        tower.register_buffer("again", next(tower.parameters()).data)
    [stage] = cut(towers[0], ())
    found = reason_against(towers, [Segment((stage,))], [torch.randn(4, 4)] * 2)
    assert found is not None
    assert found.startswith("again and ")
    assert found.endswith("are in the same memory")


def test_a_trial_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TypeError("no float64 on this device")

    towers, segments, x = towers_of("small_cnn", 2)
    monkeypatch.setattr(nn.Module, "double", refuse)
    assert reason_against(towers, segments, [x, x]) == "it cannot be tried: TypeError: no float64 on this device"


def test_a_trial_leaves_no_trace() -> None:
    towers, segments, x = towers_of("small_cnn", 2)
    towers[1].pool1.conv.requires_grad_(False)
    one_step(OneByOne(), towers, segments, [x, x])
    torch.manual_seed(3)

    def everything() -> list[Any]:
        found: list[Any] = [torch.get_rng_state(), torch.is_grad_enabled()]
        for tower in towers:
            found += [m.training for m in tower.modules()] + [p.requires_grad for p in tower.parameters()]
            found += [t.clone() for t in tower.state_dict().values()] + [p.grad for p in tower.parameters()]
            found += [p.data_ptr() for p in tower.parameters()]
        return found

    before = everything()
    with torch.no_grad():
        assert reason_against(towers, segments, [x, x]) is None
        after = everything()
    before[1] = after[1]
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))


def test_a_pass_that_cannot_be_batched_goes_one_by_one() -> None:
    towers = [Body(plain) for _ in range(2)]
    segments = [Segment((cut(towers[0], ())[0],))]
    for inputs in ([torch.randn(4, 4), torch.randn(3, 4)], [torch.randn(4, 4)]):
        assert_agree(*both(towers[: len(inputs)], segments, inputs))
    towers[1].norm.eval()
    assert_agree(*both(towers, segments, [torch.randn(4, 4)] * 2))
    assert not stacked(towers)
    towers[1].norm.train()
    assert_agree(*both(towers, segments, [torch.randn(4, 4)] * 2), tolerance=1e-5)
    assert stacked(towers)


# --- parameters stay the towers' own ----------------------------------------------------------------------------------------


@pytest.fixture
def ran() -> tuple[list[nn.Module], list[Segment], Tensor]:
    """Towers that ran as one."""
    towers, segments, x = towers_of("small_cnn", 3)
    calm(towers)
    one_step(Batched(), towers, segments, [x] * 3)
    return towers, segments, x


def addresses(towers: Sequence[nn.Module]) -> list[int]:
    return [t.data_ptr() for tower in towers for t in (*tower.parameters(), *tower.buffers())]


def test_parameters_are_moved_once_and_keep_their_layout() -> None:
    towers, segments, x = towers_of("small_cnn", 3)
    parameters = [id(p) for tower in towers for p in tower.parameters()]
    strides = [p.stride() for tower in towers for p in tower.parameters()]
    values = [p.detach().clone() for tower in towers for p in tower.parameters()]
    with torch.inference_mode():
        Batched().run(towers, segments, [x] * 3)
    where = addresses(towers)
    for _ in range(2):
        one_step(Batched(), towers, segments, [x] * 3)
    now = [p for tower in towers for p in tower.parameters()]
    assert addresses(towers) == where
    assert len(set(where)) == len(where)
    assert [id(p) for p in now] == parameters
    assert [p.stride() for p in now] == strides
    assert all(p.is_leaf and not p.is_inference() and torch.equal(p, value) for p, value in zip(now, values, strict=True))
    weight = towers[1].pool2.conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@pytest.mark.parametrize(
    "move",
    [
        lambda towers: [t.float().double() for t in towers],
        lambda towers: [t.to(memory_format=torch.contiguous_format) for t in towers],
        lambda towers: copy.deepcopy(towers),
        lambda towers: pickle.loads(pickle.dumps(towers)),
        lambda towers: [t for t in towers if t.load_state_dict({k: v.clone() for k, v in t.state_dict().items()}, assign=True)],
        lambda towers: [t for t in towers if apart(t) is None],
        lambda towers: towers[:1] + [copy.deepcopy(t) for t in towers[1:]],
        lambda towers: [towers[2], towers[0], towers[1]],
        lambda towers: towers[::2],
        lambda towers: towers[1:],
    ],
)
def test_towers_may_be_moved(
    ran: tuple[list[nn.Module], list[Segment], Tensor], move: Callable[[list[nn.Module]], list[nn.Module]]
) -> None:
    """To another dtype, layout, order or company, or into copies: they still run as one, and agree."""
    towers, segments, x = ran
    moved = move(towers)
    if len(moved) < 3:
        segments = [Segment(segment.stages) for segment in segments]
    assert_agree(*both(moved, segments, [x] * len(moved)))
    assert_agree(*both(moved, segments, [x] * len(moved)))
    assert stacked(moved)


def test_some_towers_of_many_at_uneven_distances() -> None:
    """As in evaluation by dataset: 0, 1 and 3 of four do not leave their places, and keep their own statistics."""
    towers, segments, x = towers_of("small_cnn", 4)
    calm(towers)
    segments = [Segment(segment.stages) for segment in segments]
    one_step(Batched(), towers, segments, [x] * 4)
    where = addresses(towers)
    some = [towers[0], towers[1], towers[3]]
    assert_agree(*both(some, segments, [x] * 3))
    assert addresses(towers) == where


def test_all_towers_after_some() -> None:
    """Whatever ran first, the largest company ends up together."""
    towers, segments, x = towers_of("mlp", 4)
    calm(towers)
    segments = [Segment(segment.stages) for segment in segments]
    for some in (towers[::2], towers[1:3], towers, towers[:2]):
        assert_agree(*both(some, segments, [x] * len(some)))
    assert stacked(towers)


def test_apart_gives_everything_memory_of_its_own(ran: tuple[list[nn.Module], list[Segment], Tensor]) -> None:
    towers, _, _ = ran
    assert stacked(towers)
    before = [t.clone() for t in towers[0].state_dict().values()]
    apart(towers[0])
    assert all(p.untyped_storage().nbytes() == p.numel() * 8 for p in towers[0].parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, towers[0].state_dict().values(), strict=True))
    assert towers[0].pool2.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_of_frozen_towers_do_not_appear(ran: tuple[list[nn.Module], list[Segment], Tensor]) -> None:
    towers, segments, x = ran
    towers[1].requires_grad_(False)
    towers[0].pool1.conv.weight.requires_grad_(False)
    assert_agree(*both(towers, segments, [x] * 3))
    one_step(Batched(), towers, segments, [x] * 3)
    assert all(p.grad is None for p in towers[1].parameters())
    assert towers[0].pool1.conv.weight.grad is None
    assert all(p.grad is not None for p in towers[2].parameters())
    for tower in towers:
        tower.requires_grad_(False)
    assert not Batched().run(towers, [Segment(segment.stages) for segment in segments], [x] * 3)[0].requires_grad


def test_gradients_are_views_of_one_tensor_and_laid_out_as_parameters(
    ran: tuple[list[nn.Module], list[Segment], Tensor],
) -> None:
    towers, segments, x = ran
    for tower in towers:
        tower.zero_grad()
    Batched().run(towers, segments, [x] * 3)[0].sum().backward()
    fc = [tower.fc3.fc.weight for tower in towers]
    assert len({w.grad.untyped_storage().data_ptr() for w in fc}) == 1
    for tower in towers:
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in tower.parameters())


def test_tied_weights_stay_tied() -> None:
    def make() -> nn.Module:
        shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.Tanh(), shared)

    towers = [make() for _ in range(2)]
    [stage] = cut(towers[0], ())
    assert_agree(*both(towers, [Segment((stage,))], [torch.randn(3, 4)] * 2), tolerance=1e-6)
    assert towers[1][0].weight is towers[1][2].weight


# --- whole models -----------------------------------------------------------------------------------------------------------

HEADS = [mtl.Classification([f"c{i}" for i in range(n)]) for n in (3, 2, 4)]
KINDS: dict[str, Sharing] = {
    "unshared": mtl.Unshared(),
    "split": mtl.SplitAt(at="pool1"),
    "hard_shared": mtl.HardShared(),
    **{f"stitch_{g}": mtl.CrossStitch(granularity=g) for g in ("scalar", "channel", "dense")},  # type: ignore[arg-type]
}


def model_of(sharing: Sharing, datasets: Sequence[str] = ("d",), backbone: Any = None) -> MultiTaskModel:
    choice = backbone or {"name": "small_cnn", "width": 0.1, "dropout": 0.0}
    options = RunConfig(tasks=["tiny_a"], backbone=choice).backbone
    tasks = [mtl.Task(datasets[i % len(datasets)], "y", HEADS[i], name=f"t{i}") for i in range(3)]
    inputs = {name: Standardize((1, 8, 8), "none") for name in datasets}
    maker = backbone_maker(BACKBONES.get(options.name), (1, 8, 8), options.options)
    model = MultiTaskModel(tasks, maker, sharing, inputs, (1, 8, 8), 0).double()
    torch.manual_seed(5)
    for unit in model.units.values():
        unit.alpha.data += 0.1 * torch.randn_like(unit.alpha)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def images(n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair_of(sharing: Sharing, datasets: Sequence[str] = ("d",), backbone: Any = None) -> tuple[MultiTaskModel, MultiTaskModel]:
    """The same model, batched and one by one."""
    batched, plain = model_of(sharing, datasets, backbone), model_of(sharing, datasets, backbone)
    batched.execution = Batched()
    return batched, plain


def assert_same_state(a: nn.Module, b: nn.Module, tolerance: float = 1e-9) -> None:
    state, other = a.state_dict(), b.state_dict()
    assert state
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_one_by_one(kind: str, optimizer: str) -> None:
    """Three steps with fused optimizers, L2 and clipping, and an evaluation between: parameters, buffers and outputs."""
    models = pair_of(KINDS[kind])
    for model in models:
        config = OptimConfig(name=optimizer, lr=1e-2, l2=1e-2, clip_norm=0.5)  # type: ignore[arg-type]
        exchange = [p for unit in model.exchange().values() for p in unit.parameters()]
        stepper = make_optimizer(config, model, exchange, (), 2.0)
        l2 = L2(stepper, config.l2)
        for seed in range(3):
            model.train()
            outputs = model({"d": images(seed=seed)}).outputs
            torch.stack([y.square().mean() for y in outputs.values()]).sum().backward()
            l2.add_gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            lay_out_gradients(model.parameters())
            stepper.step()
            stepper.zero_grad()
            model.eval()
            with torch.inference_mode():
                model({"d": images(4, 9)})
    assert_same_state(*models)
    assert kind == "hard_shared" or stacked(list(models[0].towers.values()))


@pytest.mark.parametrize("sharing", [mtl.Unshared(), mtl.SplitAt(at="pool1"), mtl.CrossStitch()], ids=lambda s: s.kind)
def test_two_datasets(sharing: Sharing) -> None:
    """Of one size, of two, and one alone."""
    models = pair_of(sharing, ("b", "a"))
    for batch in ({"a": images(4), "b": images(4, 1)}, {"a": images(4), "b": images(3, 1)}, {"b": images(5)}):
        found = [model(batch).outputs for model in models]
        for name, y in found[1].items():
            torch.testing.assert_close(found[0][name], y, rtol=1e-9, atol=1e-9)
        for outputs in found:
            torch.stack([y.square().mean() for y in outputs.values()]).sum().backward()
        assert_same_state(*models)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            zero = torch.zeros_like(p)
            torch.testing.assert_close(p.grad if p.grad is not None else zero, q.grad if q.grad is not None else zero, msg=name)


def test_weights_are_saved_tower_by_tower_and_loaded(tmp_path: Path) -> None:
    batched, plain = pair_of(mtl.CrossStitch())
    batched({"d": images()})
    plain({"d": images()})
    for model, file in ((batched, "batched"), (plain, "plain")):
        write_weights(tmp_path / file, weights_of(model), {})
    assert (tmp_path / "batched").stat().st_size == (tmp_path / "plain").stat().st_size
    fresh, _ = pair_of(mtl.CrossStitch())
    fresh({"d": images(seed=3)})
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    load_weights(tmp_path / "batched", fresh)
    assert_same_state(fresh, plain)
    assert stacked(list(fresh.towers.values()))
    for model in (fresh, plain):
        model.eval()
    torch.testing.assert_close(fresh({"d": images()}).outputs, plain({"d": images()}).outputs)


def test_a_pass_over_other_buffers_leaves_the_models_own_alone() -> None:
    """As FAMO's second look at a batch does."""
    batched, _ = pair_of(mtl.CrossStitch())
    batched({"d": images()})
    before = {name: buffer.clone() for name, buffer in batched.named_buffers()}
    others = {name: buffer.clone() for name, buffer in batched.named_buffers()}
    with torch.no_grad():
        functional_call(batched, others, ({"d": images()},))
    assert all(torch.equal(before[name], buffer) for name, buffer in batched.named_buffers())
    batched({"d": images()})
    moved = dict(batched.named_buffers())
    assert all(torch.equal(others[name], buffer) for name, buffer in moved.items())
    assert not torch.equal(before["towers.t1.pool1.bn.running_mean"], moved["towers.t1.pool1.bn.running_mean"])


def test_gradients_through_replaced_parameters() -> None:
    """`functional_call` puts tensors with a history where parameters were."""
    batched, plain = pair_of(mtl.CrossStitch())
    gradients = []
    for model in (batched, plain):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        scaled = {name: p * scale for name, p in model.named_parameters()}
        outputs = functional_call(model, scaled, ({"d": images()},)).outputs
        torch.stack([y.square().mean() for y in outputs.values()]).sum().backward()
        gradients.append(scale.grad)
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["unshared", "split", "stitch_channel"])
@pytest.mark.parametrize("balancer", ["upgrad", "pcgrad", "famo"])
def test_balancers_that_differentiate_per_task(kind: str, balancer: str) -> None:
    from mtl.registry import BALANCERS

    models = pair_of(KINDS[kind])
    for model in models:
        made = BALANCERS.get(balancer).create(["t0", "t1", "t2"])
        model.train()
        if kind == "stitch_channel":
            model.freeze(["towers.t1.pool1.conv", "towers.t2.fc3.fc"])
        found = model({"d": images()})
        losses = [y.square().mean() * (i + 1) for i, y in enumerate(found.outputs.values())]
        torch.manual_seed(0)
        assert isinstance(made, mtl.Balancer)
        made.backward(losses, list(found.features.values()), model.shared_parameters())
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_one_task_at_a_time() -> None:
    """`autograd.grad` over one graph again and again, and `backward` on top of what is there."""
    models = pair_of(mtl.CrossStitch())
    results = []
    for model in models:
        outputs = list(model({"d": images()}).outputs.values())
        towers = [p for name, p in model.named_parameters() if name.startswith("towers.")]
        rows = [torch.autograd.grad(y.square().mean(), towers, retain_graph=True, allow_unused=True) for y in outputs]
        for y in outputs:
            y.square().mean().backward(retain_graph=True)
        zeros = [torch.zeros_like(p) for p in towers]
        results.append([[z if g is None else g for g, z in zip(row, zeros, strict=True)] for row in rows])
        for i, p in enumerate(towers):
            torch.testing.assert_close(p.grad, torch.stack([row[i] for row in results[-1]]).sum(0))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)


def test_floating_point_operations_are_counted_alike() -> None:
    counts = []
    for model in pair_of(mtl.Unshared(), backbone="resnet18"):
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model({"d": images(2)})
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_model_that_ran_batched_is_copied_and_pickled() -> None:
    batched, plain = pair_of(mtl.CrossStitch())
    for model in (batched, plain):
        model({"d": images()})
    for other in (copy.deepcopy(batched), pickle.loads(pickle.dumps(batched))):
        other({"d": images(seed=1)})
        same = copy.deepcopy(plain)
        same({"d": images(seed=1)})
        assert_same_state(other, same)
    assert_same_state(batched, plain)


# --- units ------------------------------------------------------------------------------------------------------------------


class Rolling(mtl.ExchangeUnit):
    """Passes features around; says nothing about stacked ones."""

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [2 * f for f in (*features[1:], features[0])]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", ["rolling", "scalar", "channel", "dense"])
def test_units_mix_stacked_features_as_they_mix_separate_ones(kind: str, channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for tasks in (2, 3, 6):
        unit = Rolling() if kind == "rolling" else mtl.CrossStitchUnit(tasks, (4, 2, 3), kind)
        for alpha in unit.parameters():
            alpha.data += torch.randn(alpha.shape, generator=generator)
        shape = (5, 2, 3, 4) if channels_last else (5, 4, 2, 3)
        features = torch.randn(tasks, *shape, generator=generator)
        segment = Segment((), unit, channels_last)
        expected = segment.exchange(list(features.unbind(0)))
        torch.testing.assert_close(segment.exchange_stacked(features), torch.stack(expected))
        if kind == "dense":
            continue
        half = features.bfloat16()
        found, exact = segment.exchange_stacked(half), torch.stack(segment.exchange(list(half.double().unbind(0))))
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), exact.double(), rtol=0.02, atol=0.05)


def test_a_small_alpha_is_not_lost_in_bf16() -> None:
    """An alpha of 0.9985, which is 1 in bf16, scales the features by 0.9985 on average."""
    torch.manual_seed(0)
    unit = mtl.CrossStitchUnit(2, (8,), "channel", same=0.9985, cross=0.3)
    x = torch.randn(2, 8192, 8).to(torch.bfloat16)
    mixed = unit.forward_stacked(x)[0].double()
    exact = 0.9985 * x[0].double() + 0.3 * x[1].double()
    assert abs((mixed * exact).sum() / exact.square().sum() - 1) < 3e-4


def test_the_default_goes_through_hooks() -> None:
    unit, calls = Rolling(), []
    unit.register_forward_hook(lambda *_: calls.append(1))
    unit.forward_stacked(torch.zeros(2, 3, 4))
    assert calls == [1]


# --- operations by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(5, 3), (4, 5)),
        (lambda: nn.Linear(5, 3, bias=False), (7, 5)),
        (lambda: nn.Linear(5, 3), (4, 6, 5)),
        (lambda: nn.Linear(50, 3), (4, 2, 3, 50)),
        (lambda: nn.Linear(5, 3), (5,)),
        (lambda: nn.LayerNorm(5), (4, 5)),
        (lambda: nn.LayerNorm((6, 5), bias=False), (4, 6, 5)),
        (lambda: nn.LayerNorm(5, elementwise_affine=False), (4, 5)),
        (lambda: nn.BatchNorm1d(5), (4, 5)),
        (lambda: nn.BatchNorm1d(5, affine=False), (4, 5, 3)),
        (lambda: nn.BatchNorm2d(5, track_running_stats=False), (4, 5, 3, 2)),
        (lambda: nn.BatchNorm2d(5, momentum=0.5), (4, 5, 3, 2)),
        (lambda: nn.BatchNorm3d(5), (4, 5, 3, 2, 2)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1, ceil_mode=True)), (2, 3, 9, 9)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False)), (2, 3, 9, 9)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d((None, 2))), (2, 3, 9, 9)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)), (3, 9, 9)),
        (lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 4, 3)), (2, 3, 9, 9)),
        (lambda: nn.Conv2d(4, 6, 3, 2, "valid", groups=2), (2, 4, 9, 9)),
        (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", bias=False), (2, 4, 9, 9)),
        (lambda: nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 9)),
        (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    ],
)
def test_by_hand_is_what_one_by_one_does(layer: Callable[[], nn.Module], shape: tuple[int, ...], shared: bool) -> None:
    torch.manual_seed(0)
    towers = [layer().double() for _ in range(3)]
    for p in (p for tower in towers for p in tower.parameters()):
        nn.init.normal_(p)
    [stage] = cut(towers[0], ())
    x = torch.randn(3, *shape, dtype=torch.float64)
    inputs = [x[0]] * 3 if shared else list(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_agree(*both(towers, [Segment((stage,))], inputs))
        for tower in towers:
            tower.eval()
        assert_agree(*both(towers, [Segment((stage,))], inputs))


def test_attention_runs_without_a_loop() -> None:
    """Through the module and through the function; warnings, which torch gives where it loops, are errors."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, dim=1)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return y

    for kind in (Plain, Module, lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)):
        towers = [kind().double() for _ in range(2)]
        [stage] = cut(towers[0], ())
        x = torch.randn(3, 5, 8, dtype=torch.float64)
        for training in (True, False):
            for tower in towers:
                tower.train(training)
            assert_agree(*both(towers, [Segment((stage,))], [x, x]))
            with torch.no_grad():
                found, expected = (e.run(towers, [Segment((stage,))], [x, x]) for e in (Batched(), OneByOne()))
            torch.testing.assert_close(found, expected)
