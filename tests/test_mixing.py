"""The product of a cross-stitch unit: plain and compiled are the same function, with the same derivatives."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import mtl
from mtl import auto, build, mixing
from mtl.hardware import memory_kept
from mtl.mixing import mix

pytestmark = pytest.mark.usefixtures("in_tmp")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
LAYOUTS = {
    "channels last": lambda shape: torch.randn(shape).to(memory_format=torch.channels_last),
    "contiguous": lambda shape: torch.randn(shape),
    "sliced": lambda shape: torch.randn(shape[0], 2 * shape[1], *shape[2:])[:, ::2],
    "vectors": lambda shape: torch.randn(shape[:2]),
    "tokens": lambda shape: torch.randn(shape[0], shape[2], shape[1]).movedim(-1, 1),
}


def draw(tasks: int, layout: str = "channels last", dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Features (6, 4, ...) and alphas (T, T, 4), all of which want gradients."""
    torch.manual_seed(tasks)
    x = [LAYOUTS[layout]((6, 4, 3, 3)).to(dtype).requires_grad_() for _ in range(tasks)]
    wide = torch.promote_types(dtype, torch.float32)
    return x, torch.randn(tasks, tasks, 4, dtype=wide).requires_grad_()


def both(x: list[Tensor], alpha: Tensor, compiled: bool) -> list[Tensor]:
    """Mixed features, and the derivatives of alpha and of the features."""
    y = mix(x, alpha, compiled)
    return [*y, *torch.autograd.grad(y, [alpha, *x], gradients(y))]


def gradients(y: list[Tensor]) -> list[Tensor]:
    """Some, the same whatever the memory layout."""
    torch.manual_seed(0)
    return [torch.randn(one.shape, dtype=one.dtype) for one in y]


def by_hand(x: list[Tensor], alpha: Tensor) -> list[Tensor]:
    """The same by the paper's equation, for autograd to differentiate."""
    shape = (-1, *[1] * (x[0].ndim - 2))
    y = [sum((a.view(shape) * f for a, f in zip(row, x, strict=True)), torch.zeros_like(x[0])) for row in alpha]
    return [*y, *torch.autograd.grad(y, [alpha, *x], gradients(y))]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_plain_product_is_the_equation(tasks: int, layout: str) -> None:
    x, alpha = draw(tasks, layout)
    for ours, expected in zip(both(x, alpha, compiled=False), by_hand(x, alpha), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_what_follows_may_work_in_place(compiled: bool) -> None:
    x, alpha = draw(2)
    y = mix(x, alpha, compiled)
    expected = [one.detach().relu() for one in y]
    mixed = [torch.relu_(one) for one in y]
    assert all(torch.equal(a, b) for a, b in zip(mixed, expected, strict=True))
    torch.autograd.grad([one.sum() for one in mixed], [alpha, *x])


@needs_compiler
@pytest.mark.parametrize(("tasks", "dtype"), [(2, torch.float64), (3, torch.float32), (9, torch.float64)])
def test_compiled_is_plain(tasks: int, dtype: torch.dtype) -> None:
    """Nine towers come in blocks of three."""
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for layout in LAYOUTS if tasks == 2 else ["channels last"]:
        x, alpha = draw(tasks, layout, dtype)
        for ours, expected in zip(both(x, alpha, compiled=True), both(x, alpha, compiled=False), strict=True):
            torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
            assert ours.shape == expected.shape


@pytest.mark.parametrize(
    "form",
    [
        partial(mix, compiled=False),
        pytest.param(partial(mix, compiled=True), marks=needs_compiler, id="compiled"),
        pytest.param(torch.compile(partial(mix, compiled=False), backend="eager"), id="inside somebody else's"),
    ],
)
def test_bf16_features_do_not_round_alpha(form: Callable[[list[Tensor], Tensor], list[Tensor]]) -> None:
    """An alpha of 0.9985, which is 1 in bf16, scales the features by 0.9985 on average."""
    torch.manual_seed(0)
    x = [torch.randn(8192, 8).to(torch.bfloat16) for _ in range(2)]
    alpha = torch.tensor([[0.9985, 0.3], [0.3, 0.9985]])[:, :, None]
    assert alpha[0, 0].to(torch.bfloat16) == 1
    with torch.autocast("cpu", torch.bfloat16):
        mixed = form(x, alpha)
    assert mixed[0].dtype == torch.bfloat16
    exact = 0.9985 * x[0].double() + 0.3 * x[1].double()
    slope = (mixed[0].double() * exact).sum() / exact.square().sum()
    assert abs(slope - 1) < 3e-4


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_several_backward_passes_at_once(compiled: bool) -> None:
    """As gradient balancers ask for them: one row of gradients per task, by vmap."""
    x, alpha = draw(2)
    y = torch.stack([one.sum() for one in mix(x, alpha, compiled)])
    rows = torch.autograd.grad(y, [alpha, *x], torch.eye(2, dtype=y.dtype), is_grads_batched=True, retain_graph=True)
    for i in range(2):
        one = torch.autograd.grad(y[i], [alpha, *x], retain_graph=True)
        for together, alone in zip(rows, one, strict=True):
            torch.testing.assert_close(together[i], alone, rtol=1e-12, atol=1e-12)


@needs_compiler
def test_few_kernels_serve_all_layer_points_and_both_directions() -> None:
    """Compiling takes seconds a kernel, and each variant that torch.compile keeps is asked for its guards at every call."""
    mixing._kernel.cache_clear()
    graphs = counters["stats"]["unique_graphs"]
    for layout, shape in (("channels last", (8, 6, 5, 5)), ("channels last", (8, 10, 3, 3)), ("vectors", (8, 32))):
        x = [LAYOUTS[layout](shape).requires_grad_() for _ in range(2)]
        alpha = torch.randn(2, 2, 1 if layout == "vectors" else shape[1], requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = mix(x, alpha, compiled=True)
        torch.autograd.grad([one.sum() for one in y], [alpha, *x])
        with torch.no_grad():
            mix(x, alpha, compiled=True)
    assert counters["stats"]["unique_graphs"] - graphs == 2


def test_nothing_is_compiled_for_a_short_run() -> None:
    run = build.run(config(), None)
    run.tracker.close()
    assert run.config.compile == "none"
    assert run.warm_up_seconds == 0


@needs_compiler
def test_a_compiled_run_says_so_and_learns_the_same() -> None:
    results = {}
    for compile in ("none", "units"):
        run = build.run(config(compile=compile), None)
        assert run.config.compile == compile
        assert (run.warm_up_seconds > 0) == (compile != "none") == bool(run.notes)
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        if compile != "none":
            assert all(torch.equal(value, results["start"][name]) for name, value in before.items()), "warm-up left a trace"
        results["start"] = before
        from mtl.trainer import fit

        graphs = counters["stats"]["unique_graphs"]
        results[compile] = fit(run)
        assert counters["stats"]["unique_graphs"] == graphs, "something was compiled in the midst of training"
    a, b = (results[kind].val for kind in ("none", "units"))
    for task in ("shapes_kind", "shapes_size"):
        assert a[task]["loss"] == pytest.approx(b[task]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"execution": "batched"}, "towers run as one network"),
        (
            {"sharing": {"kind": "cross_stitch", "granularity": "dense", "points": ["fc3"]}},
            "no exchange unit has a compiled form",
        ),
        ({"sharing": "unshared"}, "no exchange unit"),
    ],
)
def test_nothing_is_said_to_be_compiled_that_is_not(keys: dict[str, object], why: str) -> None:
    run = build.run(config(compile="units", **keys), None)
    run.tracker.close()
    assert run.config.compile == "none"
    assert any(why in note for note in run.notes)


