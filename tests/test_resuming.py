"""A run that was cut and goes on equals one that was not, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Lines
from safetensors.torch import load_file
from torch import nn

import mtl
from mtl import commit, evaluation, interruption, trainer
from mtl.checkpoints import BEST, MODEL, STATE, TRAINING, newest, state_of, verify
from mtl.commit import MANIFEST, committed
from mtl.decoding import Decoders
from mtl.interruption import Interruption, Terminated
from mtl.keeping import Keeper
from mtl.locking import Lock


class Cut(BaseException):
    """Where a process would have been killed."""


@contextmanager
def cut_after(steps: int) -> Iterator[None]:
    """Runs end after this many steps as if they had been killed."""
    between = Keeper.between_steps

    def killing(keeper: Keeper) -> None:
        between(keeper)
        if keeper.state.steps == steps:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "between_steps", killing)
        try:
            yield
        except Cut:
            return
        raise AssertionError(f"no step {steps}")


@mtl.register_backbone("dropping")
def dropping(input_shape: tuple[int, ...]) -> nn.Module:
    """A small network with batch norm and dropout."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def config(tiny_config: dict[str, Any], **changes: Any) -> mtl.RunConfig:
    tree: dict[str, Any] = {
        **tiny_config,
        "backbone": "dropping",
        "sharing": {"kind": "cross_stitch", "points": ["0", "4"], "init": {"same": 0.9, "cross": 0.1}},
        "epochs": 3,
        "checkpoints": {"every_steps": 2},
        **changes,
    }
    tree["data"] = {"validation": 12, "augment": {"crop": 1, "flip": True}, **changes.get("data", {})}
    return mtl.RunConfig(**tree)


def digest(run_dir: Path) -> dict[str, str]:
    """Of the newest checkpoint: of each file of tensors, tensor by tensor, and of the state without times."""
    folder, _ = newest(run_dir)
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        said = sha256()
        for name, tensor in sorted(load_file(file).items()):
            said.update(repr((name, tensor.dtype, tensor.shape)).encode())
            said.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found[file.name] = said.hexdigest()
    state = state_of(folder)
    del state["seconds"], state["training_seconds"]
    found["state"] = json.dumps(state, sort_keys=True)
    return found


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


