"""The cross-stitch unit against equation 1, its special cases against each other, and its symmetries."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mtl
from mtl.cross_stitch import make_unit

GRANULARITIES = ("scalar", "channel", "dense")
SHAPES = ((3, 2, 2), (5,))


def features(tasks: int, shape: tuple[int, ...], batch: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for _ in range(tasks)]


def unit(tasks: int, shape: tuple[int, ...], granularity: str, randomised: bool = True) -> mtl.CrossStitchUnit:
    made = mtl.CrossStitchUnit(tasks, shape, granularity).double()
    if randomised:
        generator = torch.Generator().manual_seed(7)
        made.alpha.data += torch.randn(made.alpha.shape, generator=generator, dtype=torch.float64)
    return made


def test_equation_1_by_hand() -> None:
    """Alpha = [[0.9, 0.1], [0.2, 0.8]], x_A = [1, 2], x_B = [10, 20]."""
    stitch = mtl.CrossStitchUnit(2, (2,), "scalar")
    stitch.alpha.data = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    a, b = stitch([torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])])
    torch.testing.assert_close(a, torch.tensor([[0.9 * 1 + 0.1 * 10, 0.9 * 2 + 0.1 * 20]]))
    torch.testing.assert_close(b, torch.tensor([[0.2 * 1 + 0.8 * 10, 0.2 * 2 + 0.8 * 20]]))


def test_channel_alphas_by_hand() -> None:
    """Channel 0 is swapped between the tasks, channel 1 is left alone."""
    stitch = mtl.CrossStitchUnit(2, (2, 1, 1), "channel")
    stitch.alpha.data = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    a, b = stitch([torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)])
    assert a.flatten().tolist() == [3.0, 2.0]
    assert b.flatten().tolist() == [1.0, 4.0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 7])
def test_against_the_sum_written_out(tasks: int, shape: tuple[int, ...], granularity: str) -> None:
    stitch, x = unit(tasks, shape, granularity), features(tasks, shape)
    alpha = stitch.alpha.detach()
    for t, mixed in enumerate(stitch(x)):
        expected = torch.zeros_like(x[0])
        for s in range(tasks):
            if granularity == "dense":
                blocks = alpha.view(tasks, x[s][0].numel(), tasks, -1)
                expected += (x[s].flatten(1) @ blocks[t, :, s].T).view_as(x[0])
            else:
                expected += alpha[t, s].view(-1, *[1] * (len(shape) - 1)) * x[s]
        torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 7])
def test_identity_changes_nothing(tasks: int, granularity: str) -> None:
    stitch, x = unit(tasks, (3, 2, 2), granularity, randomised=False), features(tasks, (3, 2, 2))
    assert all(torch.equal(mixed, own) for mixed, own in zip(stitch(x), x, strict=True))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_permuting_tasks_commutes_with_stitching(shape: tuple[int, ...], granularity: str) -> None:
    stitch, x = unit(3, shape, granularity), features(3, shape)
    mixed = stitch(x)
    for order in itertools.permutations(range(3)):
        permuted = unit(3, shape, granularity)
        rows = list(order)
        alpha = stitch.alpha.detach()
        if granularity == "dense":
            size = len(alpha) // 3
            permuted.alpha.data = alpha.view(3, size, 3, size)[rows][:, :, rows].reshape(3 * size, 3 * size)
        else:
            permuted.alpha.data = alpha[rows][:, rows]
        for got, t in zip(permuted([x[t] for t in rows]), rows, strict=True):
            torch.testing.assert_close(got, mixed[t])


def test_coarser_units_are_special_cases_of_finer_ones() -> None:
    shape, tasks = (3, 2, 2), 3
    x = features(tasks, shape)
    scalar, channel, dense = (unit(tasks, shape, g, randomised=False) for g in GRANULARITIES)
    scalar.alpha.data = torch.randn(tasks, tasks, dtype=torch.float64)
    channel.alpha.data = scalar.alpha.data[:, :, None].repeat(1, 1, 3)
    dense.alpha.data = torch.kron(scalar.alpha.data, torch.eye(12, dtype=torch.float64))
    for a, b, c in zip(scalar(x), channel(x), dense(x), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
    channel.alpha.data = torch.randn(tasks, tasks, 3, dtype=torch.float64)
    blocks = [[channel.alpha.data[t, s].repeat_interleave(4).diag() for s in range(tasks)] for t in range(tasks)]
    dense.alpha.data = torch.cat([torch.cat(row, dim=1) for row in blocks])
    for b, c in zip(channel(x), dense(x), strict=True):
        torch.testing.assert_close(b, c)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_are_right(granularity: str) -> None:
    stitch, x = unit(2, (2, 2, 1), granularity), [f.requires_grad_() for f in features(2, (2, 2, 1), batch=3)]

    def run(alpha: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.func.functional_call(stitch, {"alpha": alpha}, (list(inputs),)))

    assert torch.autograd.gradcheck(run, (stitch.alpha, *x))


@given(same=st.floats(-2, 2), cross=st.floats(-2, 2), tasks=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_initial_values_and_coupling(same: float, cross: float, tasks: int) -> None:
    expected = torch.full((tasks, tasks), cross).fill_diagonal_(same)
    for granularity in GRANULARITIES:
        coupling = mtl.CrossStitchUnit(tasks, (2, 2, 2), granularity, same, cross).coupling()
        torch.testing.assert_close(coupling, expected.abs() if granularity == "dense" else expected)


def test_memory_layout_is_kept_where_it_matters() -> None:
    """Channels-last maps give the numbers that contiguous ones give."""
    stitch, x = unit(2, (3, 4, 4), "channel"), features(2, (3, 4, 4))
    last = [f.contiguous(memory_format=torch.channels_last) for f in x]
    for a, b in zip(stitch(x), stitch(last), strict=True):
        torch.testing.assert_close(a, b)


def test_dense_is_refused_before_it_is_allocated() -> None:
    """Two tasks of a million activations each: 64 TiB."""
    message = r"deep 2000000 x 2000000 \(59604.6 GiB\); 59604.6 GiB to train .* above sharing.dense_limit_gib=8"
    with pytest.raises(mtl.ConfigError, match=message):
        mtl.CrossStitch(granularity="dense").check(2, {"deep": (1000, 100, 10)})


def test_dense_estimate_of_the_reference_protocol() -> None:
    """12544, 6272 and 2048 squared: 200.9 M weights, 2.99 GiB with gradients and moments, all units together."""
    shapes = {"pool1": (32, 14, 14), "pool2": (64, 7, 7), "fc3": (1024,)}
    with pytest.raises(mtl.ConfigError, match=r"pool1 12544 x 12544 \(2\.3 GiB\), pool2 .*; 3\.0 GiB to train"):
        mtl.CrossStitch(granularity="dense", dense_limit_gib=2.9).check(2, shapes)
    mtl.CrossStitch(granularity="dense", dense_limit_gib=3.0).check(2, shapes)
    mtl.CrossStitch(granularity="channel", dense_limit_gib=0.001).check(2, shapes)
    assert make_unit(2, (8, 4, 4), mtl.CrossStitch(granularity="dense")).alpha.shape == (256, 256)


def test_maps_stay_in_channels_last_memory() -> None:
    for tasks in (2, 4):
        x = [f.contiguous(memory_format=torch.channels_last) for f in features(tasks, (8, 4, 4))]
        for granularity in ("scalar", "channel"):
            for mixed in unit(tasks, (8, 4, 4), granularity)(x):
                assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_what_is_kept_for_the_backward_pass_grows_with_the_tasks_not_their_square() -> None:
    """At most one full activation per tower is saved, up to the number of towers that are summed one by one."""
    x = [f.requires_grad_() for f in features(4, (8, 6, 6), batch=8)]
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() >= x[0].numel():
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unit(4, (8, 6, 6), "channel")(x)
    assert saved <= {f.data_ptr() for f in x}