def test_what_fails_without_compiling_too_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(*_: object) -> None:
        raise mtl.DataError("image file 'x.png' cannot be read")

    monkeypatch.setattr(mixing, "compiled_mix", bad)
    with pytest.raises(mtl.DataError, match=r"x\.png"):
        build.run(config(compile="units"), None)


@pytest.mark.parametrize(("story", "said"), [(["no compiler\nlong story"], "RuntimeError: no compiler"), ([], "RuntimeError")])
def test_where_nothing_compiles_training_goes_on_and_says_why(
    monkeypatch: pytest.MonkeyPatch, story: list[str], said: str
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(*story)

    monkeypatch.setattr(mixing, "compiled_mix", broken)
    monkeypatch.setattr(auto, "WORTH_COMPILING", 0)
    run = build.run(config(), None)
    run.tracker.close()
    assert run.config.compile == "none"
    assert run.notes == [f"exchange units cannot be compiled here: {said}"]
    assert not any(unit.compiled for unit in run.model.exchange().values())
    with pytest.raises(mtl.ConfigError, match="compile=none trains without"):
        build.run(config(compile="units"), None)


def config(**keys: object) -> mtl.RunConfig:
    """Two small tasks that exchange."""
    data = {"validation": 20, "datasets": {"shapes": {"train": 120, "test": 20}}}
    return mtl.RunConfig(
        **{
            "tasks": ["shapes_kind", "shapes_size"],
            "backbone": {"name": "small_cnn", "width": 0.1},
            "sharing": "cross_stitch",
            "data": data,
            "epochs": 2,
            "batch_size": 50,
            "precision": "fp32",
            "device": "cpu",
            **keys,
        }
    )


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_and_given_back() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with memory_kept():
        with memory_kept():
            pass
        faults()
        kept = min(faults() for _ in range(3))  # something else may come to lie between
    usual = faults()
    assert kept < usual / 10
