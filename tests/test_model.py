"""The model: kinds of sharing against each other, names of parameters, symmetries over tasks and datasets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtl
from mtl.batched import Batched
from mtl.config import RunConfig
from mtl.execution import Execution, OneByOne
from mtl.factory import backbone_maker
from mtl.model import MultiTaskModel
from mtl.registry import BACKBONES
from mtl.sharing import Sharing
from mtl.standardize import Standardize
from mtl.weights import load_weights, weights_of, write_weights

SHAPE = (1, 8, 8)
POINTS = ("pool1", "pool2", "fc3")
HEADS = [mtl.Classification([f"c{i}" for i in range(n)]) for n in (3, 2, 4, 2, 3)]


def make(
    sharing: Sharing,
    tasks: int | Sequence[int] = 2,
    backbone: dict[str, Any] | str = "small_cnn",
    datasets: Sequence[str] = ("d",),
    seed: int = 0,
) -> MultiTaskModel:
    which = range(tasks) if isinstance(tasks, int) else tasks
    made = [mtl.Task(datasets[i % len(datasets)], "y", HEADS[i], name=f"t{i}") for i in which]
    choice = {"name": backbone, "width": 0.1, "dropout": 0.0} if backbone == "small_cnn" else backbone
    options = RunConfig(tasks=["tiny_a"], backbone=choice).backbone
    maker = backbone_maker(BACKBONES.get(options.name), SHAPE, options.options)
    inputs = {name: Standardize(SHAPE, "none") for name in datasets}
    return MultiTaskModel(made, maker, sharing, inputs, SHAPE, seed).double()


def images(n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("granularity", ["scalar", "channel", "dense"])
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
def test_identity_stitch_equals_unshared(tasks: int, granularity: str) -> None:
    """Outputs and every gradient, in training mode; and alpha itself receives gradient at every point."""
    alone, stitched = make(mtl.Unshared(), tasks), make(mtl.CrossStitch(granularity=granularity), tasks)
    results = []
    for model in (alone, stitched):
        model.train()
        outputs = model({"d": images()}).outputs
        sum(output.square().sum() for output in outputs.values()).backward()  # type: ignore[union-attr]
        results.append(outputs)
    for name in results[0]:
        torch.testing.assert_close(results[1][name], results[0][name])
    gradients = {name: p.grad for name, p in stitched.named_parameters()}
    for name, p in alone.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, msg=name)
    for point in POINTS:
        alpha = gradients[f"units.{point}.alpha"]
        assert alpha is not None
        blocks = (
            alpha.view(tasks, len(alpha) // tasks, tasks, -1) if granularity == "dense" else alpha.view(tasks, 1, tasks, -1)
        )
        assert blocks.abs().sum((1, 3)).gt(0).all(), point  # from every task to every task


@pytest.mark.parametrize(
    "sharing", [mtl.Unshared(), mtl.HardShared(), mtl.SplitAt(at="pool1"), mtl.CrossStitch()], ids=lambda s: s.kind
)
def test_permuting_tasks_permutes_outputs(sharing: Sharing) -> None:
    """A task starts from the same weights and gives the same output wherever it stands in the list."""
    one, other = make(sharing, [0, 1, 2]), make(sharing, [2, 0, 1])
    for model in (one, other):
        model.eval()
    a, b = one({"d": images()}).outputs, other({"d": images()}).outputs
    assert list(a) != list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_a_tower_starts_alike_in_every_arm_and_set_of_tasks() -> None:
    pair, single = make(mtl.CrossStitch(), 2).state_dict(), make(mtl.Unshared(), 1).state_dict()
    towers = [name for name in single if name.startswith(("towers.t0.", "heads.t0."))]
    assert len(towers) > 10
    assert all(torch.equal(single[name], pair[name]) for name in towers)
    assert not torch.equal(pair["towers.t0.pool1.conv.weight"], pair["towers.t1.pool1.conv.weight"])
    other = make(mtl.Unshared(), 1, seed=1).state_dict()
    assert not torch.equal(single["towers.t0.pool1.conv.weight"], other["towers.t0.pool1.conv.weight"])


def test_names_say_what_a_parameter_is() -> None:
    plain = {name for name, _ in BACKBONES.get("small_cnn").create(SHAPE).network.named_parameters()}
    names = {name for name, _ in make(mtl.CrossStitch(points=("pool1", "fc3"))).named_parameters()}
    towers = {f"towers.t{t}.{name}" for t in (0, 1) for name in plain}
    assert {n for n in names if n.startswith("towers.")} == towers
    assert {n for n in names if n.startswith("units.")} == {"units.pool1.alpha", "units.fc3.alpha"}
    split = {name for name, _ in make(mtl.SplitAt(at="pool2")).named_parameters()}
    assert {n.split(".")[1] for n in split if n.startswith("trunk.")} == {"pool1", "pool2"}
    assert {n.split(".")[2] for n in split if n.startswith("towers.")} == {"fc3"}
    hard = {name for name, _ in make(mtl.HardShared()).named_parameters()}
    assert {n.removeprefix("trunk.") for n in hard if not n.startswith("heads.")} == plain


def test_split_runs_from_unshared_to_hard_shared() -> None:
    """Parameter counts grow with the number of towers' stages, and nothing is counted twice or left without gradient."""
    kinds = [mtl.HardShared(), mtl.SplitAt(at="fc3"), mtl.SplitAt(at="pool2"), mtl.SplitAt(at="pool1"), mtl.Unshared()]
    counts = []
    for sharing in kinds:
        model = make(sharing, 3)
        sum(output.sum() for output in model({"d": images()}).outputs.values()).backward()  # type: ignore[union-attr]
        assert all(p.grad is not None for p in model.parameters()), sharing
        counts.append(model.parameter_count())
    assert counts[0] == counts[1]  # only dropout, which has no parameters, comes after fc3
    assert counts == sorted(counts)
    assert len(set(counts)) == 4


