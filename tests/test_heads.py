"""Heads: what they promise, each for every kind; then the equations and units of each."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_samples, make_tiny
from torch import Tensor, nn
from torch.nn import functional as F

import mtl
from mtl.data import fit_heads
from mtl.metrics import Meter, score_of
from mtl.task import make_task

N = 40
GENERATOR = torch.Generator().manual_seed(0)
ONE_OF_3 = torch.arange(N) % 3
SEVERAL = torch.rand(N, 4, generator=GENERATOR) < 0.4
NUMBER = 1990 + 12 * torch.randn(N, generator=GENERATOR)
POINT = torch.stack([NUMBER, 1e-3 * NUMBER.sin()], dim=1)

CASES: dict[str, tuple[mtl.Head, Tensor]] = {
    "classification": (mtl.Classification(("a", "b", "c")), ONE_OF_3),
    "balanced, smoothed, focal": (
        mtl.Classification(("a", "b", "c"), "balanced", 0.1, 2.0),
        ONE_OF_3.clamp_max(1) + (ONE_OF_3 == 2) * (torch.arange(N) < 9),
    ),
    "multi-label": (mtl.MultiLabel(("w", "x", "y", "z")), SEVERAL),
    "regression": (mtl.Regression(unit="years"), NUMBER),
    "regression of two, huber": (mtl.Regression(outputs=("x", "y"), error="huber"), POINT),
    "ordinal": (mtl.Ordinal(("low", "middle", "high")), ONE_OF_3),
}
every_head = pytest.mark.parametrize("name", CASES)


def everywhere(labels: Tensor) -> Tensor:
    return torch.ones(len(labels), dtype=torch.bool)


def ready(name: str) -> tuple[mtl.Head, Tensor]:
    """A fitted head and its targets."""
    head, labels = CASES[name]
    target = head.targets(labels, everywhere(labels))
    return head.fitted(target, everywhere(labels)), target


def learned(head: mtl.Head, target: Tensor, steps: int = 400) -> tuple[nn.Module, Tensor]:
    """A built head trained on features that tell each sample apart, and its outputs."""
    torch.manual_seed(0)
    x = torch.eye(len(target))
    module = head.build((len(target),))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        head.loss(module(x), target).mean().backward()
        optimizer.step()
    return module, module(x).detach()


def figures(head: mtl.Head, output: Tensor, target: Tensor, valid: Tensor | None = None) -> dict[str, float | None]:
    meter = Meter(head.metrics(), head.labelled, torch.device("cpu"))
    meter.update(head.predictions(output), target, valid)
    return meter.compute()


@every_head
@pytest.mark.parametrize("features", [(6,), (6, 2, 3)], ids=["vector", "map"])
def test_a_head_learns_from_vectors_and_maps_and_its_loss_is_unreduced(name: str, features: tuple[int, ...]) -> None:
    head, target = ready(name)
    x = torch.randn(N, *features)
    module = head.build(features)
    loss = head.loss(module(x), target)
    assert loss.shape in (target.shape, target.shape[:1])
    assert bool((loss >= 0).all())
    loss.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
    lone = torch.stack([head.loss(module(x[i : i + 1]), target[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(lone, loss[:3])  # a sample's loss is its own


@every_head
def test_a_head_that_fits_scores_one_and_one_that_does_not_scores_less(name: str) -> None:
    head, target = ready(name)
    _, output = learned(head, target)
    score = score_of(name, head.metrics()).name
    found = figures(head, output, target)
    assert found[score] == pytest.approx(1.0, abs=2e-3)
    assert all(value is not None and math.isfinite(value) for value in found.values())
    mixed = figures(head, output[torch.randperm(N, generator=torch.Generator().manual_seed(1))], target)
    assert mixed[score] < 0.8
    for metric in head.metrics():
        better = (
            mixed[metric.name] < found[metric.name] if metric.better == "higher" else mixed[metric.name] > found[metric.name]
        )
        assert better, metric.name


@every_head
def test_decoded_outputs_are_plain_and_one_per_sample(name: str) -> None:
    head, _ = ready(name)
    rows = head.decode(head.build((5,))(torch.randn(7, 5)).detach())
    assert len(rows) == 7
    assert all(isinstance(row, dict) for row in json.loads(json.dumps(rows)))


@every_head
def test_a_description_restores_a_fitted_head(name: str) -> None:
    head, target = ready(name)
    again = CASES[name][0].restored(json.loads(json.dumps(head.describe())))
    assert again == head
    output = head.build((5,))(torch.randn(N, 5))
    assert torch.equal(again.loss(output, target), head.loss(output, target))


@every_head
def test_heads_and_their_metrics_pickle(name: str) -> None:
    head, _ = ready(name)
    assert pickle.loads(pickle.dumps(head)) == head
    assert [m.name for m in pickle.loads(pickle.dumps(head.metrics()))] == [m.name for m in head.metrics()]


@every_head
def test_what_is_not_labelled_does_not_matter(name: str) -> None:
    """Metrics of half the labels are those of that half; labels that are masked out may be anything."""
    head, target = ready(name)
    valid = torch.arange(N) % 2 == 0
    output = learned(head, target, steps=12)[1]
    assert figures(head, output, target, valid) == figures(head, output[valid], target[valid])
    labels = CASES[name][1].clone()
    labels[~valid] = 117 if not labels.is_floating_point() else float("nan")
    if labels.dtype == torch.bool:
        labels = labels.long().masked_fill(~valid[:, None], 9)
    spoilt = head.targets(labels, valid)
    assert torch.equal(spoilt[valid], target[valid])
    assert bool(head.loss(output, spoilt).isfinite().all())


# --- classification ---------------------------------------------------------------------------------------------------------


def test_balanced_weights_are_torchs_over_the_training_set() -> None:
    """The mean over training samples is torch's weighted mean; each class has the same total weight."""
    target = torch.tensor([0] * 30 + [1] * 9 + [2])
    head = mtl.Classification(("a", "b", "c"), class_weights="balanced").fitted(target, everywhere(target))
    assert not isinstance(head.class_weights, str)
    weights = torch.tensor(head.class_weights)
    torch.testing.assert_close(weights * torch.bincount(target), torch.full((3,), 40 / 3))
    logits = torch.randn(40, 3)
    torch.testing.assert_close(head.loss(logits, target).mean(), F.cross_entropy(logits, target, weights))
    given = mtl.Classification(("a", "b", "c"), class_weights=(1, 5, 5)).fitted(target, everywhere(target))
    torch.testing.assert_close(
        given.loss(logits, target).mean(), F.cross_entropy(logits, target, torch.tensor([1.0, 5.0, 5.0]))
    )


