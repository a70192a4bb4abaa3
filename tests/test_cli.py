"""The command line: what it prints where, its exit status, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from typer.testing import CliRunner

import mtl
from mtl import cli
from mtl.checkpoints import BEST, MODEL, STATE, TRAINING
from mtl.command import json_only
from mtl.commit import MANIFEST
from mtl.registry import DATASETS

EPOCHS = 8

PLUGIN = """
import numpy as np
import mtl

def images(n, side=8):
    return np.arange(n * side * side, dtype=np.uint8).reshape(n, 1, side, side)

def labels(n):
    return np.arange(n) % 2

@mtl.register_dataset("cli_fine")
def fine(split, root):
    return mtl.ArrayDataset(images(40), {"y": labels(40)})

@mtl.register_dataset("cli_range")
def out_of_range(split, root):
    return mtl.ArrayDataset(images(40), {"y": np.where(np.arange(40) == 7, 5, labels(40))})

@mtl.register_dataset("cli_nan")
def not_finite(split, root):
    return mtl.ArrayDataset(images(40), {"y": np.where(np.arange(40) == 7, np.nan, labels(40))})

@mtl.register_dataset("cli_empty")
def empty(split, root):
    n = 40 if split == "train" else 0
    return mtl.ArrayDataset(images(n), {"y": labels(n)})

@mtl.register_dataset("cli_ragged")
def ragged(split, root):
    return mtl.ArrayDataset([images(1, 8)[0], images(1, 9)[0]], {"y": [0, 1]})

@mtl.register_dataset("cli_resized")
def resized(split, root):
    return mtl.ArrayDataset(images(40, 8 if split == "train" else 12), {"y": labels(40)})

@mtl.register_dataset("cli_unseen")
def unseen(split, root):
    return mtl.ArrayDataset(images(40), {"y": labels(40) * (split == "test")})

@mtl.register_dataset("cli_raises")
def raises(split, root):
    raise FileNotFoundError("no archive")

@mtl.register_dataset("cli_config_error")
def config_error(split, root):
    raise mtl.ConfigError(["the archive wants a password"])

for kind in ("fine", "range", "nan", "empty", "ragged", "resized", "unseen", "raises", "config_error"):
    def task(dataset=f"cli_{kind}"):
        return mtl.Task(dataset, "y", mtl.Classification(("even", "odd")))
    mtl.register_task(f"cli_{kind}_task")(task)
"""


@dataclass(frozen=True)
class Outcome:
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.status == 0, self.err
        value = json.loads(self.out)  # refuses anything before or after the object
        assert isinstance(value, dict)
        return value


def command(*arguments: str | Path) -> Outcome:
    """Run `mtl ARGUMENTS...` in this process, through its real entry point."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["mtl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return Outcome(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def process(*arguments: str | Path, cwd: Path) -> Outcome:
    """Run `python -m mtl ARGUMENTS...` as its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "mtl", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def check_refused(outcome: Outcome, *parts: str) -> None:
    """Exit status 2; one message on standard error, no traceback; nothing on standard output."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("error: ") == 1
    for part in parts:
        assert part in outcome.err, outcome.err


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The file of a config that trains in a second, beside the folder that a test works in."""
    path = tmp_path / "configs" / "tiny.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin file whose datasets are wrong, each in its own way, and one that is not."""
    path = tmp_path_factory.mktemp("plugin") / "cli_tasks.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A run directory, and what training printed. It learns all there is, so that the best epoch is not the last."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "sharing": {"kind": "cross_stitch", "points": ["pool1", "fc3"]}}))
    outcome = command("train", path, "--run-dir", folder / "run", "--json", "seed=3", "optim.lr=0.01", f"epochs={EPOCHS}")
    assert outcome.json["best_epoch"] < EPOCHS, "weights of the best and the last epoch cannot be told apart"
    return folder / "run", outcome


# Training


