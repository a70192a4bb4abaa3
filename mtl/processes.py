"""The processes of one training: one, or several that `torchrun` started, each with its share of every batch.

Tensors that are added up stay on their device (gloo on the CPU, NCCL on CUDA); everything else goes over gloo. Every method is
called by all processes at the same place, or all of them wait; a process that fails ends, and its death ends the others.
"""

from __future__ import annotations

import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from mtl.errors import MTLError, RunError
from mtl.memory import moved

T = TypeVar("T")

MEETING = 600.0
"""Seconds in which all processes of a training come: machines do not start at the same moment."""


class Processes(ABC):
    """What the processes of a training do together.

    Attributes:
        rank: of this one, from 0.
        count: how many there are.
        again: whether `torchrun` started them again, after one had died.
    """

    rank: int
    count: int
    again: bool = False

    @property
    def writes(self) -> bool:
        """Whether this process writes files and says something: the first does."""
        return self.rank == 0

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over processes, on the device, in all of them; gradients pass to this process's own part."""

    @abstractmethod
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give these the values that the first process has."""

    @abstractmethod
    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        """The largest of each place, on the host."""

    @abstractmethod
    def first(self, action: Callable[[], T]) -> T:
        """What `action` gives in the first process, alone in calling it; its error in the others, too."""

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, in the first process, tensors of several on the CPU; in the others an empty list."""

    @abstractmethod
    def in_turn(self, action: Callable[[], T]) -> T:
        """What `action` gives, called by the first process of the job, then by the first of each machine, then by the others:
        what it leaves on a disk is there for those that follow.
        """

    @abstractmethod
    def parallel(self, model: nn.Module, unused: Callable[[], bool]) -> nn.Module:
        """The model whose backward pass adds up the gradients over processes. `unused` finds out whether some of its parameters
        get no gradient.
        """

    @abstractmethod
    def no_sync(self, model: Any) -> AbstractContextManager[Any]:
        """A forward and backward pass of what `parallel` gave, whose gradients are not added up yet."""


class Alone(Processes):
    """One process."""

    rank, count = 0, 1

    def __init__(self, again: bool = False) -> None:
        self.again = again

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        return

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def first(self, action: Callable[[], T]) -> T:
        return action()

    def gather(self, value: T) -> list[T]:
        return [value]

    def in_turn(self, action: Callable[[], T]) -> T:
        return action()

    def parallel(self, model: nn.Module, unused: Callable[[], bool]) -> nn.Module:
        return model

    def no_sync(self, model: Any) -> AbstractContextManager[Any]:
        return nullcontext()


ALONE = Alone()


