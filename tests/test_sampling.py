"""Several datasets in a step, classes in a dataset: what is drawn how often, in every policy, whatever the order of names."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mtl
from mtl import build
from mtl.arm_specs import arms_of
from mtl.auto import resolved
from mtl.batches import Augment, Feed
from mtl.collecting import Facts
from mtl.config import RunConfig
from mtl.data import Samples, Split
from mtl.resizing import brought_to, common_shape
from mtl.sampling import Mixing, class_balanced, earlier
from mtl.survey import survey


def samples(n: int, name: str = "d", shape: tuple[int, ...] = (3,), classes: list[int] | None = None) -> Samples:
    images = torch.arange(n, dtype=torch.float32).view(n, *[1] * len(shape)).expand(n, *shape)
    target = torch.arange(n) if classes is None else torch.tensor(classes)
    return Samples(name, images, {name: target}, {name: None}, {name: n}, {name: 1.0})


def drawn(feed: Feed, epoch: int = 1) -> dict[str, list[list[int]]]:
    """Dataset -> the samples in each of its batches."""
    found: dict[str, list[list[int]]] = {name: [] for name in feed.samples}
    for step in feed.epoch(epoch):
        for batches in step:
            for batch in batches:
                found[batch.dataset].append(batch.images.flatten(1)[:, 0].int().tolist())
    return found


# --- datasets ---------------------------------------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(2, 400), min_size=1, max_size=4),
    batch_size=st.integers(2, 40),
    policy=st.sampled_from(["equal", "proportional", {"policy": "temperature", "temperature": 3}]),
    epoch=st.sampled_from(["longest", "shortest"]),
    accumulate=st.integers(1, 3),
)
@settings(max_examples=120, deadline=None)
def test_every_policy_gives_whole_batches_and_one_pass_of_the_one_that_drives(
    counts: list[int], batch_size: int, policy: Any, epoch: str, accumulate: int
) -> None:
    mixing = Mixing.model_validate({**Mixing.model_validate(policy).model_dump(), "epoch": epoch})
    parts = {f"d{i}": samples(n, f"d{i}") for i, n in enumerate(counts)}
    feed = Feed(parts, batch_size, accumulate, seed=0, mixing=mixing)
    found = drawn(feed)
    assert len({len(batches) for batches in found.values()}) == 1
    assert math.ceil(len(next(iter(found.values()))) / accumulate) == feed.steps_per_epoch
    passes = {name: sum(map(len, batches)) / len(parts[name]) for name, batches in found.items()}
    assert 1.0 in passes.values()
    assert all(len(batch) >= 2 for batches in found.values() for batch in batches)
    for name, batches in found.items():
        times = Counter(i for batch in batches for i in batch)
        assert max(times.values()) - min(times[i] for i in range(len(parts[name]))) <= 1
    if mixing.policy == "equal":
        assert max(passes.values()) <= 1 or epoch == "longest"


def test_shards_of_a_batch() -> None:
    counts = {"a": 10_000, "b": 2_500}
    assert Mixing().batch_sizes(counts, 50) == {"a": 50, "b": 50}
    assert Mixing(policy="proportional").batch_sizes(counts, 50) == {"a": 80, "b": 20}
    assert Mixing(policy="temperature", temperature=2).batch_sizes(counts, 60) == {"a": 80, "b": 40}
    assert Mixing(policy="temperature", temperature=1).batch_sizes(counts, 50) == {"a": 80, "b": 20}
    assert Mixing(policy="proportional").batch_sizes({"a": 10_000, "b": 3}, 8) == {"a": 16, "b": 2}
    assert Mixing.model_validate("proportional") == Mixing(policy="proportional")
    assert Mixing.model_validate({"temperature": 3}) == Mixing(policy="temperature", temperature=3)
    for wrong in ({"policy": "most"}, {"temperature": 0.5}, {"epoch": "all"}):
        with pytest.raises(ValueError, match=r"policy|temperature|epoch"):
            Mixing(**wrong)


def test_a_shorter_epoch_sees_other_parts_in_turn() -> None:
    feed = Feed({"a": samples(100, "a"), "b": samples(10, "b")}, 5, 1, seed=0, mixing=Mixing(epoch="shortest"))
    assert feed.steps_per_epoch == 2
    seen = [{i for batch in drawn(feed, epoch)["a"] for i in batch} for epoch in (1, 2)]
    assert [len(one) for one in seen] == [10, 10]
    assert seen[0] != seen[1]


@pytest.mark.parametrize("policy", ["equal", "proportional", "temperature"])
@pytest.mark.parametrize("kind", ["unshared", "hard_shared", "split", "cross_stitch"])
def test_results_do_not_depend_on_the_order_of_the_datasets(policy: str, kind: str, in_tmp: Path) -> None:
    """Two datasets of other sizes, channels, counts and classes, labels missing in one, in every kind of sharing."""
    for name, count, shape, classes in (("apples", 60, (1, 8, 8), 3), ("zebras", 26, (3, 10, 6), 2)):

        @mtl.register_dataset(name)
        def dataset(
            split: mtl.Split, root: Path, count: int = count, shape: Any = shape, classes: int = classes
        ) -> mtl.ArrayDataset:
            random = np.random.default_rng([count, split == mtl.Split.TEST])
            label = np.arange(count) % classes
            images = (60 * label[:, None, None, None] + random.integers(0, 40, (count, *shape))).astype(np.uint8)
            return mtl.ArrayDataset(images, {"kind": label}, {"kind": np.arange(count) % 3 > 0} if classes == 2 else None)

        mtl.register_task(f"{name}_kind")(
            lambda name=name, classes=classes: mtl.Task(
                name, "kind", mtl.Classification([f"{name}{i}" for i in range(classes)])
            )
        )
    sharing: dict[str, Any] = {"kind": kind, **({"at": "pool1"} if kind == "split" else {})}
    sharing |= {"points": ["pool1"]} if kind == "cross_stitch" else {}
    results = []
    for tasks in (["apples_kind", "zebras_kind"], ["zebras_kind", "apples_kind"]):
        config = RunConfig(
            tasks=tasks,
            sharing=sharing,
            backbone={"name": "small_cnn", "width": 0.1, "dropout": 0},  # whose draws go by tower
            data={"validation": 0.2, "mixing": policy, "standardize": "channel"},
            epochs=2,
            batch_size=8,
            device="cpu",
            precision="fp32",
        )
        results.append(mtl.train(config, in_tmp / tasks[0]))
    for task in ("apples_kind", "zebras_kind"):
        assert results[0].test[task] == pytest.approx(results[1].test[task], abs=1e-5)
    resolved = mtl.load_config(in_tmp / "apples_kind" / "config.yaml")
    assert resolved.data.input_shape == (3, 10, 8)
    assert mtl.evaluate_run(in_tmp / "apples_kind", "test")["apples_kind"] == results[0].test["apples_kind"]
    said = mtl.predict(in_tmp / "apples_kind", np.zeros((1, 3, 10, 8), np.uint8))
    assert set(said.predictions[0]["tasks"]) == {"apples_kind", "zebras_kind"}


def test_a_single_task_run_sees_what_the_joint_one_does() -> None:
    """Of several datasets: the same shape, as many samples a step and as many steps, so that arms differ in sharing alone."""
    for name, count, shape in (("large", 90, (3, 8, 8)), ("little", 34, (1, 6, 6))):

        @mtl.register_dataset(name)
        def dataset(split: mtl.Split, root: Path, count: int = count, shape: Any = shape) -> mtl.ArrayDataset:
            return mtl.ArrayDataset(np.zeros((count, *shape), np.uint8), {"kind": np.arange(count) % 2})

        mtl.register_task(f"{name}_kind")(lambda name=name: mtl.Task(name, "kind", mtl.Classification(("a", "b"))))
    base = RunConfig(
        tasks=["large_kind", "little_kind"],
        backbone={"name": "small_cnn", "width": 0.1},
        data={"validation": 0.1, "mixing": "proportional"},
        batch_size=8,
        device="cpu",
    )
    facts = Facts(resolved(base))
    (arm,) = arms_of(["single_task"], facts.base, facts.setting.points)
    alone = {piece.tasks[0]: piece.config for piece in arm.pieces(facts.setting, 1.0, 0)}
    about = facts.survey(1.0)
    assert about.batch_sizes == {"large": 12, "little": 4}
    for task, dataset in (("large_kind", "large"), ("little_kind", "little")):
        assert alone[task].data.input_shape == (3, 8, 8)
        assert alone[task].batch_size == about.batch_sizes[dataset]
        found = survey(alone[task])
        assert (found.shape, found.epoch_steps) == ((3, 8, 8), about.epoch_steps)


# --- sizes ------------------------------------------------------------------------------------------------------------------


def test_images_are_brought_to_the_largest_shape_and_nothing_else_is() -> None:
    small = torch.arange(2 * 1 * 4 * 4, dtype=torch.uint8).view(2, 1, 4, 4) * 7
    a = Samples("a", small, {}, {}, {}, {})
    b = Samples("b", torch.zeros(2, 3, 8, 6, dtype=torch.uint8), {}, {}, {}, {})
    shape = common_shape({"a": a, "b": b})
    assert shape == (3, 8, 6)
    large = brought_to(a, shape).images
    assert (tuple(large.shape), large.dtype) == ((2, 3, 8, 6), torch.uint8)
    assert torch.equal(large[:, 0], large[:, 2])
    assert abs(float(large.float().mean()) - float(small.float().mean())) < 3
    assert brought_to(b, shape) is b
    assert common_shape({"a": a}) == (1, 4, 4)
    assert common_shape({"a": a}, (3, 5, 5)) == (3, 5, 5)
    with pytest.raises(mtl.DataError, match=r"only images can be resized; found a \(1, 4, 4\), v \(3,\)"):
        common_shape({"a": a, "v": samples(4, "v")})
    with pytest.raises(mtl.DataError, match=r"cannot be brought to 1 channels; found b \(3, 8, 6\)"):
        common_shape({"b": b}, (1, 8, 8))


# --- classes ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-1, 4), min_size=2, max_size=200), st.integers(0, 5))
@settings(deadline=None)
def test_every_class_comes_equally_often_and_the_unlabelled_keep_their_share(classes: list[int], seed: int) -> None:
    order = class_balanced(torch.tensor(classes), seed, "x").tolist()
    assert len(order) == len(classes)
    times = Counter(order)
    per_class = Counter(classes[i] for i in order)
    assert all(times[i] == 1 for i, one in enumerate(classes) if one < 0)
    labelled = {one: n for one, n in per_class.items() if one >= 0}
    if labelled:
        assert max(labelled.values()) - min([labelled.get(one, 0) for one in set(classes) - {-1}]) <= 1
    for one in set(classes) - {-1}:
        of = [times[i] for i, other in enumerate(classes) if other == one]
        assert max(of) - min(of) <= 1
    assert order == class_balanced(torch.tensor(classes), seed, "x").tolist()


@given(st.lists(st.integers(0, 5), max_size=50))
def test_earlier_counts(order: list[int]) -> None:
    assert earlier(torch.tensor(order, dtype=torch.int64)).tolist() == [order[:i].count(one) for i, one in enumerate(order)]


def test_a_repeated_sample_is_augmented_another_way() -> None:
    classes = [0] * 30 + [1] * 2
    part = Samples("d", torch.rand(32, 1, 9, 9), {"d": torch.tensor(classes)}, {"d": None}, {"d": 32}, {"d": 1.0})
    feed = Feed({"d": part}, 8, 1, seed=0, augment=Augment(crop=3), balanced=["d"])
    rare = [
        image for step in feed.epoch(1) for image, one in zip(step[0][0].images, step[0][0].targets["d"], strict=True) if one
    ]
    assert len(rare) == 16
    assert len({image.numpy().tobytes() for image in rare}) > 10


def test_balanced_training_draws_rare_classes_as_often(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    @mtl.register_dataset("skewed")
    def skewed(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        label = (np.arange(100) % 10 == 0).astype(int)
        return mtl.ArrayDataset(
            np.random.default_rng(0).integers(0, 255, (100, 8, 8)).astype(np.uint8), {"rare": label, "x": label / 2}
        )

    mtl.register_task("rare")(lambda: mtl.Task("skewed", "rare", mtl.Classification(("no", "yes"))))
    mtl.register_task("number")(lambda: mtl.Task("skewed", "x", mtl.Regression()))
    given = {**tiny_config, "tasks": ["rare", "number"], "data": {"validation": 0.2, "class_balanced": ["rare"]}}
    run = build.run(RunConfig(**given), in_tmp / "run")
    counts = Counter(int(i) for step in run.feed.epoch(1) for i in step[0][0].targets["rare"])
    assert counts[0] == counts[1] == len(run.samples[Split.TRAIN]["skewed"]) // 2
    run.close()
    for wrong, message in (
        (["number"], "the labels of 'number' are no classes"),
        (["none"], "data.class_balanced: unknown task 'none'"),
    ):
        given["data"] = {"validation": 0.2, "class_balanced": wrong}
        with pytest.raises(mtl.ConfigError, match=message):
            build.run(RunConfig(**given), in_tmp / "other")