def test_focal_loss_is_the_papers() -> None:
    logits, target = torch.randn(20, 3, dtype=torch.float32), torch.arange(20) % 3
    p = logits.softmax(1)[torch.arange(20), target]
    expected = -((1 - p) ** 2) * p.log()
    torch.testing.assert_close(mtl.Classification(("a", "b", "c"), focal_gamma=2.0).loss(logits, target), expected)
    sure = torch.tensor([[80.0, 0.0]], requires_grad=True)
    mtl.Classification(("a", "b"), focal_gamma=0.5).loss(sure, torch.tensor([0])).sum().backward()
    assert sure.grad is not None
    assert bool(sure.grad.isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, r"a positive number for each of the 3 classes"),
        ({"class_weights": (1.0, 2.0, 0.0)}, r"a positive number for each of the 3 classes"),
        ({"class_weights": "even"}, r"it is 'balanced', a number per class, or None"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\)"),
        ({"focal_gamma": -1.0}, r"focal_gamma 0 or more"),
    ],
)
def test_bad_options_of_classification(options: dict[str, Any], message: str) -> None:
    with pytest.raises(mtl.MTLError, match=message):
        mtl.Classification(("a", "b", "c"), **options)


def test_options_of_the_classification_head_reach_it_from_a_config(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    @mtl.register_task("tiny_weighted", options=mtl.ClassificationOptions)
    def weighted(options: mtl.ClassificationOptions) -> mtl.Task:
        return mtl.Task("tiny", "a", mtl.Classification(("dark", "grey", "light"), **dict(options)))

    tiny_config["tasks"] = [{"name": "tiny_weighted", "class_weights": "balanced", "label_smoothing": 0.2}, "tiny_b"]
    result = mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")
    assert result.val is not None
    assert result.val["tiny_weighted"]["loss"] > 0.2  # smoothing leaves no loss of zero
    tiny_config["tasks"] = [{"name": "tiny_weighted", "label_smoothin": 0.2}]
    with pytest.raises(mtl.ConfigError, match=r"tasks.0.label_smoothin: unknown key .* \(did you mean 'label_smoothing'\?\)"):
        mtl.RunConfig(**tiny_config)


# --- multi-label ------------------------------------------------------------------------------------------------------------


def test_single_labels_may_be_missing() -> None:
    """A mask per label: the loss of the others alone counts, and each class is scored on its own labels."""
    from torchmetrics.functional.classification import binary_average_precision

    head, target = ready("multi-label")
    valid = torch.rand(N, 4, generator=torch.Generator().manual_seed(3)) < 0.7
    output = learned(head, target, steps=3)[1]
    per_class = [
        binary_average_precision(output[valid[:, k], k].sigmoid(), target[valid[:, k], k].long()).item() for k in range(4)
    ]
    assert figures(head, output, target, valid)["average_precision"] == pytest.approx(sum(per_class) / 4, abs=1e-6)
    hits = ((output > 0) == target.bool())[valid].float().mean().item()
    assert figures(head, output, target, valid)["accuracy"] == pytest.approx(hits, abs=1e-6)


def test_decoded_labels_are_those_above_the_threshold() -> None:
    head = mtl.MultiLabel(("x", "y"), threshold=0.9)
    assert head.decode(torch.tensor([[3.0, 2.0], [-1.0, -9.0]]))[0]["labels"] == ["x"]
    assert head.decode(torch.tensor([[3.0, 2.0], [-1.0, -9.0]]))[1]["labels"] == []


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        (mtl.MultiLabel(("x", "y")), torch.zeros(6), r"a column for each of the 2 classes, shape \(N, 2\); found \(6,\)"),
        (
            mtl.MultiLabel(("x", "y")),
            torch.tensor([[0, 1]] * 5 + [[1, 2]]),
            r"label 2 of sample 5, position 1 is neither 0 nor 1",
        ),
        (mtl.MultiLabel(("x", "y")), torch.tensor([[0, 1]] * 6), r"always present or always absent .*: x, y"),
        (mtl.Regression(), torch.zeros(6, 2), r"must have shape \(6,\); found \(6, 2\); name several numbers"),
        (mtl.Regression(outputs=("x", "y")), torch.zeros(6), r"must have shape \(6, 2\); found \(6,\)"),
        (mtl.Regression(), torch.tensor([1.0, 2, 3, 4, 5, torch.inf]), r"label inf of sample 5 is not finite"),
        (mtl.Regression(), torch.full((6,), 7.0), r"do not vary, or too little .* \(standard deviation 0.0 around 7.0\)"),
        (mtl.Ordinal(("a", "b")), torch.tensor([0, 1, 2, 0, 1, 0]), r"label 2 of sample 2 is out of range; .* 0 to 1"),
        (mtl.Ordinal(("a", "b", "c")), torch.tensor([0, 1, 1, 0, 1, 0]), r"1 of 3 classes never seen .*: c"),
    ],
)
def test_labels_that_a_head_cannot_use(head: mtl.Head, labels: Tensor, message: str) -> None:
    with pytest.raises(mtl.DataError, match=message):
        head.fitted(head.targets(labels, everywhere(labels)), everywhere(labels))


