"""Warm start and freezing: towers begin exactly where they should, and what is frozen stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mtl
from mtl import build
from mtl.checkpoints import weights_file
from mtl.config import load


def trained(config: dict[str, Any], where: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train and give the best weights by name."""
    mtl.train(mtl.RunConfig(**{**config, "epochs": 1, **changes}), where)
    return load_file(weights_file(where))


def begun(config: dict[str, Any], where: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The weights of a run that is ready to begin."""
    return build.run(mtl.RunConfig(**{**config, **changes}), where).model.state_dict()


def under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["unshared", "hard_shared"])
def test_towers_start_from_single_task_runs_whatever_they_shared(tiny_config: dict[str, Any], in_tmp: Path, kind: str) -> None:
    """The whole tower and its head, buffers included; a task that is not named starts fresh."""
    source = trained(tiny_config, in_tmp / "a", tasks=["tiny_a"], sharing=kind)
    fresh = begun(tiny_config, in_tmp / "fresh", sharing="cross_stitch")
    warm = begun(tiny_config, in_tmp / "warm", sharing="cross_stitch", init_from={"tiny_a": "a"})
    prefix = "trunk." if kind == "hard_shared" else "towers.tiny_a."
    assert same(under("towers.tiny_a.", warm), under(prefix, source))
    assert same(under("heads.tiny_a.", warm), under("heads.tiny_a.", source))
    assert same(under("towers.tiny_b.", warm), under("towers.tiny_b.", fresh))
    assert not same(under("towers.tiny_a.", warm), under("towers.tiny_a.", fresh))


def test_a_tower_is_put_together_from_trunk_and_tower(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    source = trained(tiny_config, in_tmp / "split", sharing={"kind": "split", "at": "pool1"})
    warm = begun(tiny_config, in_tmp / "warm", init_from={"tiny_b": {"path": "split", "weights": "last"}})
    assert same(under("towers.tiny_b.", warm), {**under("trunk.", source), **under("towers.tiny_b.", source)})


def test_a_plain_file_of_weights_starts_a_tower_and_a_shared_trunk(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    """What belongs to a classifier that the backbone left out is ignored."""
    from torchvision.models import resnet18

    torch.manual_seed(1)
    network = resnet18(weights=None)
    save_file(network.state_dict(), in_tmp / "own.safetensors")
    expected = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    changes = {"backbone": "resnet18", "init_from": {"tiny_a": "own.safetensors"}}
    assert same(under("towers.tiny_a.", begun(tiny_config, in_tmp / "tower", **changes)), expected)
    assert same(under("trunk.", begun(tiny_config, in_tmp / "trunk", sharing="hard_shared", **changes)), expected)


def test_a_config_says_which_weights_were_meant(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    """The digest of the file, not its path, is part of the run's identity; another file under the path is refused."""
    trained(tiny_config, in_tmp / "a", tasks=["tiny_a"])
    trained(tiny_config, in_tmp / "other", tasks=["tiny_a"], seed=1)
    warm = {**tiny_config, "epochs": 1, "init_from": {"tiny_a": "a"}}
    first = mtl.train(mtl.RunConfig(**warm), in_tmp / "first")
    written = load(in_tmp / "first" / "config.yaml")
    assert written.init_from["tiny_a"].digest is not None
    (in_tmp / "a").rename(in_tmp / "moved")
    moved = mtl.train(mtl.RunConfig(**{**warm, "init_from": {"tiny_a": "moved"}}), in_tmp / "second")
    assert moved.config_digest == first.config_digest
    other = mtl.train(mtl.RunConfig(**{**warm, "init_from": {"tiny_a": "other"}}), in_tmp / "third")
    assert other.config_digest != first.config_digest
    assert mtl.evaluate_run(in_tmp / "first") == first.test  # needs the source no more
    (in_tmp / "other").rename(in_tmp / "a")
    with pytest.raises(mtl.ConfigError, match=r"init_from.tiny_a: .* has digest \w+, and the config was made for \w+"):
        mtl.train(written, in_tmp / "fourth")


def test_bad_starts_are_explained_before_anything_is_written(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    trained(tiny_config, in_tmp / "both")
    trained(tiny_config, in_tmp / "a", tasks=["tiny_a"])
    (in_tmp / "text.safetensors").write_text("no weights")
    wide = {"backbone": {"name": "small_cnn", "width": 0.2}}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"init_from": {"tiny_x": "a"}}, r"init_from: unknown task 'tiny_x'; known: tiny_a, tiny_b"),
        ({"init_from": {"tiny_a": "nowhere"}}, r"init_from.tiny_a: .*nowhere': no such file or run"),
        ({"init_from": {"tiny_a": "."}}, r"is not a run directory: it has no config.yaml"),
        ({"init_from": {"tiny_a": "text.safetensors"}}, r"text.safetensors' are damaged"),
        (
            {"init_from": {"tiny_a": "a"}, **wide},
            r"weights of another network: \d+ of another shape \(pool1.conv.weight, ...\)",
        ),
        (
            {"init_from": {"tiny_a": "a"}, "backbone": "resnet18"},
            r"another network: \d+ missing \(conv1.weight, ...\), \d+ unknown",
        ),
        ({"init_from": {"tiny_a": "a", "tiny_b": "both"}, "sharing": "hard_shared"}, r"share a trunk, .* found tiny_a, tiny_b"),
        (
            {"tasks": ["tiny_c"], "init_from": {"tiny_c": "both"}},
            r"unknown task 'tiny_c'; known: tiny_a.* \{path: ..., task: tiny_a\}",
        ),
    ]
    for changes, message in cases:
        with pytest.raises(mtl.MTLError, match=message):
            mtl.train(mtl.RunConfig(**{**tiny_config, **changes}), in_tmp / "run")
        assert not (in_tmp / "run").exists()


