"""Data: what is refused before the first step, how splits are carved, in what order samples come."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import load_samples
from hypothesis import given, settings
from hypothesis import strategies as st

import mtl
from mtl.batches import Augment, Feed, batch_bounds, in_order
from mtl.data import Samples, fit_heads
from mtl.registry import DATASETS
from mtl.registry import TASKS as TASK_PLUGINS
from mtl.seeding import hash_uniform, seeded
from mtl.standardize import Standardize
from mtl.task import make_task

TASKS = [make_task("tiny_a"), make_task("tiny_b")]
IMAGES = np.zeros((6, 8, 8), np.uint8)
GOOD = {"a": np.arange(6) % 3, "b": np.arange(6) % 2}


def register(name: str, **parts: Any) -> str:
    """A dataset whose every split is ArrayDataset(**parts), groups apart; returns its name."""

    @mtl.register_dataset(name)
    def dataset(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        groups = {"groups": -1 - parts["groups"]} if "groups" in parts and split == mtl.Split.TEST else {}
        return mtl.ArrayDataset(**{"images": IMAGES, "labels": GOOD, **parts, **groups})

    DATASETS._claims[name] = DATASETS._claims[name][-1:]
    return name


def load(name: str, validation: int | float = 0, seed: int = 0, options: Any = None) -> dict[mtl.Split, Samples]:
    return load_samples(name, TASKS, options, validation=validation, seed=seed)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"labels": {**GOOD, "a": np.array([0, 1, 2, 3, 0, 1])}},
            r"train split, task 'tiny_a': label 3 of sample 3 is out of range",
        ),
        (
            {"labels": {**GOOD, "a": np.array([0, 1, -1, 2, 0, 1])}},
            r"label -1 of sample 2 is out of range; the 3 classes are 0 to 2",
        ),
        ({"labels": {**GOOD, "b": np.array([0, 1, 0.5, 0, 0, 1])}}, r"task 'tiny_b': label 0.5 of sample 2 is not an integer"),
        ({"labels": {**GOOD, "b": np.array([0, 1, math.nan, 0, 0, 1])}}, r"label nan of sample 2 is not finite"),
        ({"labels": {**GOOD, "b": np.array([0, 1, math.inf, 0, 0, 1])}}, r"label inf of sample 2 is not finite"),
        ({"labels": {**GOOD, "a": np.array([2**31, 1, 2, 0, 0, 1])}}, r"label 2147483648 of sample 0 is out of range"),
        ({"labels": {**GOOD, "a": np.zeros((6, 2), int)}}, r"one integer per sample, shape \(N,\); found \(6, 2\)"),
        ({"labels": {"a": GOOD["a"]}}, r"task 'tiny_b' wants unknown target 'b'; known: a"),
        ({"labels": {**GOOD, "a": np.array([0, 1, 0, 1, 0, 1])}}, r"1 of 3 classes never seen in the training split: light"),
        ({"labels": {**GOOD, "b": np.arange(5) % 2}}, r"labels\['b'\] must have one entry per image, 6; found shape \(5,\)"),
        ({"images": IMAGES[:0], "labels": {k: v[:0] for k, v in GOOD.items()}}, r"train split: 0 images"),
        ({"images": [IMAGES[0]] * 5 + [np.zeros((8, 9), np.uint8)]}, r"image 0 is \(8, 8\), image 5 is \(8, 9\)"),
        ({"images": np.zeros((6, 32, 32, 3), np.uint8)}, r"look like \(N, H, W, C\)"),
        ({"images": np.zeros((6, 8, 8), np.int32)}, r"must be uint8 or floating point; found int32; .*\.astype\('uint8'\)"),
        ({"images": np.full((6, 8, 8), 300, np.uint16)}, r"found uint16; .*astype\('float32'\) and divide by their largest"),
        ({"images": np.full((6, 8), np.nan, np.float32)}, r"image 0 holds a value that is not finite"),
        ({"images": np.zeros(6, np.uint8)}, r"found shape \(6,\)"),
        ({"valid": {"b": np.zeros(6, bool)}}, r"task 'tiny_b': no sample is labelled"),
        ({"valid": {"c": np.zeros(6, bool)}}, r"unknown target 'c'"),
        ({"valid": {"b": np.zeros(6, int)}}, r"valid\['b'\] must be bool"),
    ],
)
def test_bad_data_is_named(parts: dict[str, Any], message: str) -> None:
    def whole() -> None:
        name = register("bad_data", **parts)
        fit_heads([replace(task, dataset=name) for task in TASKS], {name: load(name)[mtl.Split.TRAIN]})

    with pytest.raises(mtl.DataError, match=message):
        whole()


def test_labels_that_are_masked_out_may_be_anything() -> None:
    labels = {**GOOD, "b": np.array([0.0, 1.0, math.nan, 99.0, 0.0, 1.0])}
    valid = {"b": np.array([True, True, False, False, True, True])}
    part = load(register("masked_data", labels=labels, valid=valid))[mtl.Split.TRAIN]
    assert part.targets["tiny_b"].tolist() == [0, 1, 0, 0, 0, 1]
    assert part.valid["tiny_b"].tolist() == valid["b"].tolist()
    assert part.valid["tiny_a"] is None
    assert part.labelled_share["tiny_b"] == pytest.approx(4 / 6)


def test_plugin_failures_are_reported_with_the_plugin() -> None:
    @mtl.register_dataset("raises_inside")
    def raises_inside(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        raise KeyError("missing column")

    @mtl.register_dataset("gives_a_list")
    def gives_a_list(split: mtl.Split, root: Path) -> Any:
        return [1, 2]

    with pytest.raises(
        mtl.PluginError,
        match=r"train split: dataset 'raises_inside' \(.*test_data.py\) failed \(test_data.py, line \d+\): KeyError",
    ):
        load("raises_inside")
    with pytest.raises(
        mtl.PluginError, match=r"must give an mtl.ArrayDataset, mtl.ImageFiles or mtl.TorchDataset for .* split; found list"
    ):
        load("gives_a_list")


def test_splits_must_agree_in_shape() -> None:
    @mtl.register_dataset("changes_shape")
    def changes_shape(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(IMAGES if split == "train" else IMAGES[:, :4], GOOD)

    with pytest.raises(mtl.DataError, match=r"splits differ in shape or type: train \(1, 8, 8\) torch.uint8, test \(1, 4, 8\)"):
        load("changes_shape")


def test_validation_is_carved_once_and_for_all() -> None:
    first, again, other = load("tiny", 12), load("tiny", 0.25), load("tiny", 12, seed=1)
    assert {split: len(part) for split, part in first.items()} == {"train": 36, "val": 12, "test": 24}
    assert torch.equal(first[mtl.Split.VAL].images, again[mtl.Split.VAL].images)
    assert not torch.equal(first[mtl.Split.VAL].images, other[mtl.Split.VAL].images)
    both = torch.cat([first[s].images for s in (mtl.Split.TRAIN, mtl.Split.VAL)]).flatten(1)
    whole = load("tiny")[mtl.Split.TRAIN].images.flatten(1)
    assert sorted(both.tolist()) == sorted(whole.tolist())


@pytest.mark.parametrize("validation", [48, 47, 5000])
def test_a_validation_split_that_leaves_nothing(validation: int) -> None:
    with pytest.raises(mtl.DataError, match=rf"data.validation={validation} holds out {validation} of 48 training images"):
        load("tiny", validation)


def test_own_validation_split_and_no_test_split() -> None:
    @mtl.register_dataset("three_parts", splits=("train", "val"))
    def three_parts(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(IMAGES + (100 if split == "val" else 0), GOOD)

    parts = load("three_parts", validation=1)
    assert list(parts) == ["train", "val"]
    assert parts[mtl.Split.VAL].images.min() == 100
    assert len(parts[mtl.Split.TRAIN]) == 6


def samples(n: int, shape: tuple[int, ...] = (1, 2, 2), name: str = "d") -> Samples:
    images = torch.arange(n, dtype=torch.float32).view(-1, *[1] * len(shape)).expand(n, *shape).contiguous()
    return Samples(name, images, {"t": torch.arange(n)}, {"t": None}, {"t": n}, {"t": 1.0})


@given(count=st.integers(1, 200), batch_size=st.integers(2, 50))
def test_bounds_cover_everything_once(count: int, batch_size: int) -> None:
    bounds = batch_bounds(count, batch_size)
    assert [i for a, b in bounds for i in range(a, b)] == list(range(count))
    sizes = [b - a for a, b in bounds]
    assert max(sizes) <= batch_size + 1
    assert min(sizes) > 1 or count == 1


@given(count=st.integers(2, 60), batch_size=st.integers(2, 20), accumulate=st.integers(1, 4), epoch=st.integers(1, 3))
@settings(deadline=None)
def test_an_epoch_is_one_pass_in_an_order_that_epochs_do_not_share(
    count: int, batch_size: int, accumulate: int, epoch: int
) -> None:
    feed = Feed({"d": samples(count)}, batch_size, accumulate, seed=3)
    steps = list(feed.epoch(epoch))
    assert len(steps) == feed.steps_per_epoch
    seen = [i for step in steps for (batch,) in step for i in batch.targets["t"].tolist()]
    assert sorted(seen) == list(range(count))
    again = [
        i
        for step in Feed({"d": samples(count)}, batch_size, accumulate, seed=3).epoch(epoch)
        for (b,) in step
        for i in b.targets["t"].tolist()
    ]
    assert seen == again
    if count > 20:
        other = [i for step in feed.epoch(epoch + 1) for (b,) in step for i in b.targets["t"].tolist()]
        assert seen != other


def test_a_smaller_dataset_repeats_in_fresh_passes() -> None:
    feed = Feed({"z": samples(20, name="z"), "a": samples(6, name="a")}, 5, 1, seed=0)
    steps = list(feed.epoch(1))
    assert [[batch.dataset for batch in step[0]] for step in steps] == [["a", "z"]] * 4
    seen = [i for step in steps for i in step[0][0].targets["t"].tolist()]
    assert len(seen) == 20
    for k in range(3):
        assert sorted(seen[6 * k : 6 * k + 6]) == list(range(6))
    assert seen[:6] != seen[6:12]


def test_augmentation_differs_in_every_pass_over_a_smaller_dataset() -> None:
    generator = torch.Generator().manual_seed(0)
    small = Samples("a", torch.rand(4, 1, 9, 9, generator=generator), {"t": torch.arange(4)}, {"t": None}, {"t": 4}, {"t": 1.0})
    feed = Feed({"a": small, "z": samples(64, (1, 9, 9), "z")}, 16, 1, seed=0, augment=Augment(crop=3, flip=True))
    views: dict[int, set[bytes]] = {i: set() for i in range(4)}
    for step in feed.epoch(1):
        batch = step[0][0]
        for i, image in zip(batch.targets["t"].tolist(), batch.images, strict=True):
            views[i].add(image.numpy().tobytes())
    assert min(len(seen) for seen in views.values()) > 8


def test_a_split_without_a_label_cannot_be_scored() -> None:
    labels, some = GOOD, np.array([True] * 6)

    @mtl.register_dataset("unlabelled_test")
    def unlabelled_test(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(IMAGES, labels, valid={"b": some if split == "train" else ~some})

    with pytest.raises(mtl.DataError, match=r"'unlabelled_test', test split, task 'tiny_b': no sample is labelled"):
        load("unlabelled_test")


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.int8, bool, list])
def test_labels_of_any_integer_kind(kind: Any) -> None:
    values = (np.arange(6) % 2).tolist() if kind is list else (np.arange(6) % 2).astype(kind)
    part = load(register("kinds_of_integers", labels={**GOOD, "b": values}))[mtl.Split.TRAIN]
    assert part.targets["tiny_b"].tolist() == [0, 1, 0, 1, 0, 1]


def test_read_only_arrays_are_taken() -> None:
    images, labels = np.broadcast_to(IMAGES[0], (6, 8, 8)), np.broadcast_to(GOOD["a"], (6,))
    labels.flags.writeable = False
    assert len(load(register("read_only", images=images, labels={**GOOD, "a": labels}))[mtl.Split.TRAIN]) == 6


def test_evaluation_order_and_slices() -> None:
    part = samples(7)
    batches = list(in_order(part, 3))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.cat([batch.targets["t"] for batch in batches]).tolist() == list(range(7))
    assert batches[0].images.data_ptr() == part.images.data_ptr()


def test_augmentation_depends_on_epoch_and_sample_alone() -> None:
    images = torch.randint(0, 255, (12, 3, 9, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index, augment = torch.arange(12), Augment(crop=2, flip=True)
    whole = augment(images, index, 5, "train", 1)
    torch.manual_seed(99)
    halves = torch.cat([augment(images[part], index[part], 5, "train", 1) for part in (slice(0, 5), slice(5, 12))])
    assert torch.equal(whole, halves)
    assert whole.shape == images.shape
    assert whole.dtype == torch.uint8
    assert not torch.equal(whole, augment(images, index, 5, "train", 2))
    assert not torch.equal(whole, augment(images, index, 6, "train", 1))


def test_augmentation_does_what_it_says() -> None:
    n = 2000
    images = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(n, 1, 5, 5)
    flipped = Augment(flip=True)(images, torch.arange(n), 0)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) | mirrored).all()
    assert 0.45 < mirrored.float().mean() < 0.55
    padded = torch.nn.functional.pad(images[:1], (1, 1, 1, 1))
    crops = {tuple(padded[0, 0, y : y + 5, x : x + 5].flatten().tolist()) for y in range(3) for x in range(3)}
    cropped = Augment(crop=1)(images, torch.arange(n), 0)
    found = [tuple(c.flatten().tolist()) for c in cropped]
    assert set(found) == crops
    assert min(found.count(c) for c in crops) > n / 9 * 0.7


def test_counter_based_numbers_are_uniform_and_uncorrelated() -> None:
    u = hash_uniform(torch.arange(100_000), 0, "a")
    v = hash_uniform(torch.arange(100_000), 0, "b")
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 5000).abs() < 5 * 5000**0.5).all()
    for pair in (torch.stack([u[1:], u[:-1]]), torch.stack([u, v])):
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.02


def test_seeded_leaves_the_callers_random_state_alone() -> None:
    def drawn() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.random()]

    def begin() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    begin()
    expected = drawn()
    begin()
    with seeded(0, "x"):
        inside = drawn()
    assert drawn() == expected
    with seeded(0, "x"):
        assert drawn() == inside
    with seeded(0, "y"):
        assert not {*drawn()} & {*inside}


@pytest.mark.parametrize(("kind", "axes"), [("pixel", (0,)), ("channel", (0, 2, 3))])
def test_standardisation_matches_the_training_split(kind: str, axes: tuple[int, ...]) -> None:
    images = torch.randint(0, 255, (5000, 2, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = 7
    images[:, 1] //= 4
    part = Samples("d", images, {}, {}, {}, {})
    module = Standardize(part.shape, kind)
    module.fit(part)
    y = module(images)
    assert y.dtype == torch.float32
    flat = y.mean(axes)
    torch.testing.assert_close(flat, torch.zeros_like(flat), atol=1e-4, rtol=0)
    spread = y.std(axes, correction=0)
    if kind == "pixel":
        assert spread[0, 0, 0] == 0  # never varies: divided by one grey level, not by zero
        spread = spread.flatten()[1:]
    torch.testing.assert_close(spread, torch.ones_like(spread), atol=1e-3, rtol=0)


def test_standardisation_of_floats_and_none() -> None:
    x = torch.randn(100, 5) * 3 + 2
    x[:, 2] = 4
    part = Samples("d", x, {}, {}, {}, {})
    module = Standardize((5,), "channel")
    module.fit(part)
    y = module(x)
    assert (y[:, 2] == 0).all()
    torch.testing.assert_close(y[:, 0].std(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)
    none = Standardize((5,), "none")
    none.fit(part)
    assert torch.equal(none(x), x)


# Classes that the dataset names


def pets(names: tuple[str, ...], kinds: list[str]) -> str:
    """A dataset whose labels stand for `names` in that order, one sample for each of `kinds`."""
    y = np.array([names.index(kind) for kind in kinds])
    images = np.array([[[50 * len(kind) % 251]] * 64 for kind in kinds], np.uint8).reshape(len(kinds), 8, 8)
    return register("pets", images=images, labels={"kind": y}, classes={"kind": names})


@pytest.mark.parametrize("head", [mtl.Classification, mtl.Ordinal])
def test_a_head_takes_its_classes_from_the_data_and_knows_them_again(head: type[mtl.Head], in_tmp: Path) -> None:
    register_pet_kind(head)
    kinds = ["cat", "parrot", "dog"] * 8
    pets(("cat", "dog", "parrot"), kinds)
    config = mtl.RunConfig(
        tasks=["pet_kind"],
        backbone={"name": "mlp", "widths": [8]},
        data={"validation": 6},
        epochs=3,
        device="cpu",
        precision="fp32",
    )
    result = mtl.train(config, "run")
    assert list(mtl.load_model("run").model.tasks[0].head.class_names() or ()) == ["cat", "dog", "parrot"]
    first = mtl.evaluate_run("run", "test")["pet_kind"]
    assert first == result.test["pet_kind"]
    pets(("parrot", "cat", "dog"), kinds)  # the same samples, numbered otherwise
    assert mtl.evaluate_run("run", "test")["pet_kind"] == first
    pets(("dog", "parrot"), ["parrot", "dog"] * 8)  # fewer of them
    assert mtl.evaluate_run("run", "test")["pet_kind"]["n"] == 16
    pets(("cat", "ferret"), ["cat", "ferret"] * 8)
    with pytest.raises(mtl.DataError, match="class 'ferret' is none of those that the task knows: cat, dog, parrot"):
        mtl.evaluate_run("run", "test")


def test_columns_are_taken_by_the_names_that_the_head_and_the_data_give_them() -> None:
    columns, seen = np.array([[0, 1, 0], [1, 0, 0], [0, 1, 1]] * 2), np.array([[True, False, True]] * 6)
    register("flags", labels={"t": columns}, valid={"t": seen}, classes={"t": ("b", "a", "c")})
    task = mtl.Task("flags", "t", mtl.MultiLabel(("a", "b")), name="t")
    part = load_samples("flags", [task])[mtl.Split.TRAIN]
    assert part.targets["t"].tolist() == [[0, 0], [0, 1], [0, 0]] * 2  # what is not labelled is 0
    assert part.valid["t"] is not None
    assert part.valid["t"].tolist() == [[False, True]] * 6
    wrong = replace(task, head=mtl.MultiLabel(("a", "x")))
    with pytest.raises(mtl.DataError, match="dataset 'flags', train split, task 't': unknown column 'x'; known: a, b, c"):
        load_samples("flags", [wrong])


def register_pet_kind(head: type[mtl.Head]) -> None:
    @mtl.register_task("pet_kind")
    def pet_kind() -> mtl.Task:
        return mtl.Task("pets", "kind", mtl.FromClasses(head))

    TASK_PLUGINS._claims["pet_kind"] = TASK_PLUGINS._claims["pet_kind"][-1:]


def test_a_head_whose_dataset_names_no_classes_is_told(in_tmp: Path) -> None:
    register_pet_kind(mtl.Classification)
    register("pets", labels={"kind": GOOD["a"]})
    with pytest.raises(mtl.DataError, match=r"task 'pet_kind': .*takes its classes from the dataset, which names none"):
        load_samples("pets", [make_task("pet_kind")])


@pytest.mark.parametrize(
    ("classes", "message"),
    [({"c": ("x", "y")}, "classes: unknown target 'c'"), ({"a": ("x", "y", "x")}, r"classes\['a'\] holds 'x' more than once")],
)
def test_classes_that_mean_nothing(classes: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(mtl.DataError, match=message):
        mtl.ArrayDataset(IMAGES, GOOD, classes=classes)


def test_splits_must_name_the_same_classes() -> None:
    @mtl.register_dataset("split_names")
    def dataset(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(IMAGES, GOOD, classes={"a": ("x", "y", "z") if split == mtl.Split.TRAIN else ("z", "y", "x")})

    with pytest.raises(mtl.DataError, match="its splits name different classes"):
        load("split_names")


# Groups


def test_validation_is_held_out_in_whole_groups() -> None:
    people = torch.arange(60) % 13
    register(
        "people", images=np.zeros((60, 8, 8), np.uint8), labels={"a": people % 3, "b": people % 2, "who": people}, groups=people
    )
    for seed in range(5):
        found = load_samples("people", [*TASKS, WHO], validation=15, seed=seed)
        apart = [set(found[split].targets["who"].tolist()) for split in (mtl.Split.TRAIN, mtl.Split.VAL)]
        assert not apart[0] & apart[1]
        assert len(apart[0] | apart[1]) == 13
        assert abs(len(found[mtl.Split.VAL]) - 15) <= 5
        assert len(found[mtl.Split.TRAIN]) + len(found[mtl.Split.VAL]) == 60


WHO = mtl.Task("people", "who", mtl.Classification([str(i) for i in range(13)]), name="who")


def test_one_group_cannot_be_parted() -> None:
    register("people", groups=np.zeros(6, int))
    with pytest.raises(mtl.DataError, match="cannot be held out in whole groups: 1 groups have up to 6 of 6"):
        load("people", 2)


def test_a_group_in_two_splits_is_refused() -> None:
    register("people")

    @mtl.register_dataset("people")
    def people(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        first = 0 if split == mtl.Split.TRAIN else 5
        return mtl.ArrayDataset(IMAGES, GOOD, groups=np.arange(first, first + 6))

    DATASETS._claims["people"] = DATASETS._claims["people"][-1:]
    with pytest.raises(mtl.DataError, match="dataset 'people': 1 groups are in both train and test"):
        load("people")


@pytest.mark.parametrize("groups", [np.zeros(5, int), np.zeros(6), np.zeros((6, 1), int)])
def test_groups_that_do_not_fit(groups: Any) -> None:
    with pytest.raises(mtl.DataError, match="groups must be 6 integers"):
        mtl.ArrayDataset(IMAGES, GOOD, groups=groups)