# --- regression -------------------------------------------------------------------------------------------------------------


def test_units_do_not_change_what_is_learned() -> None:
    """Targets in other units: the same loss, the same R^2, errors in the new unit."""
    features = torch.randn(N, 5, generator=torch.Generator().manual_seed(5))
    found = []
    for scale, offset in ((1.0, 0.0), (365.25, -700000.0)):
        labels = NUMBER.double() * scale + offset
        head = mtl.Regression(unit="x")
        target = head.targets(labels.float(), everywhere(labels))
        head = head.fitted(target, everywhere(labels))
        torch.manual_seed(0)
        output = head.build((5,))(features).detach()
        found.append((head.loss(output, target).mean().item(), figures(head, output, target)))
    (loss, first), (other_loss, second) = found
    assert other_loss == pytest.approx(loss, rel=1e-3)
    assert second["r2"] == pytest.approx(first["r2"], abs=1e-3)
    assert second["mae_x"] == pytest.approx(365.25 * first["mae_x"], rel=1e-3)
    assert second["rmse_x"] == pytest.approx(365.25 * first["rmse_x"], rel=1e-3)


def test_bf16_does_not_round_a_prediction_to_its_eight_bits() -> None:
    head, _ = ready("regression")
    module = head.build((5,))
    x = torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, module(x))
    assert head.metrics()[1].name == "mae_years"


def test_a_given_mean_and_deviation_are_kept() -> None:
    head = mtl.Regression(mean=5.0, std=2.0)
    assert head.fitted(NUMBER, everywhere(NUMBER)) == head
    with pytest.raises(mtl.MTLError, match="both mean and std, or neither"):
        mtl.Regression(mean=5.0)
    with pytest.raises(mtl.MTLError, match="must be finite, and std positive"):
        mtl.Regression(mean=5.0, std=0.0)


# --- ordinal ----------------------------------------------------------------------------------------------------------------