CASES: dict[str, dict[str, Any]] = {
    "adam": {},
    "sgd, momentum, cosine with warm-up": {"optim": {"name": "sgd", "lr": 0.05, "schedule": "cosine", "warmup_epochs": 1}},
    "adamw, one cycle, clipped": {"optim": {"name": "adamw", "schedule": "one_cycle", "clip_norm": 1.0}},
    "accumulation": {"optim": {"accumulate": 2}, "batch_size": 8},
    "learned weights": {"balancer": "uncertainty"},
    "random weights": {"balancer": "random"},
    "dwa": {"balancer": "dwa"},
    "famo": {"balancer": "famo"},
    "gradient aggregation": {"balancer": "pcgrad"},
    "no validation": {"data": {"validation": 0}},
    "missing labels": {"data": {"datasets": {"tiny": {"labelled": 0.5}}}},
    "dense units": {"sharing": {"kind": "cross_stitch", "points": ["0"], "granularity": "dense"}},
    "hard shared": {"sharing": "hard_shared"},
    "channels last, small_cnn": {"backbone": {"name": "small_cnn", "width": 0.1}, "sharing": "cross_stitch"},
    "epochs of a length": {"epoch_steps": 5},
    "balanced classes": {"data": {"class_balanced": ["tiny_a"]}},
    "batched": {"execution": "batched"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_one_that_was_never_cut(name: str, tiny_config: dict[str, Any], in_tmp: Path) -> None:
    given = config(tiny_config, **CASES[name])
    whole = mtl.train(given, "whole")
    expected = digest(in_tmp / "whole")
    for steps in (1, 4, whole.steps - 1):
        with cut_after(steps):
            mtl.train(given, f"cut{steps}")
        torch.rand(7)  # whatever a process did before
        result = mtl.resume(f"cut{steps}")
        assert digest(in_tmp / f"cut{steps}") == expected
        assert (result.val, result.test, result.steps) == (whole.val, whole.test, whole.steps)
        assert rows(in_tmp / f"cut{steps}") == rows(in_tmp / "whole")
        if (in_tmp / "whole" / "exchange.jsonl").exists():
            assert rows(in_tmp / f"cut{steps}", "exchange.jsonl") == rows(in_tmp / "whole", "exchange.jsonl")


@pytest.mark.parametrize(("name", "remove"), [("metrics.jsonl", Path.unlink), ("exchange.jsonl", lambda p: os.truncate(p, 9))])
def test_lost_rows_are_told(name: str, remove: Callable[[Path], None], tiny_config: dict[str, Any], in_tmp: Path) -> None:
    with cut_after(4):
        mtl.train(config(tiny_config), "run")
    before = (in_tmp / "run" / name).stat().st_size
    remove(in_tmp / "run" / name)
    shown = Lines()
    mtl.resume("run", progress=shown)
    gone = before - (9 if name == "exchange.jsonl" else 0)
    assert [line for line in shown.lines if "lacks" in line] == [
        f"{name} lacks {gone:,} bytes of its rows; the run does not need them"
    ]
    assert rows(in_tmp / "run", name)  # no half of a row before them


def test_a_run_with_steps_left_out_is_resumed_as_if_never_cut(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    """Whoever looks who it was draws no random number of the run's, and an epoch's steps are counted across a cut."""
    given = config(tiny_config, epochs=1, epoch_steps=10)
    real = trainer.train_step

    def steps_from(done: int) -> Callable[..., Any]:
        numbers = iter(range(done, 99))

        def step(run: Any, of: Any) -> Any:
            weight = next(p for name, p in run.model.named_parameters() if name.startswith("heads.tiny_b"))
            bad = next(numbers) in (2, 6)
            hook = weight.register_hook(lambda gradient: gradient * float("nan")) if bad else None
            found = real(run, of)
            if hook is not None:
                hook.remove()
            return found

        return step

    def told(shown: Lines) -> list[str]:
        return [line for line in shown.lines if "left out" in line]

    whole, first, then = Lines(), Lines(), Lines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", steps_from(0))
        assert mtl.train(given, "whole", whole).steps_left_out == 2
        patch.setattr(trainer, "train_step", steps_from(0))
        with cut_after(5):
            mtl.train(given, "cut", first)
        patch.setattr(trainer, "train_step", steps_from(4))
        mtl.resume("cut", progress=then)
    assert digest(in_tmp / "cut") == digest(in_tmp / "whole")
    assert [*told(first), *told(then)] == told(whole)
    assert told(whole)[0].startswith("step 3 was left out: ")
    assert told(whole)[1:] == ["epoch 1: 2 steps were left out, for a loss or a gradient was not finite"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "tb", "checkpoints", ".lock", "anything"])
def test_a_run_directory_that_leads_elsewhere_is_refused(name: str, tiny_config: dict[str, Any], in_tmp: Path) -> None:
    with cut_after(4):
        mtl.train(config(tiny_config), "run")
    path = in_tmp / "run" / name
    if path.exists():
        path.rename(in_tmp / "elsewhere")
    path.symlink_to(in_tmp / "elsewhere")
    before = sorted(in_tmp.rglob("*"))
    with pytest.raises(mtl.RunError, match=rf"'run/{name}' is a link, through which a run writes nothing"):
        mtl.resume("run")
    assert sorted(in_tmp.rglob("*")) == before


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["step", "validation", "test", "save"])
def test_a_signal_saves_and_ends_and_the_run_goes_on(
    number: signal.Signals, where: str, tiny_config: dict[str, Any], in_tmp: Path
) -> None:
    given = config(tiny_config, checkpoints={"every_seconds": 1000})
    whole = mtl.train(given, "whole")
    with pytest.MonkeyPatch.context() as patch:
        sent_in(where, number, patch)
        with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
            mtl.train(given, "cut", shown := Lines())
    told = {"step": "in epoch 2", "validation": "in epoch 2", "test": "after the last epoch, before the test was over"}
    assert where == "save" or any(line.startswith(f"interrupted {told[where]}; ") for line in shown.lines)
    assert ended.type is (KeyboardInterrupt if number == signal.SIGINT else Terminated)
    if ended.type is SystemExit:
        assert ended.value.code == 143
    assert not any(one["faults"] for one in verify(in_tmp / "cut"))
    stopped_at = state_of(newest(in_tmp / "cut")[0])["steps"]
    assert stopped_at == {"step": 4, "validation": 6, "test": 9, "save": 1}[where]
    result = mtl.resume("cut")
    assert digest(in_tmp / "cut") == digest(in_tmp / "whole")
    assert (result.val, result.test) == (whole.val, whole.test)
    assert rows(in_tmp / "cut") == rows(in_tmp / "whole")


def sent_in(where: str, number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """Send this process a signal once: in the 4th step, in the 2nd validation, in the test, or in the first save."""
    module, name, at = {
        "step": (trainer, "train_step", 4),
        "validation": (evaluation, "_evaluate_dataset", 2),
        "test": (evaluation, "_evaluate_dataset", 4),
        "save": (commit, "seal", 1),
    }[where]
    original, calls = getattr(module, name), []

    def with_signal(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(number)
        return original(*given, **named)

    patch.setattr(module, name, with_signal)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_ends_at_once(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    given = config(tiny_config)

    def twice(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", twice)
        with pytest.raises(KeyboardInterrupt):
            mtl.train(given, "run")
    assert mtl.resume("run").steps == 9
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    long = mtl.train(config(tiny_config, epochs=4), "long")
    short = mtl.train(config(tiny_config, epochs=2), "short")
    before = digest(in_tmp / "short")
    assert vars(mtl.resume("short")) == vars(short)
    assert digest(in_tmp / "short") == before
    longer = mtl.resume("short", ["epochs=4"])
    assert digest(in_tmp / "short") == digest(in_tmp / "long")
    assert (longer.test, longer.epochs, longer.config_digest) == (long.test, 4, long.config_digest)
    assert rows(in_tmp / "short") == rows(in_tmp / "long")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=0.1"], r"optim.lr: 0.001 -> 0.1: that would be another run"),
        (["batch_size=8", "seed=3"], r"batch_size: 16 -> 8: .*\n.*seed: 0 -> 3"),
        (["tasks=[tiny_a]"], "tasks: .* -> .*another run"),
        (["sharing.kind=hard_shared"], "sharing.kind: 'cross_stitch' -> 'hard_shared'"),
        (["precision=bf16"], "precision: 'fp32' -> 'bf16'"),
        (["epochs=1"], r"epochs: 3 -> 1: 2 are done or begun"),
        (["data.validation=6"], r"data.validation: 12 -> 6"),
        (["epohcs=4"], r"unknown key 'epohcs'.*did you mean 'epochs'"),
    ],
)
def test_changes_that_make_another_run_are_refused_key_by_key(
    overrides: list[str], message: str, tiny_config: dict[str, Any], in_tmp: Path
) -> None:
    with cut_after(7):
        mtl.train(config(tiny_config), "run")
    before = digest(in_tmp / "run")
    with pytest.raises(mtl.ConfigError, match=message):
        mtl.resume("run", overrides)
    assert digest(in_tmp / "run") == before


def test_the_length_may_not_change_where_the_rate_is_laid_out_over_it(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    mtl.train(config(tiny_config, optim={"schedule": "cosine"}), "run")
    with pytest.raises(mtl.ConfigError, match=r"epochs: 3 -> 5: optim.schedule=cosine, .* are laid out over the whole run"):
        mtl.resume("run", ["epochs=5"])


@pytest.mark.parametrize("more", [{"max_steps": 4}, {"optim": {"warmup_epochs": 1}}])
def test_the_length_may_not_change_where_something_else_depends_on_it(
    more: dict[str, Any], tiny_config: dict[str, Any], in_tmp: Path
) -> None:
    mtl.train(config(tiny_config, **more), "run")
    with pytest.raises(mtl.ConfigError, match="are laid out over the whole run"):
        mtl.resume("run", ["epochs=5"])
    with pytest.raises(mtl.ConfigError, match=r"max_steps: .* -> 9: that would be another run"):
        mtl.resume("run", ["max_steps=9"])


@pytest.mark.parametrize("overrides", [["data.workers=1"], ["checkpoints.every_steps=5"], ["patience=9"], ["data.bad_files=0"]])
def test_changes_that_no_step_depends_on_are_taken_and_said(
    overrides: list[str], tiny_config: dict[str, Any], in_tmp: Path
) -> None:
    whole = mtl.train(config(tiny_config), "whole")
    with cut_after(4):
        mtl.train(config(tiny_config), "cut")
    shown = Lines()
    assert mtl.resume("cut", overrides, shown).test == whole.test
    key = overrides[0].partition("=")[0]
    assert any(line.startswith(f"{key}: ") for line in shown.lines)
    assert digest(in_tmp / "cut") == digest(in_tmp / "whole")
    assert json.loads((in_tmp / "cut" / "env.json").read_text())["resumed"]


@pytest.mark.parametrize("file", [MODEL, TRAINING, STATE, MANIFEST])
def test_damage_is_seen_and_the_checkpoint_before_is_used(file: str, tiny_config: dict[str, Any], in_tmp: Path) -> None:
    whole = mtl.train(config(tiny_config), "whole")
    with cut_after(7):
        mtl.train(config(tiny_config), "cut")
    last, before = committed(in_tmp / "cut" / "checkpoints")
    data = bytearray((last / file).read_bytes())
    data[len(data) // 2] ^= 1
    (last / file).write_bytes(data)
    faults = {one["name"]: one["faults"] for one in verify(in_tmp / "cut")}
    assert (bool(faults[last.name]), faults[before.name]) == (True, [])
    shown = Lines()
    assert mtl.resume("cut", progress=shown).test == whole.test
    assert any(line.startswith(last.name) for line in shown.lines)
    assert f"goes on after step 4, from {before.name}" in shown.lines
    assert digest(in_tmp / "cut") == digest(in_tmp / "whole")


def test_a_run_whose_checkpoints_are_all_damaged_says_what_is_wrong(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    mtl.train(config(tiny_config), "run")
    for folder in committed(in_tmp / "run" / "checkpoints"):
        (folder / MODEL).write_bytes(b"")
    with pytest.raises(
        mtl.RunError, match=r"every checkpoint of 'run' is damaged: checkpoint-\d+: model.safetensors has 0 bytes"
    ):
        mtl.resume("run")
    with pytest.raises(mtl.RunError, match=r"model.safetensors has 0 bytes"):
        mtl.evaluate_run("run", weights="last")
    shutil.rmtree(in_tmp / "run" / "checkpoints")
    with pytest.raises(mtl.RunError, match="'run' holds no checkpoint"):
        mtl.resume("run")
    with pytest.raises(mtl.RunError, match="'nowhere' is not a run directory"):
        mtl.resume("nowhere")


def test_a_run_that_was_cut_before_its_first_checkpoint_begins_anew(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    whole = mtl.train(config(tiny_config), "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "publish", killed)
        with pytest.raises(Cut):
            mtl.train(config(tiny_config), "cut")
    shown = Lines()
    assert mtl.resume("cut", progress=shown).test == whole.test
    assert shown.lines[0] == "cut was cut before its first checkpoint, and begins anew"
    assert digest(in_tmp / "cut") == digest(in_tmp / "whole")
    assert rows(in_tmp / "cut", "exchange.jsonl") == rows(in_tmp / "whole", "exchange.jsonl")


def test_a_run_cut_before_its_first_checkpoint_takes_no_other_config(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commit, "publish", killed)
        with pytest.raises(Cut):
            mtl.train(config(tiny_config), "cut")
    written = (in_tmp / "cut" / "config.yaml").read_text()
    with pytest.raises(mtl.ConfigError, match=r"seed: 0 -> 1: that would be another run"):
        mtl.resume("cut", ["seed=1"])
    assert (in_tmp / "cut" / "config.yaml").read_text() == written
    shown = Lines()
    mtl.resume("cut", ["patience=9"], shown)
    assert "patience: None -> 9" in shown.lines


def test_a_run_that_ended_for_want_of_patience_is_finished(
    tiny_config: dict[str, Any], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(tiny_config, epochs=6, patience=1, optim={"lr": 1e-9})
    whole = mtl.train(given.replaced(patience=None), "whole")
    ended = mtl.train(given, "run")
    assert (ended.epochs, ended.best_epoch) == (2, 1)
    with monkeypatch.context() as patch:
        patch.setattr("mtl.resuming.composed", killed)
        shown = Lines()
        assert vars(mtl.resume("run", progress=shown)) == vars(ended)
        assert "patience=N waits for more" in shown.lines[0]
        assert (in_tmp / "run" / "result.json").is_file()
    assert mtl.resume("run", ["patience=9"]).epochs == 6
    assert digest(in_tmp / "run") == digest(in_tmp / "whole")
    assert (in_tmp / "run" / "result.json").is_file()
    assert whole.epochs == 6


def killed(*_: Any) -> None:
    """In place of what would have been done."""
    raise Cut


def test_weights_of_an_older_checkpoint_are_used_with_a_warning(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    result = mtl.train(config(tiny_config), "run")
    (committed(in_tmp / "run" / "checkpoints")[0] / BEST).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"best.safetensors has 1 bytes where .* were written; checkpoint-\d+ is used"):
        found = mtl.evaluate_run("run")
    assert set(found) == set(result.test or {})


def test_data_that_changed_are_refused(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    np.savez("v.npz", features=np.random.default_rng(0).normal(size=(60, 4)), kind=np.arange(60) % 3)
    given = mtl.RunConfig(
        tasks=[{"name": "kind", "task": "column_class", "dataset": "vectors"}],
        backbone={"name": "mlp", "widths": [4]},
        data={"root": ".", "validation": 6, "datasets": {"vectors": {"file": "v.npz"}}},
        epochs=2,
        batch_size=8,
        checkpoints={"every_steps": 1},
    )
    with cut_after(3):
        mtl.train(given, "run")
    np.savez("v.npz", features=np.random.default_rng(1).normal(size=(60, 4)), kind=np.arange(60) % 3)
    with pytest.raises(mtl.RunError, match=r"the data are not those that the run began with: vectors, train, vec"):
        mtl.resume("run")
    np.savez("v.npz", features=np.random.default_rng(0).normal(size=(60, 4)), kind=np.arange(60) % 3)
    assert mtl.resume("run").epochs == 2


def test_old_checkpoints_make_room_and_those_of_every_so_many_epochs_stay(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    mtl.train(config(tiny_config, epochs=4, checkpoints={"every_steps": 1, "keep": 3, "keep_every_epochs": 2}), "run")
    names = [folder.name.partition("-")[0] for folder in committed(in_tmp / "run" / "checkpoints")]
    assert names == ["epoch", "checkpoint", "checkpoint", "epoch"]
    assert not list((in_tmp / "run" / "checkpoints").glob("*.tmp*"))
    kept = [
        state_of(folder)["epoch"] for folder in committed(in_tmp / "run" / "checkpoints") if folder.name.startswith("epoch")
    ]
    assert kept == [4, 2]


def test_a_damaged_checkpoint_is_not_among_those_that_are_kept(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    with cut_after(4):
        mtl.train(config(tiny_config, checkpoints={"every_steps": 1}), "run")
    last, before = committed(in_tmp / "run" / "checkpoints")
    (last / MODEL).write_bytes(b"")
    with cut_after(4):
        mtl.resume("run")
    whole = [one["name"] for one in verify(in_tmp / "run") if not one["faults"]]
    assert len(whole) == 2
    assert whole[1] == before.name


@pytest.mark.usefixtures("ctrl_c")
def test_an_epoch_that_stays_does_so_where_training_is_told_to_stop(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    given = config(tiny_config, checkpoints={"every_seconds": 1000, "keep_every_epochs": 1})
    after = Keeper.after_epoch

    def told(keeper: Keeper) -> None:
        signal.raise_signal(signal.SIGTERM)
        after(keeper)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "after_epoch", told)
        with pytest.raises(SystemExit):
            mtl.train(given, "run")
    assert committed(in_tmp / "run" / "checkpoints")[0].name.startswith("epoch-")


def test_a_signal_after_another_process_had_one_is_not_the_second() -> None:
    interruption = Interruption()
    interruption.agree(signal.SIGTERM)
    interruption._note(signal.SIGTERM, None)
    with pytest.raises(SystemExit):
        interruption._note(signal.SIGTERM, None)


@pytest.mark.usefixtures("ctrl_c")
def test_a_pool_that_ends_its_processes_twice_lets_them_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "_of_a_pool", True)
    saved = []

    def save() -> None:
        with Interruption():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            saved.append(True)

    with pytest.raises(Terminated):
        save()
    assert saved


def test_the_best_weights_are_kept_in_mind_between_two_saves(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    """Epochs too short to save each: what is tested is still the best of all."""
    often = mtl.train(config(tiny_config, epochs=6, checkpoints={"every_steps": 1}), "often")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "_waited", lambda self, seconds: False)
        rarely = mtl.train(config(tiny_config, epochs=6, checkpoints={"every_seconds": 1000}), "rarely")
    assert (rarely.test, rarely.best_epoch) == (often.test, often.best_epoch)
    assert often.best_epoch < 6
    assert digest(in_tmp / "rarely") == digest(in_tmp / "often")


def test_two_processes_do_not_write_one_run(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    with cut_after(4):
        mtl.train(config(tiny_config), "run")
    with (
        Lock(in_tmp / "run"),
        pytest.raises(mtl.RunError, match=rf"'run' is in use by another process: process {os.getpid()} on"),
    ):
        mtl.resume("run")
    mtl.resume("run")


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_moment_is_raised_when_the_run_is_over(
    number: signal.Signals, tiny_config: dict[str, Any], in_tmp: Path
) -> None:
    whole = mtl.train(config(tiny_config), "whole")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "peak_memory", lambda device: signal.raise_signal(number))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            mtl.train(config(tiny_config), "run")
    shown = Lines()
    assert mtl.resume("run", progress=shown).test == whole.test
    assert any("is finished" in line for line in shown.lines)


@pytest.mark.usefixtures("ctrl_c")
def test_a_run_lets_go_of_its_directory_whatever_fails_at_its_end(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    def interrupted(decoders: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoders, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mtl.train(config(tiny_config), "run")
    Lock(Path("run")).close()