def test_train_prints_one_json_object(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    result = outcome.json
    assert result["run_dir"] == str(folder)
    assert (result["epochs"], result["seed"], result["sharing"]) == (EPOCHS, 3, "cross_stitch")
    assert 1 <= result["best_epoch"] <= result["epochs"]
    assert result["seconds"] > 0
    assert result["images_per_second"] > 0
    assert result["parameters"] > 1000
    for split, n in (("val", 12), ("test", 24)):
        figures = result[split]
        assert list(figures) == ["tiny_a", "tiny_b", "score"]
        for task in ("tiny_a", "tiny_b"):
            assert figures[task]["n"] == n
            assert 0 <= figures[task]["accuracy"] <= 1
            assert figures[task]["loss"] > 0
        assert figures["score"] == pytest.approx((figures["tiny_a"]["accuracy"] + figures["tiny_b"]["accuracy"]) / 2)


def test_progress_goes_to_standard_error(trained: tuple[Path, Outcome]) -> None:
    first, *lines = trained[1].err.splitlines()
    assert first.startswith("cross_stitch: ")
    assert str(trained[0]) in first
    assert [line.split(" |")[0] for line in lines] == [f"epoch {i}/{EPOCHS}" for i in range(1, EPOCHS + 1)]


def test_run_directory_holds_what_was_promised(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    found = set(files(folder))
    [events] = [name for name in found if name.startswith("tb/")]
    assert (folder / events).stat().st_size > 0
    checkpoints = {name for name in found if name.startswith("checkpoints/checkpoint-")}
    assert {Path(name).name for name in checkpoints} == {MODEL, BEST, TRAINING, STATE, MANIFEST}
    rest = {"config.yaml", "env.json", "metrics.jsonl", "exchange.jsonl", "result.json", "checkpoints/last.json", ".lock"}
    assert found - {events} - checkpoints == rest
    assert json.loads((folder / "result.json").read_text()) == outcome.json
    env = json.loads((folder / "env.json").read_text())
    assert env["config_digest"] == outcome.json["config_digest"]
    assert env["versions"]["torch"]


def test_metrics_have_a_row_per_epoch_split_and_task(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(row["epoch"], row["split"], row["task"]) for row in rows]
    assert sorted(found) == [(e, s, t) for e in range(1, EPOCHS + 1) for s in ("train", "val") for t in ("tiny_a", "tiny_b")]
    best = {row["task"]: row for row in rows if row["split"] == "val" and row["epoch"] == outcome.json["best_epoch"]}
    for task, row in best.items():
        assert {key: row[key] for key in outcome.json["val"][task]} == outcome.json["val"][task]


def test_written_config_is_fully_resolved_and_can_be_trained_again(trained: tuple[Path, Outcome], cwd: Path) -> None:
    folder, outcome = trained
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert "auto" not in str(written)
    assert (written["device"], written["precision"], written["seed"]) == ("cpu", "fp32", 3)
    assert Path(written["data"]["root"]).is_absolute()
    again = command("train", folder / "config.yaml", "--run-dir", "again", "--json").json
    assert again["test"] == outcome.json["test"]
    assert again["config_digest"] == outcome.json["config_digest"]


def test_auto_is_written_as_what_it_became(config: Path, cwd: Path) -> None:
    result = command("train", config, "device=auto", "precision=auto", "epochs=1", "--run-dir", "run", "--json").json
    written = yaml.safe_load((cwd / "run" / "config.yaml").read_text())
    assert (written["device"], written["precision"]) == (result["device"], result["precision"])
    assert result["device"] in ("cpu", "cuda")
    assert result["precision"] in ("fp32", "bf16")


def test_train_without_json_prints_figures_for_people(config: Path, cwd: Path) -> None:
    outcome = command("train", config, "epochs=1")
    assert outcome.status == 0
    [folder] = (cwd / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text())
    for part in ("tiny_a", "tiny_b", "accuracy", f"{result['test']['score']:.4f}", str(folder.relative_to(cwd))):
        assert part in outcome.out
    assert not outcome.out.lstrip().startswith("{")


def test_default_run_directories_do_not_collide(config: Path, cwd: Path) -> None:
    folders = {command("train", config, "epochs=1", "--json").json["run_dir"] for _ in range(3)}
    assert len(folders) == 3
    assert all((cwd / folder / "result.json").is_file() for folder in folders)


def test_run_without_validation_takes_the_last_epoch(config: Path, cwd: Path) -> None:
    result = command("train", config, "data.validation=0", "--json", "--run-dir", "run").json
    assert result["val"] is None
    assert result["best_epoch"] == result["epochs"] == 2
    check_refused(command("evaluate", "run", "--split", "val"), "val")


def test_dry_run_leaves_no_files(config: Path, cwd: Path) -> None:
    about = command("train", config, "--dry-run", "--json", "sharing=cross_stitch").json
    assert list(cwd.rglob("*")) == []
    assert about["samples"] == {"train": {"tiny": 36}, "val": {"tiny": 12}, "test": {"tiny": 24}}
    assert about["input_shape"] == [1, 8, 8]
    assert [point["point"] for point in about["layer_points"]][:3] == ["pool1", "pool2", "fc3"]
    assert about["layer_points"][0]["shape"] == [3, 4, 4]
    assert about["parameters"] > about["parameters_exchange"] == 4 * (3 + 6 + 102)
    assert about["flops_forward_per_image"] > 0
    assert set(about["first_step_loss"]) == {"tiny_a", "tiny_b"}
    text = command("train", config, "--dry-run")
    assert yaml.safe_load(text.out)["input_shape"] == [1, 8, 8]
    assert list(cwd.rglob("*")) == []


def test_parameters_of_the_dry_run_are_those_of_the_run(trained: tuple[Path, Outcome], cwd: Path) -> None:
    folder, outcome = trained
    assert command("train", folder / "config.yaml", "--dry-run", "--json").json["parameters"] == outcome.json["parameters"]


# Evaluating


def test_evaluate_reproduces_the_test_figures(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    before = files(folder)
    figures = command("evaluate", folder, "--json").json
    assert (figures.pop("run_dir"), figures.pop("split"), figures.pop("weights")) == (str(folder), "test", "best")
    assert figures == json.loads((folder / "result.json").read_text())["test"] == outcome.json["test"]
    assert files(folder) == before


def test_evaluate_reproduces_the_validation_figures(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    figures = command("evaluate", folder, "--split", "val", "--json").json
    assert {key: figures[key] for key in outcome.json["val"]} == outcome.json["val"]


def test_evaluate_takes_the_last_weights_when_asked(trained: tuple[Path, Outcome]) -> None:
    folder, _ = trained
    figures = command("evaluate", folder, "--split", "val", "--weights", "last", "--json").json
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = {row["task"]: row for row in rows if row["split"] == "val" and row["epoch"] == EPOCHS}
    for task in ("tiny_a", "tiny_b"):
        assert figures[task]["loss"] == last[task]["loss"]


def test_evaluate_prints_a_table_for_people(trained: tuple[Path, Outcome]) -> None:
    outcome = command("evaluate", trained[0])
    assert outcome.status == 0
    assert all(part in outcome.out for part in ("tiny_a", "accuracy", f"{trained[1].json['test']['score']:.4f}"))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--split", "tset"], ("unknown split 'tset'", "train", "did you mean 'test'?")),
        (["--weights", "bset"], ("'bset'", "did you mean 'best'?")),
        (["--device", "gpu"], ("device", "'gpu'", "cpu")),
    ],
)
def test_evaluate_refuses_what_does_not_exist(trained: tuple[Path, Outcome], options: list[str], parts: Sequence[str]) -> None:
    check_refused(command("evaluate", trained[0], *options, "--json"), *parts)


def test_evaluate_refuses_what_is_no_run(tmp_path: Path) -> None:
    check_refused(command("evaluate", tmp_path), str(tmp_path), "config.yaml")
    check_refused(command("evaluate", tmp_path / "gone"), str(tmp_path / "gone"))


def test_evaluate_refuses_a_run_without_weights(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((trained[0] / "config.yaml").read_bytes())
    check_refused(command("evaluate", tmp_path), "no best weights", "has not finished its first epoch")
    shutil.copytree(trained[0] / "checkpoints", tmp_path / "checkpoints")
    for file in (tmp_path / "checkpoints").glob("*/best.safetensors"):
        file.write_bytes(b"not weights")
    check_refused(command("evaluate", tmp_path), "best.safetensors has 11 bytes", "damaged")


# Mistakes


def test_misspelt_key_and_task_are_named_at_once(config: Path, cwd: Path) -> None:
    outcome = command("train", config, "epohcs=3", "tasks=[tiny_a, tinyb]", "--json")
    check_refused(outcome, "'epohcs'", "did you mean 'epochs'", "'tinyb'", "did you mean 'tiny_b'", "2 problems", str(config))
    assert list(cwd.iterdir()) == []


def test_missing_config_names_those_there(config: Path, cwd: Path) -> None:
    check_refused(command("train", config.parent / "tinny.yaml"), "tinny.yaml", "No such file", "tiny.yaml")


def test_text_that_is_not_a_config(config: Path, cwd: Path) -> None:
    config.write_text("tasks: [tiny_a\n")
    check_refused(command("train", config), str(config))
    config.write_text("tiny_a\n")
    check_refused(command("train", config), str(config), "mapping")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("epochs", ("'epochs'", "key=value")),
        ("sharing={kind: cross_stitch, points: [pool9]}", ("unknown layer point 'pool9'", "pool1", "did you mean 'pool")),
        ("sharing={kind: split, at: pool9}", ("unknown layer point 'pool9'", "pool1", "did you mean 'pool")),
        ("sharing={kind: unshared, points: [pool9]}", ("unknown layer point 'pool9'", "pool1")),
        ("sharing={kind: cross_stitch, points: [pool2, pool1]}", ("pool1", "pool2", "order")),
        ("sharing={kind: cross_stitch, granularity: dense, dense_limit_gib: 1e-6}", ("dense", "48", "96 x 96", "channel")),
        ("data.validation=48", ("data.validation=48", "48 training images")),
        ("data.datasets={shapes: {train: 10}}", ("'shapes'", "tiny")),
        ("data.datasets={fashion_mnist: 3}", ("data.datasets", "fashion_mnist")),
        ("device=gpu", ("device", "'gpu'", "cpu")),
        ("backbone={name: small_cnn, width: 1000}", ("backbone.width", "1000")),
        ("optim={weight_decay: 0.1}", ("weight_decay", "adamw")),
    ],
)
@pytest.mark.parametrize("how", [["--json"], ["--dry-run"]])
def test_run_that_cannot_be_built_is_refused(
    config: Path, cwd: Path, how: list[str], override: str, parts: Sequence[str]
) -> None:
    check_refused(command("train", config, override, *how), *parts)
    assert list(cwd.iterdir()) == []  # nothing was begun


def test_dense_unit_that_fits_is_trained(config: Path, cwd: Path) -> None:
    result = command(
        "train", config, "sharing={kind: cross_stitch, points: [pool1], granularity: dense}", "epochs=1", "--json"
    ).json
    assert result["parameters"] > 96 * 96


@pytest.mark.parametrize("rate", ["1e30", "1e12"])
@pytest.mark.parametrize("steps", [1, 9])
def test_diverged_run_is_refused_wherever_it_shows(config: Path, cwd: Path, rate: str, steps: int) -> None:
    """In the losses of the epoch, or first in validation, after its last update."""
    outcome = command("train", config, "optim.name=sgd", f"optim.lr={rate}", f"max_steps={steps}", "--json")
    opening, *told, message = outcome.err.splitlines()  # training had begun, and said so
    assert opening.startswith("unshared: 2 tasks")
    assert all(" left out" in line for line in told)
    assert len(told) <= 2
    check_refused(Outcome(outcome.status, outcome.out, message), "not finite", "optim.lr")


def test_full_run_directory_is_left_untouched(config: Path, cwd: Path) -> None:
    (cwd / "run" / "checkpoints").mkdir(parents=True)
    (cwd / "run" / "checkpoints" / "best.safetensors").write_bytes(bytes(range(256)))
    (cwd / "run" / "config.yaml").write_text("mine: yes\n")
    before = files(cwd)
    check_refused(command("train", config, "--run-dir", "run"), "'run'", "not empty", "nothing was overwritten")
    assert files(cwd) == before
    check_refused(command("train", config, "sharing={kind: split, at: pool9}", "--run-dir", "run"), "not empty")  # said first
    (cwd / "file").write_text("mine")
    check_refused(command("train", config, "--run-dir", "file"), "'file'", "is a file")
    assert (cwd / "file").read_text() == "mine"


@pytest.mark.parametrize("left", [[], ["env.json"], ["env.json", "checkpoints/", ".config.yaml.77.tmp"]])
def test_run_directory_that_is_empty_or_was_never_finished_is_used(config: Path, cwd: Path, left: list[str]) -> None:
    (cwd / "run").mkdir()
    for name in left:
        (cwd / "run" / name).mkdir() if name.endswith("/") else (cwd / "run" / name).write_text("{")
    assert command("train", config, "epochs=1", "--run-dir", "run", "--json").json["run_dir"] == "run"
    assert (cwd / "run" / "result.json").is_file()


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("range", ("train split", "label 5 of sample", "out of range", "0 to 1")),
        ("nan", ("train split", "label nan of sample", "not finite")),
        ("empty", ("test split", "0 images")),
        ("ragged", ("train split", "differ in shape", "(1, 8, 8)", "(1, 9, 9)")),
        ("resized", ("splits differ in shape", "(1, 8, 8)", "(1, 12, 12)")),
        ("unseen", ("train", "never seen", "odd")),
        ("raises", ("train split", "FileNotFoundError: no archive")),
        ("config_error", ("train split", "the archive wants a password")),
    ],
)
def test_bad_data_is_refused_before_anything_is_written(
    config: Path, cwd: Path, plugin: Path, kind: str, parts: Sequence[str]
) -> None:
    outcome = command("train", config, f"tasks=[cli_{kind}_task]", "data.validation=8", "--plugin", plugin, "--json")
    check_refused(outcome, f"cli_{kind}", *parts)
    assert list(cwd.iterdir()) == []