def test_what_is_frozen_stays_bit_for_bit_and_the_rest_learns(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    """Weights, biases and, where a batch norm is frozen whole, its running statistics."""
    changes = {"sharing": "cross_stitch", "optim": {"l2": 0.1, "freeze": ["towers.tiny_a", "towers.*.pool1.*", "units"]}}
    start = {name: value.clone() for name, value in begun(tiny_config, in_tmp / "start", **changes).items()}
    end = trained(tiny_config, in_tmp / "run", **changes)
    frozen = [n for n in end if n.startswith(("towers.tiny_a.", "towers.tiny_b.pool1.", "units."))]
    assert len(frozen) > 10
    assert all(torch.equal(start[name], end[name]) for name in frozen)
    learned = [n for n in end if n.startswith(("towers.tiny_b.pool2.", "heads.")) and "tracked" not in n]
    assert not any(torch.equal(start[name], end[name]) for name in learned)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("towers.tiny_aa", r"optim.freeze: unknown parameter 'towers.tiny_aa'; .* \(did you mean 'towers.tiny_a"),
        ("*", r"optim.freeze=\['\*'\] leaves nothing to train"),
    ],
)
def test_bad_patterns_are_explained(tiny_config: dict[str, Any], in_tmp: Path, freeze: str, message: str) -> None:
    with pytest.raises(mtl.ConfigError, match=message):
        mtl.train(mtl.RunConfig(**{**tiny_config, "optim": {"freeze": freeze}}), in_tmp / "run")


def test_frozen_exchange_at_the_identity_is_unshared(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    """The arm `cross_stitch_frozen`: the same losses, to rounding."""
    plain = mtl.train(mtl.RunConfig(**tiny_config), in_tmp / "plain")
    frozen = {**tiny_config, "sharing": "cross_stitch", "optim": {"freeze": "units"}}
    result = mtl.train(mtl.RunConfig(**frozen), in_tmp / "frozen")
    assert plain.val is not None
    assert result.val == plain.val
    assert result.parameters == plain.parameters


def test_a_run_of_another_task_and_a_runs_own_file(tiny_config: dict[str, Any], in_tmp: Path) -> None:
    source = trained(tiny_config, in_tmp / "a", tasks=["tiny_a"])
    with pytest.raises(
        mtl.ConfigError, match=r"unknown task 'tiny_b'; known: tiny_a.*; \{path: ..., task: tiny_a\} starts from"
    ):
        begun(tiny_config, in_tmp / "refused", init_from={"tiny_b": "a"})
    other = begun(tiny_config, in_tmp / "other", init_from={"tiny_b": {"path": "a", "task": "tiny_a"}})
    assert same(under("towers.tiny_b.", other), under("towers.tiny_a.", source))
    file = begun(tiny_config, in_tmp / "file", init_from={"tiny_a": str(weights_file(Path("a")))})
    assert same(under("heads.tiny_a.", file), under("heads.tiny_a.", source))