def test_a_confusion_of_neighbours_costs_less_than_one_of_extremes() -> None:
    head = mtl.Ordinal([str(i) for i in range(5)])
    sure = torch.tensor([[9.0, 9.0, -9.0, -9.0]])  # class 2
    assert head.predictions(sure).tolist() == [2]
    loss = [head.loss(sure, torch.tensor([k])).item() for k in range(5)]
    assert loss[2] < loss[1] < loss[0]
    assert loss[2] < loss[3] < loss[4]
    assert loss[1] == pytest.approx(loss[3])


def test_probabilities_of_ordered_classes_add_up() -> None:
    head = mtl.Ordinal(("a", "b", "c"))
    module = head.build((4,))
    (row,) = head.decode(module(torch.zeros(1, 4)).detach() - module.score(torch.zeros(1, 4)).detach())
    assert row["score"] == pytest.approx(1 / 3)  # thresholds start at equally probable classes
    assert row["expected"] == pytest.approx(1.0)


# --- all of them in a run; maps ---------------------------------------------------------------------------------------------


@mtl.register_dataset("four_kinds")
def four_kinds(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    tiny = make_tiny(96 if split == mtl.Split.TRAIN else 48, split)
    a, b = tiny.labels["a"], tiny.labels["b"]
    some = torch.rand(len(a), generator=torch.Generator().manual_seed(9)) < 0.6
    return mtl.ArrayDataset(
        tiny.images,
        {"a": a, "both": torch.stack([b, a == 2], 1), "order": a, "size": 100.0 + 10 * a},
        valid={"size": some, "both": torch.stack([some, ~some], 1)},
    )


for target, head in {
    "a": mtl.Classification(("x", "y", "z")),
    "both": mtl.MultiLabel(("b", "light")),
    "order": mtl.Ordinal(("x", "y", "z")),
    "size": mtl.Regression(unit="mm"),
}.items():
    mtl.register_task(f"four_{target}")(lambda target=target, head=head: mtl.Task("four_kinds", target, head))


def test_four_kinds_of_heads_train_together_and_are_scored_again_from_disk(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    tiny_config |= {
        "tasks": ["four_a", "four_both", "four_order", "four_size"],
        "sharing": "cross_stitch",
        "backbone": {"name": "small_cnn", "width": 0.25},
        "data": {"validation": 24},
        "epochs": 12,
    }
    result = mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")
    assert result.test is not None
    assert result.test["score"] > 0.8
    assert result.test["four_size"]["mae_mm"] < 5
    assert result.test["four_size"]["n"] < 48 < result.test["four_both"]["n"] + 1
    assert mtl.evaluate_run(in_tmp / "run") == result.test


@dataclass(frozen=True)
class Brightness(mtl.Head):
    """Dense: whether each pixel is bright. Consumes maps."""

    consumes = "map"

    def build(self, features: tuple[int, ...]) -> nn.Module:
        return nn.Conv2d(features[0], 1, 1)

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, labels, 0).float()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output[:, 0], target, reduction="none")

    def metrics(self) -> tuple[mtl.Metric, ...]:
        return (mtl.Metric("accuracy", "higher", mtl.torchmetric("BinaryAccuracy"), score=True),)

    def predictions(self, output: Tensor) -> Tensor:
        return output[:, 0].sigmoid()

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        return [{"bright": share} for share in (output[:, 0] > 0).float().mean((1, 2)).tolist()]