def test_datasets_of_different_shapes_are_brought_to_one(config: Path, cwd: Path, plugin: Path) -> None:
    both = ("tasks=[cli_fine_task, shapes_kind]", "data.datasets.shapes.train=200", "data.datasets.shapes.test=20")
    outcome = command("train", config, *both, "data.validation=0.1", "--plugin", plugin)
    assert outcome.status == 0, outcome
    assert "images are brought to (3, 32, 32): cli_fine from (1, 8, 8)" in outcome.err
    wrong = command("train", config, *both, "data.validation=0.1", "--plugin", plugin, "data.input_shape=[1,8,8]")
    check_refused(wrong, "cannot be brought to 1 channels", "shapes (3, 32, 32)")


def test_plugin_that_cannot_be_loaded(config: Path, cwd: Path) -> None:
    check_refused(command("train", config, "--plugin", "gone.py"), "'gone.py'")
    (cwd / "bad.py").write_text("import no_such_module_xyz\n")
    for arguments in (("train", config), ("tasks", "--json"), ("backbones",), ("config", "schema"), ("evaluate", cwd)):
        check_refused(command(*arguments, "--plugin", "bad.py"), "bad.py", "no_such_module_xyz")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train"], "CONFIG.yaml"),
        (["train", "a.yaml", "--nonsense"], "--nonsense"),
        (["train", "a.yaml", "--run-dir"], "--run-dir"),
        (["trian"], "trian"),
        (["evaluate"], "RUN"),
        (["config", "shcema"], "shcema"),
        ([], "Commands"),
    ],
)
def test_wrong_usage(cwd: Path, arguments: list[str], part: str) -> None:
    outcome = command(*arguments)
    assert outcome.status == 2
    assert outcome.out == ""
    assert part in outcome.err
    assert "Traceback" not in outcome.err


