"""Training: what a step computes, what it leaves alone, and that a run repeats."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mtl
from mtl import build, guard
from mtl.batches import Batch
from mtl.checkpoints import weights_file
from mtl.config import RunConfig
from mtl.data import Split
from mtl.evaluation import summed_loss
from mtl.locking import Lock
from mtl.run import Run, State
from mtl.step import expected_labels, train_step
from mtl.tracking import draw_coupling
from mtl.trainer import fit

SHARINGS: list[Any] = [
    "unshared",
    "hard_shared",
    {"kind": "split", "at": "pool1"},
    {"kind": "cross_stitch", "init": {"same": 0.9, "cross": 0.1}},
]


@pytest.fixture
def ready(tmp_path: Path, tiny_config: dict[str, Any]) -> Callable[..., Run]:
    """Builds a run from the tiny config with keys replaced; each in a directory of its own."""
    made: list[Run] = []

    def make(**values: Any) -> Run:
        run = build.run(RunConfig(**{**tiny_config, **values}), tmp_path / f"run{len(made)}")
        made.append(run)
        return run

    return make


def gradients(run: Run, step: list[list[Batch]], **without: bool) -> dict[str, Tensor]:
    """The gradients a step would apply, without applying them."""
    captured: dict[str, Tensor] = {}

    def capture(*_: Any) -> None:
        captured.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})

    run.optimizer.step = capture  # type: ignore[method-assign, assignment]
    run.schedule.step = lambda: None  # type: ignore[method-assign]
    train_step(run, step)
    return captured


def test_the_objective_is_the_weighted_sum(ready: Callable[..., Run]) -> None:
    """Fixed weights: sum of weight times mean cross-entropy, computed here by hand from the model's outputs."""
    run = ready(tasks=["tiny_a", {"name": "tiny_b", "weight": 3.0}, "tiny_c"], backbone={"name": "small_cnn", "dropout": 0})
    (batch,) = (step := next(run.feed.epoch(1)))[0]
    run.model.train()
    outputs = run.model({"tiny": batch.images}).outputs
    by_hand = [F.cross_entropy(outputs[name], batch.targets[name]) for name in ("tiny_a", "tiny_b", "tiny_c")]
    losses = train_step(run, step)
    torch.testing.assert_close(losses[:3], torch.stack(by_hand).detach())
    torch.testing.assert_close(losses[3], (by_hand[0] + 3.0 * by_hand[1] + 0.5 * by_hand[2]).detach())


def masked(batch: Batch, task: str, mask: Tensor) -> Batch:
    return Batch(batch.dataset, batch.images, batch.targets, {**batch.valid, task: mask})


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
def test_a_fully_masked_task_contributes_exactly_nothing(ready: Callable[..., Run], sharing: Any) -> None:
    """Bitwise the gradients of a run in which its loss is multiplied by zero, and zeros, not None, in its head."""
    run, other = ready(sharing=sharing), ready(sharing=sharing)
    (batch,) = next(run.feed.epoch(1))[0]
    none = torch.zeros(len(batch), dtype=torch.bool)
    garbage = {**batch.targets, "tiny_b": 1 - batch.targets["tiny_b"]}
    hidden = Batch(batch.dataset, batch.images, garbage, {**batch.valid, "tiny_b": none})
    other.weights = torch.tensor([1.0, 0.0])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        got = gradients(run, [[hidden]])
        torch.manual_seed(0)
        expected = gradients(other, [[batch]])
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name]), name
    assert got["heads.tiny_b.0.weight"].abs().max() == 0
    assert got["heads.tiny_a.0.weight"].abs().max() > 0


def test_masked_loss_is_that_of_the_labelled_subset(ready: Callable[..., Run]) -> None:
    run = ready()
    (batch,) = next(run.feed.epoch(1))[0]
    mask = torch.arange(len(batch)) % 2 == 0
    task = run.model.tasks[1]
    output = torch.randn(len(batch), 2, generator=torch.Generator().manual_seed(0))
    subset = F.cross_entropy(output[mask], batch.targets["tiny_b"][mask], reduction="sum")
    torch.testing.assert_close(summed_loss(task, output, masked(batch, "tiny_b", mask)), subset)


