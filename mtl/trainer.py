"""Training: `fit`, which is all of a run's steps, epoch after epoch.

Nothing in the loop waits for the device: losses are added up where they are computed and come to the host once an epoch, or
when a line of progress is due.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import Tensor

from mtl.blame import blame
from mtl.data import Split
from mtl.errors import DivergedError
from mtl.evaluation import TaskFigures, evaluate, mean_score
from mtl.guard import EXPLODED, IN_A_ROW, LeftOut
from mtl.hardware import forget_peak_memory, memory_kept, peak_memory
from mtl.interruption import Interruption
from mtl.keeping import Keeper
from mtl.logs import PICTURES, Trained, beginning_lines, log_epoch, log_exchange, summary_line, tell_aside
from mtl.processes import others_lost
from mtl.run import Best, Partial, Run, RunResult, State
from mtl.seeding import seeded
from mtl.state import load_random
from mtl.step import seen_labels, train_step
from mtl.weights import load_state, weights_of, without_balancer
from mtl.writing import write_whole

REMEDY = "look whether its labels and its loss are sound, or try a new run with a lower optim.lr, or optim.clip_norm"


def fit(run: Run, state: State | None = None) -> RunResult:
    """Train a run to its end, write its files, and read the test split once, with the selected weights.

    Args:
        run: to train.
        state: where it stands, if it goes on.

    Raises:
        DivergedError: a loss is no longer finite. What was saved stays, as it does after Ctrl-C.
        RunError: it cannot be saved, or its logs cannot be written.
    """
    config, started = run.config, time.monotonic()
    state = state or State()
    forget_peak_memory(torch.device(config.device))
    with (
        run.progress,
        closing(run),
        seeded(config.seed, "training", *([run.processes.rank] if run.processes.rank else [])),
        memory_kept(),
        Interruption() as interruption,
        others_lost() if run.processes.count > 1 else nullcontext(),
    ):
        for line in beginning_lines(run):
            run.progress.line(line)
        keeper = Keeper(run, state, interruption)
        try:
            begin(run, state, keeper)
            while not finished(run, state):
                train_and_validate(run, state, keeper)
            keeper.save()
            assert state.best is not None
            load_state(run.model, without_balancer(state.best.weights))
            test, score = score_split(run, Split.TEST, interruption.check)
            check_finite(state, keeper, f"on the test split, with the weights of epoch {state.best.epoch}", losses_of(test))
        except (KeyboardInterrupt, SystemExit):
            where = "after the last epoch, before the test was over" if finished(run, state) else f"in epoch {state.epoch + 1}"
            run.progress.line(f"interrupted {where}; {keeper.newest}: mtl train --resume {run.directory}")
            raise
        tell_aside(run)
        result = result_of(run, state, time.monotonic() - started, {**test, "score": score} if test else None)
        if run.processes.writes:
            with keeper.writing("write result.json", run.directory):
                write_whole(run.directory / "result.json", json.dumps(vars(result), indent=2) + "\n")
    return result


def result_of(run: Run, state: State, seconds: float, test: dict[str, Any] | None) -> RunResult:
    """What a run that is over came to, in its last process by so many seconds of training and test, with these test figures."""
    config = run.config
    assert state.best is not None
    return RunResult(
        run_dir=str(run.directory),
        epochs=state.epoch,
        best_epoch=state.best.epoch,
        seconds=round(state.seconds + seconds, 3),
        images_per_second=round(state.images / state.training_seconds, 1),
        warm_up_seconds=round(run.warm_up_seconds, 3),
        training_seconds=round(state.training_seconds, 3),
        peak_memory_bytes=peak_memory(torch.device(config.device)),
        parameters=run.model.parameter_count(),
        parameters_frozen=sum(p.numel() for p in run.model.parameters() if not p.requires_grad),
        val=state.best.figures,
        test=test,
        sharing=config.sharing.kind,
        seed=config.seed,
        steps=state.steps,
        device=config.device,
        precision=config.precision,
        execution=config.execution,
        compile=config.compile,
        config_digest=config.digest(),
        set_aside=run.aside.counts(),
        steps_left_out=run.guard.skipped,
        processes=run.processes.count,
        images=state.images,
    )


def begin(run: Run, state: State, keeper: Keeper) -> None:
    """Log and save a run that is new, so that it can be resumed from its first step; put back the randomness of another."""
    if state.restored is not None:
        if state.random is not None:
            load_random(*state.random)
        state.random = None
    elif not state.steps:
        with keeper.writing("log the beginning", run.directory):
            log_exchange(run, state, pictures=True)
        keeper.save()


def finished(run: Run, state: State) -> bool:
    """Whether the last epoch or step is done, or the validation score has not risen for `patience` epochs."""
    config, best = run.config, state.best
    if state.partial is not None:
        return False
    scored = best.epoch if best is not None and best.figures else None
    done = state.epoch >= config.epochs or state.steps >= (config.max_steps or math.inf)
    return done or out_of_patience(config.patience, state.epoch, scored)


def out_of_patience(patience: int | None, epoch: int, best: int | None) -> bool:
    """Whether the epoch with the best validation score lies `patience` epochs back; None: there is none."""
    return patience is not None and best is not None and epoch - best >= patience


def train_and_validate(run: Run, state: State, keeper: Keeper) -> None:
    """One epoch: train, validate, log, keep the weights."""
    names = [task.name for task in run.model.tasks]
    before = run.guard.skipped if state.partial is None else state.partial.skipped_before

    def between() -> None:
        watch(run, state, keeper, before)
        keeper.between_steps()

    trained = train_epoch(run, state, between)
    watch(run, state, keeper, before)
    if (left_out := run.guard.skipped - before) > 1:
        run.progress.line(f"epoch {state.epoch + 1}: {left_out} steps were left out, for a loss or a gradient was not finite")
    epoch = state.epoch + 1
    check_finite(state, keeper, f"in training, in epoch {epoch}", dict(zip(names, trained.losses, strict=False)))
    figures, score = score_split(run, Split.VAL, keeper.stop_if_asked)
    check_finite(state, keeper, f"in validation, in epoch {epoch}", losses_of(figures))
    state.images += trained.images
    state.training_seconds += trained.seconds
    state.epoch += 1
    state.partial = None
    if state.best is None or score is None or score > state.best.score:  # without validation data the last epoch is the choice
        weights = {name: one.clone() for name, one in weights_of(run.model, run.balancer).items()}
        state.best = Best(state.epoch, None if score is None else {**figures, "score": score}, weights)
    with keeper.writing(f"log epoch {state.epoch}", run.directory):
        log_epoch(run, state, trained, figures, score)
        log_exchange(run, state, pictures=state.epoch % math.ceil(run.config.epochs / PICTURES) == 0 or finished(run, state))
    run.progress.line(summary_line(run, state.epoch, trained, figures, score))
    tell_aside(run)
    keeper.after_epoch()


def watch(run: Run, state: State, keeper: Keeper, before: int) -> None:
    """Tell of the first step that an epoch leaves out, and who it was; stop where they do not end.

    Args:
        run, state, keeper: of the training.
        before: steps left out before the epoch.

    Raises:
        DivergedError: too many in a row were left out, or all of an epoch, or a task's loss leaves nothing of the others', by
            name.
    """
    guard, part = run.guard, state.partial
    none_taken = part is not None and part.over and int(part.left_out) == part.images
    if guard.last is not None and (guard.in_a_row >= IN_A_ROW or none_taken):
        keeper.save_if_sound()
        raise DivergedError(
            f"{guard.in_a_row} steps in a row were left out, up to step {state.steps - guard.last.ago} in epoch "
            f"{state.epoch + 1}: {blamed(run, guard.last)}; {keeper.newest}; {REMEDY}"
        )
    if (left_out := guard.news()) is not None and guard.skipped == before + 1:
        run.progress.line(f"step {state.steps - left_out.ago} was left out: {blamed(run, left_out)}")
    if exploding := [task.name for task, n in zip(run.model.tasks, guard.exploding, strict=True) if n >= IN_A_ROW]:
        keeper.save_if_sound()
        raise DivergedError(
            f"the loss of {', '.join(exploding)} has been over {EXPLODED:.0e} times that of any other task for {IN_A_ROW} "
            f"steps, up to step {state.steps - guard.behind}, so that nothing is left of theirs in a sum; {keeper.newest}; "
            "in a new run, scale its labels or its loss, give it a lower weight, or try a lower optim.lr"
        )


def blamed(run: Run, left_out: LeftOut) -> str:
    """What every process finds in its share of a step."""
    return "; ".join(dict.fromkeys(run.processes.gather(blame(run, left_out))))


def nothing() -> None:
    """What is to be done between steps where nothing is."""


def train_epoch(run: Run, state: State, between: Callable[[], None] = nothing) -> Trained:
    """The epoch that `state` stands in, from where it stands, at most to the run's last step.

    Args:
        run: to train.
        state: its `partial` and `steps` are kept up.
        between: called after every step; its time does not count.
    """
    run.model.train()
    sums, none = torch.zeros(len(run.model.tasks) + 1, device=run.weights.device), [0] * len(run.model.tasks)
    part = state.partial = state.partial or Partial(sums, list[int | Tensor](none), skipped_before=run.guard.skipped)
    most = (run.config.max_steps or sys.maxsize) - state.steps
    total = min(part.steps + most, run.feed.steps_per_epoch)
    run.progress.begin(f"epoch {state.epoch + 1}/{run.config.epochs}", total)
    since = time.monotonic()
    for step in itertools.islice(run.feed.epoch(state.epoch + 1, part.steps), most):
        part.rates = {group["name"]: float(group["lr"]) for group in run.optimizer.param_groups}
        size = sum(batch.count for batches in step for batch in batches)
        of_step = train_step(run, step)
        counted = run.guard.counted
        part.losses += size * torch.where(torch.as_tensor(counted > 0), of_step, 0.0)
        part.labels = [a + counted * b for a, b in zip(part.labels, seen_labels(run, step), strict=True)]
        part.left_out = part.left_out + size * (1 - counted)
        part.images += size
        part.steps += 1
        state.steps += 1
        live = None
        if run.progress.due():
            live = {task.name: value for task, value in zip(run.model.tasks, part.means, strict=False)}
            live["images/s"] = part.images / (part.seconds + time.monotonic() - since)
            run.progress.shown()
        run.progress.step(part.steps, live)
        part.seconds += time.monotonic() - since
        between()
        since = time.monotonic()
    if not part.over:
        run.balancer.after_epoch()
        part.over = True
    run.guard.settle()
    run.processes.broadcast(run.model.buffers())  # batch norm's, of which each process has its own
    losses = part.means
    part.seconds += time.monotonic() - since  # until the device has done what it was given
    return Trained(part.images, part.seconds, losses, [int(n) for n in part.labels], part.rates)


def check_finite(state: State, keeper: Keeper, where: str, losses: Mapping[str, float | None]) -> None:
    """Complain about a loss that is not a number any more, naming the tasks."""
    if bad := [name for name, loss in losses.items() if loss is not None and not math.isfinite(loss)]:
        keeper.interruption.check()  # whoever trains another run after this one is to know of it
        keeper.save_if_sound()
        raise DivergedError(f"the loss of {', '.join(bad)} is not finite {where}; {keeper.newest}; {REMEDY}")


def losses_of(figures: Mapping[str, TaskFigures]) -> dict[str, float | None]:
    """Task -> its loss."""
    return {name: of_task["loss"] for name, of_task in figures.items()}


def score_split(run: Run, split: Split, between: Callable[[], None] = nothing) -> tuple[dict[str, TaskFigures], float | None]:
    """Each task's figures on a split, and the mean score; empty and None where there is no such split. None as well where a
    loss is not finite: a score then fails for that, and not for the data, of which `mean_score` complains.

    `between` is called after every batch.
    """
    several = run.processes.count > 1  # which stop together, and have not the same batches to stop after
    between = nothing if several else between
    figures = evaluate(run.model, run.samples[split], 2 * run.config.batch_size, run.autocast, between, run.processes)
    diverged = any(loss is not None and not math.isfinite(loss) for loss in losses_of(figures).values())
    return figures, None if diverged else mean_score(run.model.tasks, figures)