def test_bug_of_ours_is_not_dressed_as_a_users_mistake(config: Path, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mtl.build.train", broken)
    monkeypatch.setattr(sys, "argv", ["mtl", "train", str(config)])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# Listings


def test_tasks_are_listed_with_their_origin() -> None:
    listed = {entry["name"]: entry["origin"] for entry in command("tasks", "--json").json["tasks"]}
    assert listed["tiny_a"].endswith("conftest.py")
    assert listed["fashion_category"].startswith("crosstitch ")
    assert {"fashion_group", "shapes_kind", "shapes_colour", "shapes_count", "shapes_size"} <= set(listed)
    lines = command("tasks").out.splitlines()
    assert {line.split()[0] for line in lines} == set(listed)


def test_plugin_file_adds_to_the_listing(plugin: Path) -> None:
    listed = {entry["name"]: entry["origin"] for entry in command("tasks", "--json", "--plugin", plugin).json["tasks"]}
    assert "cli_tasks.py" in listed["cli_fine_task"]


def test_one_task_is_shown() -> None:
    about = command("tasks", "tiny_c", "--json").json
    assert (about["name"], about["dataset"], about["target"], about["weight"]) == ("tiny_c", "tiny", "a", 0.5)
    assert about["classes"] == ["dark", "grey", "light"]
    assert [name for name, metric in about["metrics"].items() if metric["score"]] == ["accuracy"]
    assert yaml.safe_load(command("tasks", "tiny_c").out) == about
    check_refused(command("tasks", "tiny_d"), "unknown task 'tiny_d'", "did you mean 'tiny_")


def test_backbones_are_listed() -> None:
    listed = [entry["name"] for entry in command("backbones", "--json").json["backbones"]]
    assert {"small_cnn", "mlp", "resnet18"} <= set(listed)
    assert [line.split()[0] for line in command("backbones").out.splitlines()] == listed


def test_one_backbone_is_shown_with_its_layer_points() -> None:
    about = command("backbones", "small_cnn", "--input-shape", "1x28x28", "--json").json
    points = {point["name"]: point for point in about["points"]}
    assert [name for name in points if points[name]["default"]] == ["pool1", "pool2", "fc3"]
    assert points["pool1"] == {"name": "pool1", "channels": 32, "stride": 2.0, "shape": [32, 14, 14], "default": True}
    assert (points["pool2"]["shape"], points["pool2"]["stride"]) == ([64, 7, 7], 4.0)
    assert (points["fc3"]["shape"], points["fc3"]["stride"]) == ([1024], None)
    assert about["features"] == [1024]
    assert about["parameters"] == 9 * 32 + 9 * 32 * 64 + 49 * 64 * 1024 + 2 * (32 + 64 + 1024)
    table = command("backbones", "small_cnn", "--input-shape", "1x28x28").out
    assert all(part in table for part in ("pool1", "32x14x14", "pool2", "64x7x7", "fc3", "1024"))


@pytest.mark.parametrize("shape", ["1x8", "axbxc", "0x8x8", "-1x8x8", "", "1x2x3x4"])
def test_bad_input_shape_is_refused(shape: str) -> None:
    check_refused(command("backbones", "small_cnn", f"--input-shape={shape}"), repr(shape), "CxHxW")


def test_backbone_that_does_not_exist_or_fit() -> None:
    check_refused(command("backbones", "smallcnn"), "unknown backbone 'smallcnn'", "did you mean 'small_cnn'")
    check_refused(command("backbones", "small_cnn", "--input-shape", "128"), "small_cnn", "(128,)", "mlp")
    assert command("backbones", "mlp", "--input-shape", "128", "--json").json["features"] == [32]


def test_a_task_with_a_required_option_says_so(cwd: Path) -> None:
    (cwd / "own.py").write_text(
        'import mtl\nclass O(mtl.Options):\n    size: int\n    """Of it."""\n'
        "@mtl.register_task('needs', options=O)\ndef needs(options):\n    'A task.'\n    raise AssertionError\n"
    )
    about = command("tasks", "needs", "--plugin", "own.py", "--json").json
    assert about["options"] == {"size": {"about": "Of it.", "required": True}}
    assert "A task." in command("tasks", "needs", "--plugin", "own.py").out


def test_a_dataset_says_which_options_it_takes() -> None:
    assert [one["name"] for one in command("datasets", "--json").json["datasets"]] == DATASETS.names()
    about = command("datasets", "vggface2", "--json").json
    assert about["splits"] == ["train", "test"]
    assert about["options"]["size"]["default"] == [64, 64]
    assert about["options"]["images.file"]["required"] is True
    shown = command("datasets", "csv_images").out
    assert "file, required\n      The table, under the data root: CSV with a header." in shown
    assert command("datasets", "packed").out.startswith("packed (crosstitch")
    assert "takes no options" in command("datasets", "multi_fashion").out
    check_refused(command("datasets", "vggface"), "unknown dataset 'vggface'", "did you mean 'vggface2'")
    assert command("tasks", "column_number", "--json").json["options"]["unit"]["about"] == 'Of the numbers, as in "kg".'


def test_with_json_nothing_else_is_on_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    with json_only(True):
        print("printed")
        os.write(1, b"written\n")
        subprocess.run([sys.executable, "-c", "print('by another process')"], check=True)
    print("{}")
    said = capfd.readouterr()
    assert said.out == "{}\n"
    assert set(said.err.split("\n")) == {"printed", "written", "by another process", ""}


def test_with_json_what_libraries_in_c_keep_back_is_not_on_standard_output_either() -> None:
    program = (
        "import ctypes\nfrom mtl.command import json_only\nwith json_only(True): ctypes.CDLL(None).printf(b'C')\nprint('{}')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr) == ("{}\n", "C")


def test_config_schema_is_one_json_object() -> None:
    schema = command("config", "schema").json
    assert list(schema["properties"]) == list(mtl.RunConfig.model_fields)
    assert "tiny_a" in json.dumps(schema["$defs"]["task"])


def test_help_names_every_command() -> None:
    outcome = CliRunner().invoke(cli.app, ["--help"])
    assert outcome.exit_code == 0
    for name in ("train", "evaluate", "tasks", "backbones", "config"):
        assert f"\n  {name} " in outcome.output


# As a process


def test_help_is_quick_and_heavy_libraries_stay_out(cwd: Path) -> None:
    code = (
        "import sys, mtl.cli\n"
        "sys.argv = ['mtl', 'tasks', '--json']\n"
        "try: mtl.cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "sys.exit(str([m for m in ('torch', 'numpy', 'mtl_tasks') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "[]"
    assert json.loads(done.stdout)["tasks"]


def test_process_trains_and_evaluates_with_a_plugin(config: Path, cwd: Path, plugin: Path) -> None:
    """Nothing but the object on the real standard output, also from libraries; figures survive the process."""
    arguments = ("tasks=[cli_fine_task]", "data.validation=8", "epochs=1", "--run-dir", "run", "--json", "--plugin", plugin)
    result = process("train", config, *arguments, cwd=cwd).json
    assert sorted(path.name for path in cwd.iterdir()) == ["run"]
    figures = process("evaluate", "run", "--json", "--plugin", plugin, cwd=cwd).json
    assert {key: figures[key] for key in result["test"]} == result["test"]


def test_process_refuses_a_mistake(config: Path, cwd: Path) -> None:
    outcome = process("train", config, "tasks=[shapes_kindd]", "epohcs=3", "--json", cwd=cwd)
    check_refused(outcome, "'shapes_kindd'", "did you mean 'shapes_kind'", "'epohcs'", "did you mean 'epochs'")
    assert list(cwd.iterdir()) == []