class Several(Processes):
    """The processes of torch's default group, which is there.

    Args:
        local_rank: of this process among those of its machine.
        again: whether this one knows that they were started again.
    """

    def __init__(self, local_rank: int, again: bool) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.local_rank = local_rank
        self.again = bool(self.all_reduce_max([again])[0])

    def all_reduce(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        _together(lambda: dist.all_reduce(total))
        return _Whole.apply(tensor, total) if tensor.requires_grad else total

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            _together(partial(dist.broadcast, tensor, 0))

    def all_reduce_max(self, values: Sequence[int]) -> list[int]:
        found = torch.tensor(values)
        _together(lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return [int(value) for value in found]

    def first(self, action: Callable[[], T]) -> T:
        said: list[Any] = [None, None]
        failed: BaseException | None = None
        if self.rank == 0:
            try:
                said = [action(), None]
            except MTLError as error:
                said, failed = [None, str(error)], error
        _together(lambda: dist.broadcast_object_list(said))
        if failed is not None:
            raise failed
        if said[1] is not None:
            raise RunError(f"the first process failed: {said[1]}")
        return said[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        found: list[Any] | None = [None] * self.count if self.rank == 0 else None
        here = moved(value, torch.device("cpu"))
        _together(lambda: dist.gather_object(here, found))
        return found or []

    def in_turn(self, action: Callable[[], T]) -> T:
        mine = 0 if self.rank == 0 else 1 if self.local_rank == 0 else 2
        found: list[T] = []
        failed: MTLError | None = None
        for turn in range(3):
            if turn == mine:
                try:
                    found.append(action())
                except MTLError as error:
                    failed = error
            [bad] = self.all_reduce_max([0 if failed is None else self.rank + 1])
            if failed is not None:
                raise failed
            if bad:
                raise RunError(f"process {bad - 1} of this training failed; see what it said")
        return found[0]

    def parallel(self, model: nn.Module, unused: Callable[[], bool]) -> nn.Module:
        device = next(model.parameters()).device
        devices = [device] if device.type == "cuda" else None
        made = DistributedDataParallel(model, device_ids=devices, find_unused_parameters=unused())
        made.register_comm_hook(None, lambda state, bucket: _add_up(bucket))
        return made

    def no_sync(self, model: Any) -> AbstractContextManager[Any]:
        assert isinstance(model, DistributedDataParallel)
        return model.no_sync()


class _Whole(torch.autograd.Function):
    """A sum over processes in place of this one's part, to which its gradient goes."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor) -> Tensor:
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _add_up(bucket: Any) -> torch.futures.Future[Tensor]:
    """The sum of the gradients, where DistributedDataParallel takes their mean: losses are divided by global counts already."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])


def _together(action: Callable[[], Any]) -> None:
    """Do what takes all processes.

    Raises:
        RunError: one of them is gone.
    """
    try:
        action()
    except RuntimeError as error:  # gloo and NCCL have no other type for it
        raise RunError(f"another process of this training is gone, or out of step: {str(error).splitlines()[0]}") from error


def _meet(backend: str) -> int:
    """Make the default group. How many such meetings there were in this job, with this one.

    What `torchrun` started again finds the store of the processes before it, with the addresses of the dead, and has no number
    that all machines agree on. So each meeting has keys of its own.
    """
    store, rank, count = next(rendezvous("env://"))
    number = _called(store, count) if rank == 0 else _answered(store, rank)
    own = dist.PrefixStore(f"meeting{number}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=own, rank=rank, world_size=count)
    return number


def _called(store: Any, count: int) -> int:
    """The first process calls a meeting, and begins it with the words of those that have come."""
    number = int(store.add("meetings", 1))
    answers = [f"meeting{number}/{rank}" for rank in range(1, count)]
    _wait_until(lambda: store.check(answers))
    store.set(f"meeting{number}/begins", b" ".join(store.get(one) for one in answers))
    return number


def _answered(store: Any, rank: int) -> int:
    """The others answer whatever meeting is called, until one begins with their word: another is of those before them."""
    word, answered = secrets.token_hex(8), 0

    def begins() -> bool:
        nonlocal answered
        if (number := int(store.add("meetings", 0))) > answered:
            store.set(f"meeting{number}/{rank}", word)
            answered = number
        key = f"meeting{answered}/begins"
        return bool(answered and store.check([key]) and word in store.get(key).decode().split())

    _wait_until(begins)
    return answered


def _wait_until(there: Callable[[], bool]) -> None:
    """Look again and again, so that signals are heard meanwhile.

    Raises:
        RuntimeError: not within `MEETING`.
    """
    until = time.monotonic() + MEETING
    while not there():
        if time.monotonic() > until:
            raise RuntimeError(f"not all processes of this training have come within {MEETING:.0f} s")
        time.sleep(0.02)


@contextmanager
def others_lost() -> Iterator[None]:
    """A block in which torch may find, in a backward pass, that another process is gone.

    Raises:
        RunError: it did.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "Connection closed")):
            raise
        raise RunError(f"another process of this training is gone: {str(error).splitlines()[0]}") from error


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that `torchrun` started, this one among them; alone where it did not, or where it started one.

    Args:
        device: that the training runs on; of several CUDA devices each process takes the one of its rank on its machine.

    Raises:
        RunError: the others cannot be reached.
    """
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        yield Alone(again)
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and device != "cpu":
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    else:
        backend = "gloo"
    ours, meetings = not dist.is_initialized(), list[int]()
    if ours:
        _together(lambda: meetings.append(_meet(backend)))
    yield Several(local_rank, again or any(number > 1 for number in meetings))
    if ours:
        dist.destroy_process_group()