@mtl.register_dataset("pixels")
def pixels(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
    tiny = make_tiny(48 if split == mtl.Split.TRAIN else 24, split)
    bright = (tiny.images[:, 0] > 110).long()
    return mtl.ArrayDataset(
        tiny.images, {"bright": bright, "a": tiny.labels["a"]}, valid={"bright": torch.arange(8).expand(len(bright), 8, 8) > 1}
    )


@mtl.register_task("pixels_bright")
def pixels_bright() -> mtl.Task:
    return mtl.Task("pixels", "bright", Brightness())


@mtl.register_task("pixels_a")
def pixels_a() -> mtl.Task:
    return mtl.Task("pixels", "a", mtl.Classification(("x", "y", "z")))


@mtl.register_backbone("keeps_size")
def keeps_size(input_shape: tuple[int, ...]) -> mtl.Backbone:
    block = nn.Sequential(nn.Conv2d(input_shape[0], 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return mtl.Backbone(nn.Sequential(block, nn.Conv2d(8, 8, 3, padding=1)), points=("0",))


def test_a_head_of_maps_beside_one_of_vectors_with_a_mask_per_pixel(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    tiny_config |= {"tasks": ["pixels_bright", "pixels_a"], "backbone": "keeps_size", "sharing": "cross_stitch", "epochs": 10}
    tiny_config["optim"] = {"lr": 0.01}
    result = mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")
    assert result.test is not None
    assert result.test["pixels_bright"]["n"] == 24 * 8 * 6
    assert result.test["pixels_bright"]["accuracy"] > 0.9
    tiny_config["backbone"] = {"name": "small_cnn", "width": 0.1}
    with pytest.raises(mtl.ConfigError, match=r"Brightness needs a feature map \(C, H, W\), and the backbone gives vectors"):
        mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "refused")
    assert not (in_tmp / "refused").exists()


def test_a_score_that_one_label_cannot_give_is_explained(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    @mtl.register_dataset("lonely")
    def lonely(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        tiny = make_tiny(30, split)
        valid = torch.ones(30, dtype=torch.bool) if split == mtl.Split.TRAIN else torch.arange(30) == 3
        return mtl.ArrayDataset(tiny.images, {"a": tiny.labels["a"].float()}, valid={"a": valid})

    @mtl.register_task("lonely_number")
    def number() -> mtl.Task:
        return mtl.Task("lonely", "a", mtl.Regression())

    tiny_config |= {"tasks": ["lonely_number"], "epochs": 1}
    with pytest.raises(mtl.DataError, match=r"'lonely_number': a metric cannot be computed from 1 labels: .*two samples"):
        mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "run")


def test_mean_and_deviation_are_those_of_the_labelled_training_targets_and_saved_with_the_weights() -> None:
    tasks = [make_task("four_size"), make_task("four_a")]
    samples = load_samples("four_kinds", tasks, validation=0.25)
    train = samples[mtl.Split.TRAIN]
    task, _ = fit_heads(tasks, {"four_kinds": train})
    mask = train.valid["four_size"]
    assert mask is not None
    assert 0.3 < mask.float().mean() < 0.9
    module = task.head.build((3,))
    assert set(module.state_dict()) == {"mean", "std", "linear.0.weight", "linear.0.bias"}
    assert module.mean.item() == pytest.approx(train.targets["four_size"][mask].mean().item())


# --- what reviews found -----------------------------------------------------------------------------------------------------


def test_classes_without_a_label_or_a_positive_are_left_out_of_the_average() -> None:
    head = mtl.MultiLabel(("seen", "no positive", "no label"))
    target = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.int8)
    valid = torch.tensor([[True, True, False]] * 4)
    output = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 2.0, 0.0], [2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    assert figures(head, output, target, valid)["average_precision"] == 1.0
    assert figures(head, output, torch.zeros_like(target), valid)["average_precision"] is None


def test_a_kappa_that_is_undefined_counts_as_nothing() -> None:
    head = mtl.Ordinal(("a", "b", "c"))
    assert figures(head, torch.tensor([[-1.0, -2.0]] * 3), torch.zeros(3, dtype=torch.long))["kappa_quadratic"] == 0.0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64, torch.float32])
def test_labels_of_small_integer_types_are_compared_as_numbers(dtype: torch.dtype) -> None:
    head = mtl.Classification([str(i) for i in range(256)])
    labels = torch.arange(100).to(dtype)
    assert torch.equal(head.targets(labels, everywhere(labels)), torch.arange(100))


def test_ordered_classes_do_not_move_under_bf16() -> None:
    head = mtl.Ordinal([str(i) for i in range(80)])
    torch.manual_seed(0)
    module, x = head.build((16,)), torch.randn(500, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = head.predictions(module(x))
    assert torch.equal(half, head.predictions(module(x)))


def test_small_figures_keep_their_digits() -> None:
    head = mtl.Regression(mean=0.0, std=1e-9)
    target = torch.tensor([1e-9, -1e-9, 3e-9])
    assert figures(head, target + 1e-10, target)["mae"] == pytest.approx(1e-10, rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mtl.Classification(("a", "b"), class_weights=(1.0, math.nan)),
        lambda: mtl.Classification(("a", "b"), class_weights=3),
        lambda: mtl.Classification(("a", "b"), class_weights=("x", "y")),
        lambda: mtl.Classification(("a", "b"), focal_gamma=math.inf),
        lambda: mtl.Regression(mean=math.nan, std=1.0),
    ],
)
def test_arguments_that_are_no_numbers_are_refused(make: Any) -> None:
    with pytest.raises(mtl.MTLError):
        make()


def test_a_description_from_before_an_option_existed_is_read() -> None:
    assert mtl.Classification.restored_from({"head": "Classification", "classes": ["a", "b"]}) == mtl.Classification(("a", "b"))