def test_normalisation_is_by_the_labelled_share_of_training(ready: Callable[..., Run]) -> None:
    data = {"validation": 12, "datasets": {"tiny": {"labelled": 0.5}}}
    run = ready(data=data)
    part = run.feed.samples["tiny"]
    share = part.labelled_share["tiny_b"]
    assert 0.3 < share < 0.7
    step = next(run.feed.epoch(1))
    assert expected_labels(run, step) == [16, 16 * share]


def test_micro_batches_add_up_to_the_whole(ready: Callable[..., Run]) -> None:
    """Two half batches give the gradients of the whole, half of one task's labels missing; in evaluation mode, since batch
    norm sees other batches."""
    data = {"validation": 12, "datasets": {"tiny": {"labelled": 0.5}}}
    whole, halves = ready(data=data, batch_size=16), ready(data=data, batch_size=8, optim={"accumulate": 2})
    one, two = next(whole.feed.epoch(1)), next(halves.feed.epoch(1))
    assert len(one) == 1
    assert len(two) == 2
    for run in (whole, halves):
        run.model.eval()
    a, b = gradients(whole, one), gradients(halves, two)
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=name)


def test_l2_is_as_if_it_were_in_the_loss(ready: Callable[..., Run]) -> None:
    """On convolution and fully connected weights alone, for Adam and SGD alike; alpha, biases and norms are left out."""
    sharing = {"kind": "cross_stitch"}
    backbone = {"name": "small_cnn", "width": 0.1, "dropout": 0}
    plain, decayed = ready(sharing=sharing, backbone=backbone), ready(sharing=sharing, backbone=backbone, optim={"l2": 0.1})
    step = next(plain.feed.epoch(1))
    a, b = gradients(plain, step), gradients(decayed, step)
    weights = dict(plain.model.named_parameters())
    decays = {name for name in weights if name.endswith(("conv.weight", "fc.weight", "0.weight"))}
    assert len(decays) == 2 * 4
    for name in a:
        expected = a[name] + 0.1 * weights[name].detach() if name in decays else a[name]
        torch.testing.assert_close(b[name], expected, msg=name)
    term = sum(0.05 * weights[name].detach().square().sum() for name in decays)
    torch.testing.assert_close(decayed.l2.value(), term)


def test_alpha_has_a_rate_of_its_own_and_no_decay(ready: Callable[..., Run]) -> None:
    run = ready(sharing={"kind": "cross_stitch", "lr_multiplier": 50}, optim={"name": "adamw", "lr": 0.01, "weight_decay": 0.3})
    groups = {group["name"]: group for group in run.optimizer.param_groups}
    assert set(groups) == {"weights", "other", "exchange"}
    assert groups["exchange"]["lr"] == pytest.approx(0.5)
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"weights": 0.3, "other": 0.0, "exchange": 0.0}
    assert len(groups["exchange"]["params"]) == 3
    assert sum(len(group["params"]) for group in groups.values()) == len(list(run.model.parameters()))


def test_clipping_bounds_the_global_norm(ready: Callable[..., Run]) -> None:
    """Of all gradients together, that of the L2 term included."""
    run = ready(optim={"clip_norm": 0.01, "l2": 1.0})
    clipped = gradients(run, next(run.feed.epoch(1)))
    assert torch.stack([g.norm() for g in clipped.values()]).norm() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "warmup_epochs": 1}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"schedule": "cosine"}, [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]),
        ({"schedule": "one_cycle", "momentum": 0.5}, [0.04, None, None, None, None, 4e-6]),
        ({"schedule": "one_cycle", "warmup_epochs": 0.3}, [0.04, 1, None, None, None, 4e-6]),  # of one step, which takes two
    ],
    ids=str,
)
def test_schedules(ready: Callable[..., Run], optim: dict[str, Any], expected: list[float | None]) -> None:
    """Rates over the six steps of two epochs, relative to the base; one-cycle ends as torch's does."""
    run = ready(optim={"lr": 0.1, **optim}, data={"validation": 6}, batch_size=14)
    assert run.feed.steps_per_epoch == 3
    rates = []
    for epoch in (1, 2):
        for step in run.feed.epoch(epoch):
            rates.append(run.optimizer.param_groups[0]["lr"] / 0.1)
            train_step(run, step)
    for got, want in zip(rates, expected, strict=True):
        assert want is None or got == pytest.approx(want, rel=1e-4), rates
    assert run.optimizer.param_groups[0]["betas"][0] == optim.get("momentum", 0.9)
    if optim["schedule"] == "one_cycle":
        assert max(rates) <= 1 + 1e-9
        assert max(rates) > 0.5