@pytest.mark.parametrize("execution", [OneByOne(), Batched()])
@pytest.mark.parametrize(
    ("backbone", "point"), [("resnet18", "bn1"), ("densenet121", "features.norm5"), ("mobilenet_v2", "features.0.1")]
)
def test_towers_that_begin_in_place_do_not_overwrite_what_others_get(backbone: str, point: str, execution: Execution) -> None:
    model = make(mtl.SplitAt(at=point), backbone=backbone)
    model.execution = execution
    for tower in list(model.towers.values())[1:]:
        tower.load_state_dict(next(iter(model.towers.values())).state_dict())
    x = {"d": torch.rand(2, *SHAPE, dtype=torch.float64)}
    model.eval()
    a, b = model.features(x)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    model.train()
    torch.stack([y.square().mean() for y in model.features(x)]).sum().backward()
    assert all(p.grad is not None for p in model.trunk.parameters())


def test_split_at_a_point_not_listed_and_resnet_parts() -> None:
    model = make(mtl.SplitAt(at="layer2"), 2, "resnet18")
    top = {name.split(".")[1] for name in model.state_dict() if name.startswith("trunk.")}
    towers = {name.split(".")[2] for name in model.state_dict() if name.startswith("towers.")}
    assert top == {"conv1", "bn1", "layer1", "layer2"}
    assert towers == {"layer3", "layer4"}
    assert model({"d": images()}).outputs["t0"].shape == (6, 3)


@pytest.mark.parametrize(
    "sharing", [mtl.Unshared(), mtl.HardShared(), mtl.SplitAt(at="pool1"), mtl.CrossStitch()], ids=lambda s: s.kind
)
def test_two_datasets(sharing: Sharing) -> None:
    """Each task gets outputs for its own dataset's samples, in evaluation the same whether or not others are present."""
    model = make(sharing, 3, datasets=("b", "a"))
    model.eval()
    x = {"a": images(5, 1), "b": images(3, 2)}
    together = model(x).outputs
    assert {name: len(y) for name, y in together.items()} == {"t0": 3, "t1": 5, "t2": 3}
    for name, dataset in (("t0", "b"), ("t1", "a"), ("t2", "b")):
        torch.testing.assert_close(model({dataset: x[dataset]}).outputs[name], together[name])


def test_unshared_towers_do_not_see_other_datasets() -> None:
    """In training mode, where batch statistics would leak: task t0's gradient does not depend on dataset a."""
    gradients = []
    for seed in (1, 2):
        model = make(mtl.Unshared(), 2, datasets=("b", "a"))
        model.train()
        outputs = model({"a": images(5, seed), "b": images(4, 9)}).outputs
        sum(output.square().sum() for output in outputs.values()).backward()  # type: ignore[union-attr]
        gradients.append([p.grad.clone() for name, p in model.named_parameters() if ".t0." in name])  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_points_may_be_any_subset() -> None:
    model = make(mtl.CrossStitch(points=("pool2",)))
    assert [(p.name, p.role) for p in model.points] == [("pool2", "exchange"), ("<end>", "towers")]
    dotted = make(mtl.CrossStitch(points=("layer1.0", "layer2")), 2, "resnet18")
    assert {"units.layer1/0.alpha", "units.layer2.alpha"} <= set(dotted.state_dict())
    assert list(dotted.exchange()) == ["layer1.0", "layer2"]


def test_units_refuse_towers_that_differ_in_shape() -> None:
    stitch = mtl.CrossStitchUnit(2, (3, 4, 4))
    with pytest.raises(AssertionError):
        stitch([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)])


def test_sharing_needs_points_where_the_backbone_declares_none() -> None:
    @mtl.register_backbone("bare_network")
    def bare_network(input_shape: Sequence[int]) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5), torch.nn.ReLU())

    with pytest.raises(mtl.ConfigError, match=r"needs layer points to exchange at, and the backbone declares none"):
        make(mtl.CrossStitch(), 2, "bare_network")
    assert make(mtl.CrossStitch(points=("1",)), 2, "bare_network")({"d": images()}).outputs["t0"].shape == (6, 3)


