"""How much of the training data is used: in proportion, nested, the same for every run; and how long an epoch is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import load_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mtl
from mtl.batches import Feed
from mtl.data import Samples
from mtl.subsets import how_many, stratified
from mtl.task import make_task

EVERYTHING = torch.arange(1000)
RARE = torch.tensor([0] * 900 + [1] * 80 + [2] * 20)


@given(st.integers(1, 1000), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_stratum_has_its_share_rounded(count: int, seed: int) -> None:
    chosen = stratified([RARE], EVERYTHING, count, seed, "x")
    assert len(chosen) == count == len(chosen.unique())
    assert bool((chosen.diff() > 0).all())
    for label, size in enumerate((900, 80, 20)):
        assert abs(int((RARE[chosen] == label).sum()) - size * count / 1000) <= 1


@given(st.integers(1, 999), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_fewer_are_among_more(count: int, seed: int) -> None:
    fewer, more = (set(stratified([RARE, RARE % 2], EVERYTHING, n, seed, "x").tolist()) for n in (count, count + 1))
    assert fewer < more


def test_it_depends_on_seed_and_name_alone() -> None:
    assert torch.equal(stratified([RARE], EVERYTHING, 50, 0, "x"), stratified([RARE], EVERYTHING, 50, 0, "x"))
    for seed, name in ((1, "x"), (0, "y")):
        assert not torch.equal(stratified([RARE], EVERYTHING, 50, 0, "x"), stratified([RARE], EVERYTHING, 50, seed, name))


def test_combinations_of_labels_are_strata_and_only_given_positions_are_chosen() -> None:
    a, b = torch.arange(1000) % 2, (torch.arange(1000) // 2) % 5
    among = torch.arange(0, 1000, 4)[:200] + 1
    chosen = stratified([a, b], among, 40, 0, "x")
    assert set(chosen.tolist()) <= set(among.tolist())
    assert torch.bincount(b[chosen], minlength=5).tolist() == [8, 8, 8, 8, 8]


def test_a_value_spread_over_many_small_strata_has_its_share() -> None:
    rare = torch.cat([torch.zeros(9000), torch.ones(60)]).long()
    other = torch.arange(9060) % 30  # two of the rare ones to a stratum, which alone would be rounded to none below a quarter
    for strata in ([rare, other], [other, rare]):
        for share in (0.05, 0.1, 0.2, 0.5):
            chosen = stratified(strata, torch.arange(9060), round(9060 * share), 0, "x")
            assert abs(int(rare[chosen].sum()) - 60 * share) <= 3


def test_strata_of_one_sample_each_are_a_random_choice_and_there_may_be_none() -> None:
    for strata in ([torch.arange(1000)], []):
        chosen = stratified(strata, EVERYTHING, 500, 0, "x")
        assert 150 < int((chosen < 500).sum()) < 350


def test_counts_and_shares() -> None:
    assert (how_many(3, 10), how_many(0.25, 10), how_many(1.0, 10)) == (3, 2, 10)


def load(tasks: list[str], **portion: Any) -> dict[mtl.Split, Samples]:
    return load_samples("tiny", [make_task(name) for name in tasks], validation=0.25, **portion)


def images(samples: dict[mtl.Split, Samples], split: mtl.Split = mtl.Split.TRAIN) -> Tensor:
    found = samples[split].images
    assert isinstance(found, Tensor)
    return found


def test_a_share_is_of_training_alone_and_the_same_whatever_the_tasks() -> None:
    whole, part = load(["tiny_a", "tiny_b"]), load(["tiny_a", "tiny_b"], fraction=0.5)
    assert len(part[mtl.Split.TRAIN]) == round(0.5 * len(whole[mtl.Split.TRAIN]))
    assert torch.equal(images(part, mtl.Split.VAL), images(whole, mtl.Split.VAL))
    assert torch.equal(images(part), images(load(["tiny_b"], fraction=0.5)))
    labels = part[mtl.Split.TRAIN].targets["tiny_a"] * 2 + part[mtl.Split.TRAIN].targets["tiny_b"]
    counts = torch.bincount(labels, minlength=6)
    assert int(counts.max() - counts.min()) <= 2


def test_few_labels_of_one_task_leave_the_others_alone() -> None:
    both = load(["tiny_a", "tiny_b"], labelled={"tiny_a": 12})[mtl.Split.TRAIN]
    mask = both.valid["tiny_a"]
    assert mask is not None
    assert (both.labelled, both.valid["tiny_b"]) == ({"tiny_a": 12, "tiny_b": len(both)}, None)
    share = 12 / len(both) * torch.bincount(load(["tiny_a"])[mtl.Split.TRAIN].targets["tiny_a"])
    assert bool(((torch.bincount(both.targets["tiny_a"][mask]) - share).abs() <= 1).all())
    assert len(both) == len(load(["tiny_a", "tiny_b"])[mtl.Split.TRAIN])


def test_samples_that_no_task_of_the_run_has_a_label_for_are_left_out() -> None:
    both, alone = load(["tiny_a", "tiny_b"], labelled={"tiny_a": 12}), load(["tiny_a"], labelled={"tiny_a": 12})
    mask = both[mtl.Split.TRAIN].valid["tiny_a"]
    assert mask is not None
    assert alone[mtl.Split.TRAIN].valid["tiny_a"] is None
    assert torch.equal(images(alone), images(both)[mask])


def test_more_labels_than_there_are() -> None:
    with pytest.raises(
        mtl.DataError, match=r"data\.labelled: 9999 labels of task 'tiny_a' are wanted, and \d+ training samples"
    ):
        load(["tiny_a"], labelled={"tiny_a": 9999})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labelled": {"tiny_z": 3}}, "unknown task 'tiny_z'"),
        ({"labelled": {"tiny_a": 0}}, "data.labelled.tiny_a"),
        ({"fraction": 0}, "data.fraction"),
        ({"fraction": 1.5}, "data.fraction"),
    ],
)
def test_portions_that_mean_nothing(tiny_config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    tiny_config["data"] = {**tiny_config["data"], **given}
    with pytest.raises(mtl.ConfigError, match=message):
        mtl.RunConfig(**tiny_config)


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 2), (1, 9), (2, 5)])
def test_an_epoch_of_so_many_steps(accumulate: int, steps: int) -> None:
    part = load(["tiny_a", "tiny_b"])[mtl.Split.TRAIN]
    feed = Feed({"tiny": part}, 16, accumulate, seed=0, epoch_steps=steps)
    epochs = [[batch for step in feed.epoch(epoch) for batches in step for batch in batches] for epoch in (1, 2)]
    assert feed.steps_per_epoch == steps
    assert [len(batch) for batch in epochs[0]] == [16] * (steps * accumulate)
    assert not torch.equal(epochs[0][0].images, epochs[1][0].images)


def test_an_epoch_of_as_many_steps_as_a_pass_takes_sees_the_same_samples() -> None:
    part = load(["tiny_a"], labelled={"tiny_a": 32})[mtl.Split.TRAIN]
    passes, steps = (Feed({"tiny": part}, 16, 1, seed=0, epoch_steps=n) for n in (None, 2))
    for one, other in zip(passes.epoch(3), steps.epoch(3), strict=True):
        assert torch.equal(one[0][0].images, other[0][0].images)