def test_one_cycle_of_two_steps_of_which_one_warms_up(ready: Callable[..., Run]) -> None:
    run = ready(optim={"schedule": "one_cycle", "warmup_epochs": 1}, max_steps=2)
    alone = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=run.config.optim.lr)
    plain = torch.optim.lr_scheduler.OneCycleLR(alone, run.config.optim.lr, total_steps=2, cycle_momentum=False)
    for step in itertools.islice(run.feed.epoch(1), 2):  # as torch's own of two steps, which has no room for another rise
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(alone.param_groups[0]["lr"])
        assert torch.isfinite(train_step(run, step)).all()
        alone.step()
        plain.step()


def test_what_cannot_be_built_leaves_no_directory_or_no_lock(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    config = RunConfig(**tiny_config)
    held = []  # with the frames of the errors, which would let go of the lock
    with pytest.MonkeyPatch.context() as patch:
        for name in ("make_schedule", "L2"):
            patch.setattr(build, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError) as caught:
                mtl.train(config, "run")
            held.append(caught)
            assert Path("run").exists() == (name == "L2")
            patch.undo()
    with Lock(Path("run")):
        pass


def test_a_dataset_without_a_test_split_beside_one_that_has_one(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    """Weights are chosen by all tasks; the test score is that of those that can be tested."""

    @mtl.register_dataset("trained_only", splits=("train",))
    def trained_only(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return make_tiny(48, split)

    mtl.register_task("trained_only_b")(lambda: mtl.Task("trained_only", "b", mtl.Classification(("falling", "rising"))))
    result = mtl.train(RunConfig(**{**tiny_config, "tasks": ["tiny_a", "trained_only_b"]}), "run")
    assert result.test is not None
    assert result.val is not None
    assert set(result.test) == {"tiny_a", "score"}
    assert result.test["score"] == pytest.approx(result.test["tiny_a"]["accuracy"])
    assert set(result.val) == {"tiny_a", "trained_only_b", "score"}
    assert mtl.evaluate_run("run", "test") == result.test


def test_uncertainty_weighting_by_hand(ready: Callable[..., Run]) -> None:
    run = ready(balancer="uncertainty")
    log_variance = dict(run.balancer.named_parameters())["log_variance"]
    log_variance.data = torch.tensor([0.3, -0.2])
    losses = torch.tensor([2.0, 3.0], requires_grad=True)
    total = run.balancer.backward(losses, [], [])
    assert total.item() == pytest.approx(2 * math.exp(-0.3) + 3 * math.exp(0.2) + 0.05)
    torch.testing.assert_close(losses.grad, torch.exp(torch.tensor([-0.3, 0.2])))
    assert log_variance.grad[0].item() == pytest.approx(0.5 - 2 * math.exp(-0.3))
    assert "balancer" in {group["name"] for group in run.optimizer.param_groups}


def test_random_weighting_is_the_sum_on_average(ready: Callable[..., Run]) -> None:
    balancer = ready(balancer="random").balancer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        totals = [balancer.combine(torch.tensor([1.0, 5.0])).item() for _ in range(4000)]  # type: ignore[operator]
    assert np.std(totals) > 0.5
    assert np.mean(totals) == pytest.approx(6.0, abs=0.15)


@pytest.mark.parametrize("balancer", ["fixed", "uncertainty", "random"])
@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
def test_overfits_a_batch(ready: Callable[..., Run], sharing: Any, balancer: str) -> None:
    run = ready(sharing=sharing, balancer=balancer, backbone={"name": "small_cnn", "width": 0.25, "dropout": 0})
    step = next(run.feed.epoch(1))
    for _ in range(60):
        losses = train_step(run, step)
    assert losses[:2].max() < 0.05
    outputs = run.model({"tiny": step[0][0].images}).outputs
    for task in run.model.tasks:
        assert torch.equal(outputs[task.name].argmax(1), step[0][0].targets[task.name])


def digest(result: mtl.RunResult) -> dict[str, bytes]:
    weights = load_file(weights_file(Path(result.run_dir), "last"))
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
def test_the_same_seed_repeats_bitwise_and_another_differs(tmp_path: Path, tiny_config: dict[str, Any], sharing: Any) -> None:
    """Dropout and augmentation on; whatever the caller's own random state is, which is left as it was."""
    data = {"validation": 12, "augment": {"crop": 1, "flip": True}}
    results = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(100 + i)
        before = torch.get_rng_state()
        results.append(
            mtl.train(RunConfig(**{**tiny_config, "data": data, "sharing": sharing, "seed": seed}), tmp_path / str(i))
        )
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = map(digest, results)
    assert first == again
    assert results[0].test == results[1].test
    assert sum(first[name] != other[name] for name in first) > 10


def test_best_weights_are_those_of_the_best_validation_epoch(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    result = mtl.train(RunConfig(**{**tiny_config, "epochs": 5, "optim": {"lr": 0.02}}), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 5 * 2 * 2
    scores = {
        epoch: np.mean([r["accuracy"] for r in rows if r["split"] == "val" and r["epoch"] == epoch]) for epoch in range(1, 6)
    }
    best = max(scores, key=lambda epoch: (scores[epoch], -epoch))
    assert result.best_epoch == best
    assert result.val is not None
    assert result.val["score"] == pytest.approx(scores[best])
    assert mtl.evaluate_run(tmp_path / "run", "val") == result.val
    assert mtl.evaluate_run(tmp_path / "run", "test") == result.test
    last = mtl.evaluate_run(tmp_path / "run", "val", weights="last")
    assert last["score"] == pytest.approx(scores[5])


def test_without_validation_the_last_epoch_is_the_choice(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    result = mtl.train(RunConfig(**{**tiny_config, "data": {"validation": 0}, "epochs": 3}), tmp_path / "run")
    assert (result.best_epoch, result.epochs, result.val) == (3, 3, None)
    assert result.test is not None


def test_patience_and_max_steps_end_a_run_early(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    stuck = {**tiny_config, "epochs": 50, "patience": 2, "optim": {"lr": 1e-12}}
    result = mtl.train(RunConfig(**stuck), tmp_path / "patience")
    assert result.epochs == result.best_epoch + 2 < 50
    short = mtl.train(RunConfig(**{**tiny_config, "epochs": 50, "max_steps": 4}), tmp_path / "steps")
    assert (short.steps, short.epochs) == (4, 2)


def test_a_loss_that_explodes_is_named_and_earlier_weights_stay(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    config = RunConfig(**{**tiny_config, "optim": {"name": "sgd", "lr": 1e30}, "epochs": 4})
    with pytest.raises(mtl.RunError, match=r"the loss of tiny_a.* is not finite in validation, in epoch \d"):
        mtl.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_evaluation_changes_nothing(ready: Callable[..., Run]) -> None:
    from mtl.evaluation import evaluate

    run = ready(sharing={"kind": "cross_stitch"})
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.model.train()
    a = evaluate(run.model, run.samples[Split.TEST], 24, run.autocast)
    b = evaluate(run.model, run.samples[Split.TEST], 5, run.autocast)
    assert run.model.training
    for name in a:
        assert a[name]["accuracy"] == b[name]["accuracy"]
        assert a[name]["loss"] == pytest.approx(b[name]["loss"], rel=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


def test_metrics_count_labelled_samples_only(ready: Callable[..., Run]) -> None:
    from mtl.evaluation import evaluate

    run = ready(data={"validation": 12, "datasets": {"tiny": {"labelled": 0.4}}})
    figures = evaluate(run.model, run.samples[Split.TEST], 8, run.autocast)
    part = run.samples[Split.TEST]["tiny"]
    run.model.eval()
    right = run.model({"tiny": part.images}).outputs["tiny_b"].argmax(1) == part.targets["tiny_b"]
    mask = part.valid["tiny_b"]
    assert mask is not None
    assert figures["tiny_b"]["n"] == int(mask.sum()) < 24
    assert figures["tiny_b"]["accuracy"] == pytest.approx(right[mask].float().mean().item())


class Synchronisations(TorchDispatchMode):
    """Counts what would make the host wait for a CUDA device: reads of a value, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in ("tolist", "numpy", "cpu"):  # on the CPU these never reach the dispatcher
            monkeypatch.setattr(Tensor, name, self.counted(getattr(Tensor, name)))

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return method(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name in ("index", "index_put_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
        )
        self.count += by_mask or name in self.WAITING
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: torch.bincount(x.long()),
        lambda x: x.nonzero(),
    ],
)
def test_the_counter_of_synchronisations_counts(wait: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    with Synchronisations(monkeypatch) as waits:
        x * 2 + x[torch.tensor([0, 1])].sum()
        assert waits.count == 0
        wait(x)
    assert waits.count >= 1


class Arrived:
    """What a GPU has found of a step in which nothing is wrong, in the host's memory."""

    def __init__(self, size: int) -> None:
        self.size = size

    def tolist(self) -> list[float]:
        return [0.0] * self.size


@pytest.mark.parametrize("sharing", SHARINGS, ids=str)
def test_the_loop_does_not_wait_for_the_device(
    ready: Callable[..., Run], sharing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synchronisations of an epoch, and of an evaluation, do not grow with their batches; labels partly missing,
    augmentation and clipping on."""
    from mtl.evaluation import evaluate
    from mtl.trainer import train_epoch

    data = {"validation": 6, "augment": {"crop": 1}, "datasets": {"tiny": {"train": 400, "labelled": 0.5}}}
    counts = []
    for batch_size in (64, 8):
        run = ready(sharing=sharing, data=data, batch_size=batch_size, optim={"clip_norm": 1.0, "l2": 1e-5})
        run.guard.late = guard.LATE  # as on a GPU, where the host reads what was sent to it earlier
        monkeypatch.setattr(guard, "_sent", lambda verdict: (Arrived(len(verdict)), None))
        with Synchronisations(monkeypatch) as training:
            train_epoch(run, State())
        with Synchronisations(monkeypatch) as evaluating:
            evaluate(run.model, run.samples[Split.TRAIN], batch_size, run.autocast)
        counts.append((run.feed.steps_per_epoch, training.count, evaluating.count))
    (few, *first), (many, *second) = counts
    assert many > 5 * few
    assert first == second
    assert first[0] <= 4


def test_tensorboard_tags(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sharing = {"kind": "cross_stitch", "points": ["pool1", "fc3"], "granularity": "dense"}
    mtl.train(RunConfig(**{**tiny_config, "sharing": sharing, "balancer": "uncertainty"}), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    tags = set(events.Tags()["scalars"])
    pairs = {f"stitch/{p}/{t}_from_{s}" for p in ("pool1", "fc3") for t in ("tiny_a", "tiny_b") for s in ("tiny_a", "tiny_b")}
    assert pairs <= tags
    assert {"train/loss/tiny_a", "train/loss/tiny_b", "train/loss/total", "val/tiny_a/accuracy", "val/tiny_b/f1_macro"} <= tags
    assert {"lr/weights", "lr/other", "lr/exchange", "lr/balancer", "time/images_per_second", "val/score"} <= tags
    assert set(events.Tags()["images"]) == {"stitch/pool1", "stitch/fc3"}
    assert [event.step for event in events.Scalars("train/loss/total")] == [3, 6]
    assert events.Scalars("stitch/fc3/tiny_a_from_tiny_b")[0].value == 0


def test_the_picture_of_an_exchange_tells_signs_apart() -> None:
    from matplotlib import colormaps

    def large(picture: np.ndarray[Any, np.dtype[np.uint8]], value: float) -> bool:
        """Whether a good part of the picture has the colour of this value, where the largest is 1."""
        colour = 255 * np.array(colormaps["PuOr"]((value + 1) / 2)[:3])
        return bool((np.abs(picture - colour).max(2) < 4).mean() > 0.05)

    names = ["a", "b"]
    for matrix, shown in {
        ((1.0, 0.0), (0.0, 1.0)): {1.0: True, -0.5: False, 0.0: True},
        ((1.0, -0.5), (-0.5, 1.0)): {1.0: True, -0.5: True, 0.0: False},
    }.items():
        picture = draw_coupling(np.array(matrix), names, "title")
        assert {value: large(picture, value) for value in shown} == shown


def test_bf16_trains_and_keeps_weights_in_fp32(ready: Callable[..., Run]) -> None:
    """Features are computed in bf16, while weights and what losses and decisions see stay fp32."""
    run = ready(precision="bf16", sharing={"kind": "cross_stitch"})
    with run.autocast():
        features, outputs = run.model({"tiny": run.samples[Split.TEST]["tiny"].images})
    assert {f.dtype for f in features.values()} == {torch.bfloat16}
    assert {y.dtype for y in outputs.values()} == {torch.float32}
    result = fit(run)
    assert result.precision == "bf16"
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert result.test is not None
    assert math.isfinite(result.test["score"])


def test_two_datasets_train_together(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    from conftest import make_tiny

    @mtl.register_dataset("tiny_other")
    def tiny_other(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return make_tiny(30, split)

    @mtl.register_task("other_b")
    def other_b() -> mtl.Task:
        return mtl.Task("tiny_other", "b", mtl.Classification(("falling", "rising")))

    for i, sharing in enumerate(SHARINGS):
        config = RunConfig(**{**tiny_config, "tasks": ["other_b", "tiny_a"], "sharing": sharing})
        result = mtl.train(config, tmp_path / str(i))
        assert result.test is not None
        assert (result.test["other_b"]["n"], result.test["tiny_a"]["n"]) == (30, 24)


def test_images_and_vectors_are_refused_together(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    @mtl.register_dataset("lines")
    def lines(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(np.zeros((20, 5), np.float32), {"x": np.arange(20) % 2})

    mtl.register_task("lines_x")(lambda: mtl.Task("lines", "x", mtl.Classification(("a", "b"))))
    config = RunConfig(**{**tiny_config, "tasks": ["tiny_a", "lines_x"], "data": {"validation": 6}})
    with pytest.raises(
        mtl.DataError, match=r"samples of one shape, and only images can .*found lines \(5,\), tiny \(1, 8, 8\)"
    ):
        mtl.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_accumulation_is_refused_where_it_would_change_the_objective(ready: Callable[..., Run]) -> None:
    for balancer in ("uncertainty", "random"):
        with pytest.raises(mtl.ConfigError, match=rf"optim.accumulate=2: balancer '{balancer}' is not additive"):
            ready(balancer=balancer, optim={"accumulate": 2})


def test_standardisation_comes_from_what_is_trained_on(ready: Callable[..., Run]) -> None:
    run = ready()
    mean = run.model.get_buffer("inputs.tiny.mean")
    images = [run.samples[split]["tiny"].images.float() for split in (Split.TRAIN, Split.TEST)]
    trained, tested = (x.mean((0, 2, 3), keepdim=True)[0] for x in images)
    torch.testing.assert_close(mean, trained)
    assert not torch.allclose(mean, tested)


def test_rows_count_the_labels_that_were_learned_from(tmp_path: Path, tiny_config: dict[str, Any]) -> None:
    data = {"validation": 12, "datasets": {"tiny": {"labelled": 0.5}}}
    mtl.train(RunConfig(**{**tiny_config, "data": data, "max_steps": 1}), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    counts = {row["task"]: row["n"] for row in rows if row["split"] == "train"}
    assert counts["tiny_a"] == 16
    assert 2 < counts["tiny_b"] < 14


class Maps(mtl.Head):
    """A value per pixel: what a dense head of a third party looks like."""

    def build(self, features: tuple[int, ...]) -> torch.nn.Module:
        return torch.nn.Conv2d(features[0], 1, 1)

    def targets(self, labels: Tensor, valid: Tensor) -> Tensor:
        return torch.where(valid, labels, 0.0)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (output[:, 0] - target).square()

    def metrics(self) -> tuple[mtl.Metric, ...]:
        import torchmetrics

        return (mtl.Metric("mean", "higher", torchmetrics.MeanMetric, score=True),)

    def predictions(self, output: Tensor) -> Tensor:
        return output[:, 0]

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        return [{"mean": value} for value in output.mean((1, 2, 3)).tolist()]


@pytest.mark.parametrize("labelled", [1.0, 0.25, 1 / 64])
def test_targets_and_masks_may_be_maps(tmp_path: Path, labelled: float) -> None:
    """A map's loss is the mean over its labelled pixels, here by hand; one labelled pixel per image is not all of them."""
    generator = torch.Generator().manual_seed(0)
    images, maps = torch.rand(32, 1, 8, 8, generator=generator), torch.rand(32, 8, 8, generator=generator)
    order = torch.rand(32, 64, generator=generator).argsort(1)
    mask = (order < round(64 * labelled)).view(32, 8, 8)

    @mtl.register_dataset("map_data", splits=("train",))
    def map_data(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(images, {"depth": maps}, {"depth": mask})

    @mtl.register_task("map_depth")
    def map_depth() -> mtl.Task:
        return mtl.Task("map_data", "depth", Maps())

    @mtl.register_backbone("pixelwise")
    def pixelwise(input_shape: tuple[int, ...]) -> torch.nn.Module:
        return torch.nn.Conv2d(1, 2, 3, padding=1)

    config = RunConfig(tasks=["map_depth"], backbone="pixelwise", data={"validation": 0}, batch_size=16, precision="fp32")
    run = build.run(config, tmp_path / "run")
    step = next(run.feed.epoch(1))
    batch = step[0][0]
    output = run.model({"map_data": batch.images}).outputs["map_depth"]
    chosen = batch.valid["map_depth"]
    pixels = (output[:, 0] - batch.targets["map_depth"]).square()
    expected = pixels.mean() if chosen is None else pixels[chosen].mean()
    assert (chosen is None) == (labelled == 1.0)
    torch.testing.assert_close(train_step(run, step)[0], expected.detach())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"loss": F.cross_entropy},
            r"'odd_task' must be unreduced.*shape \(2,\); found shape \(\).*reduction='none'",
        ),
        (
            {"loss": lambda output, target: 1 / 0},
            r"'odd_task': its head, loss or metrics fail .* ZeroDivisionError",
        ),
        ({"metrics": [mtl.Metric("m", "higher", lambda: None, score=True)]}, r"'odd_task': its head, loss or metrics fail"),  # type: ignore[arg-type, return-value]
    ],
)
def test_a_task_is_tried_before_anything_is_trained(
    tmp_path: Path, tiny_config: dict[str, Any], parts: dict[str, Any], message: str
) -> None:
    @mtl.register_task("odd_task")
    def odd_task() -> mtl.Task:
        return mtl.Task("tiny", "a", mtl.Classification(["a", "b", "c"]), **parts)

    with pytest.raises(mtl.PluginError, match=message):
        mtl.train(RunConfig(**{**tiny_config, "tasks": ["odd_task"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["task", "dataset"])
def test_names_that_modules_have_a_use_for_are_refused(tmp_path: Path, tiny_config: dict[str, Any], kind: str) -> None:
    @mtl.register_dataset("values")
    def values(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        return mtl.ArrayDataset(torch.zeros(9, 4), {"y": torch.arange(9) % 2})

    @mtl.register_task("type")
    def type_() -> mtl.Task:
        return mtl.Task("tiny", "a", mtl.Classification(("dark", "grey", "light")))

    @mtl.register_task("of_values")
    def of_values() -> mtl.Task:
        return mtl.Task("values", "y", mtl.Classification(("a", "b")))

    for taken in ("mean", "score"):
        given = {**tiny_config, "tasks": [{"name": taken, "task": "of_values"}]}
        with pytest.raises(
            mtl.PluginError, match=f"task name '{taken}' is what figures over all tasks are called; call it {taken}_task"
        ):
            mtl.train(RunConfig(**given), tmp_path / "run")
    name, offender = {"task": ("type", "type"), "dataset": ("of_values", "values")}[kind]
    message = rf"{kind} name '{offender}' is an attribute of torch modules; call it {offender}_{kind}"
    with pytest.raises(mtl.PluginError, match=message):
        mtl.train(RunConfig(**{**tiny_config, "tasks": [name]}), tmp_path / "run")


def test_a_unit_is_frozen_by_the_name_of_its_layer_point(ready: Callable[..., Run]) -> None:
    run = ready(
        backbone="mobilenet_v3_small",
        sharing={"kind": "cross_stitch", "points": ["features.3"]},
        optim={"freeze": "units.features.3"},
    )
    assert [name for name, p in run.model.named_parameters() if not p.requires_grad] == ["units.features/3.alpha"]


def test_parameters_of_five_dimensions_are_left_as_they_are(ready: Callable[..., Run]) -> None:
    class Volumes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images, self.volumes = nn.Conv2d(1, 4, 3), nn.Conv3d(1, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.volumes(self.images(x)[:, None]).flatten(1)

    mtl.register_backbone("volumes")(lambda input_shape: Volumes())
    run = ready(backbone="volumes", sharing="unshared")
    tower = run.model.towers["tiny_a"]
    assert tower.images.weight.is_contiguous(memory_format=torch.channels_last)
    assert tower.volumes.weight.is_contiguous()
    assert torch.isfinite(train_step(run, next(run.feed.epoch(1)))).all()