def test_a_unit_of_ones_own() -> None:
    """A third party's unit goes in by name, with options of its own; the sharing code knows none."""

    class MeanOptions(mtl.Exchange):
        kind: str = "mean_of_towers"
        share: float = 0.5

    class Mean(mtl.ExchangeUnit):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.share = share

        def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
            mean = torch.stack(list(features)).mean(0)
            return [(1 - self.share) * f + self.share * mean for f in features]

    @mtl.register_unit("mean_of_towers", options=MeanOptions)
    def mean_of_towers(tasks: int, shape: Sequence[int], options: MeanOptions) -> Mean:
        return Mean(options.share)

    config = RunConfig(tasks=["tiny_a"], sharing={"kind": "mean_of_towers", "points": ["fc3"], "share": 1.0})
    model = make(config.sharing)
    model.eval()
    features = model.features({"d": images()})
    torch.testing.assert_close(features[0], features[1])


def test_towers_that_differ_in_shape_are_refused_where_they_would_exchange() -> None:
    made = []

    @mtl.register_backbone("grows_each_time")
    def grows_each_time(input_shape: Sequence[int]) -> mtl.Backbone:
        made.append(len(made))
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 5 + len(made)))
        return mtl.Backbone(network, points=("1",))

    with pytest.raises(mtl.ConfigError, match=r"towers differ in shape at '1': t0 \(7,\), t1 \(8,\); they cannot exchange"):
        make(mtl.CrossStitch(granularity="scalar"), 2, "grows_each_time")


def test_a_unit_that_changes_the_shape_is_refused() -> None:
    class Half(mtl.ExchangeUnit):
        def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
            return [f[:, ::2] for f in features]

    @mtl.register_unit("halving")
    def halving(tasks: int, shape: Sequence[int]) -> Half:
        return Half()

    config = RunConfig(tasks=["tiny_a"], sharing={"kind": "halving", "points": ["fc3"]})
    with pytest.raises(mtl.PluginError, match=r"Half turns 2 features of shape \(102,\) into \(51,\), \(51,\)"):
        make(config.sharing)


# --- own networks -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One convolution under two names."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(1, 1, 3, padding=1)
        self.m1, self.m2 = nn.Sequential(shared), nn.Sequential(shared, nn.Flatten())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.m2(self.m1(x))


class Failing(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error, self.linear = error, nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


GLOBAL = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def own(make: Any, sharing: Any = None) -> MultiTaskModel:
    tasks = [mtl.Task("tiny", "a", mtl.Classification(("x", "y")), name=f"t{i}") for i in range(2)]
    mtl.register_backbone("own")(make)
    maker = backbone_maker(BACKBONES.get("own"), (1, 8, 8), None)
    del BACKBONES._claims["own"]
    return MultiTaskModel(tasks, maker, sharing or mtl.Unshared(), {"tiny": Standardize((1, 8, 8), "none")}, (1, 8, 8), 0)


def test_tied_weights_are_saved_and_loaded(tmp_path: Path) -> None:
    model = own(lambda input_shape: Tied(), mtl.CrossStitch(points=("m1",)))
    write_weights(tmp_path / "w.safetensors", weights_of(model), {})
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(tmp_path / "w.safetensors", model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())
    assert model.towers["t0"].m1[0].weight is model.towers["t0"].m2[0].weight


def test_a_weight_used_on_both_sides_of_a_split_is_refused() -> None:
    with pytest.raises(mtl.ConfigError, match=r"'m1.0.weight' is used before and after the split"):
        own(lambda input_shape: Tied(), mtl.SplitAt(at="m1"))


def test_a_factory_that_gives_one_network_twice_is_refused() -> None:
    with pytest.raises(mtl.PluginError, match=r"towers of 't0' and 't1' share parameter '1.weight': .* make a fresh network"):
        own(lambda input_shape: GLOBAL)


@pytest.mark.parametrize(
    "error", [TypeError("two arguments"), AssertionError("wrong size"), KeyError("x"), RuntimeError("shape")]
)
def test_whatever_a_network_raises_is_an_error_for_users(error: Exception) -> None:
    with pytest.raises(mtl.ConfigError, match=rf"the network fails on its way to .*: {type(error).__name__}: "):
        own(lambda input_shape: Failing(error))


def test_lazy_layers_learn_their_sizes() -> None:
    model = own(lambda input_shape: nn.Sequential(nn.Flatten(), nn.LazyLinear(5), nn.LazyBatchNorm1d()))
    assert model.towers["t1"][1].weight.shape == (5, 64)


def test_frozen_batch_norm_without_parameters_keeps_its_statistics() -> None:
    model = own(lambda input_shape: nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten(), nn.Linear(64, 3)))
    model.freeze(["towers.t0"])
    model.train()
    model({"tiny": torch.rand(4, 1, 8, 8)})
    assert int(model.towers["t0"][0].num_batches_tracked) == 0
    assert int(model.towers["t1"][0].num_batches_tracked) == 1


@pytest.mark.parametrize(
    "sharing", [mtl.Unshared(points=("typo",)), mtl.SplitAt(at="pool2", points=("typo",))], ids=lambda s: s.kind
)
def test_points_that_nothing_is_cut_at_must_exist(sharing: Sharing) -> None:
    with pytest.raises(mtl.ConfigError, match="typo"):
        make(sharing)
