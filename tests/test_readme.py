"""The README is the product's face: its tree, its code and its commands are held to the project."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from test_layers import RANK

import mtl
from mtl import cli
from mtl.config import load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_tree_names_every_module_with_its_rank() -> None:
    tree = README.split("```\nmtl/\n")[1].split("tasks/mtl_tasks/")[0]
    found, rank = {}, -1
    for line in tree.splitlines():
        match = re.fullmatch(r"\s*(\d+)?\s+(\w+)\.py\s{2,}\S.*", line)
        assert match, line
        rank = int(match[1]) if match[1] else rank
        found[match[2]] = rank
    assert found == RANK


def test_paths_in_the_readme_exist() -> None:
    for path in {*re.findall(r"\]\(([\w./]+)\)", README), *re.findall(r"examples/[\w/]+\.\w+", README)}:
        assert (ROOT / path).exists(), path


FEW = """
from PIL import Image


class CIFAR10:
    \"\"\"A stand-in for torchvision's, which is downloaded.\"\"\"

    classes = ["dark", "light"]

    def __init__(self, root, train=True, transform=None, download=False):
        self.targets, self.transform = [0, 1] * (32 if train else 8), transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        image = Image.new("RGB", (32, 32), (40 + 150 * self.targets[i],) * 3)
        return (self.transform(image) if self.transform else image), self.targets[i]
"""


def test_the_python_snippets_run(in_tmp: Path) -> None:
    """The first as a program, the others beside it as the plugins they show; what they register trains together."""
    comparing, program, pictures, torchs, heads, plugins, predicting = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    small = '["epochs=1", "backbone.width=0.1", "data.datasets.shapes={train: 200, test: 40}", "data.validation=20"]'
    Path("comparing.py").write_text(comparing.replace('["epochs=2"]', small).replace("examples/", f"{ROOT}/examples/"))
    done = subprocess.run([sys.executable, "comparing.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Compared with unshared, in points of the mean test score: whether cross_stitch (")
    shutil.rmtree("runs")
    Path("snippet.py").write_text(program)
    Path("pictures.py").write_text(pictures)
    for i in range(24):
        file = Path("data", "fruit", ("apple", "pear", "unsorted")[i % 3], f"{i}.{'png' if i % 4 else 'jpg'}")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + i, 30), (200 - 70 * (i % 3), 90, 40)).save(file)
    Path("heads.py").write_text(heads)
    Path("plugins.py").write_text(plugins)
    Path("config.yaml").write_text(
        "{tasks: [digits_digit, digits_parity, {name: digits_weighted, class_weights: balanced, weight: 0.5}, digits_rank, "
        "digits_value, digits_own], backbone: tiny_net, sharing: average, balancer: worst_first, data: {validation: 0.1}, "
        "epochs: 1, device: cpu}"
    )
    files = ["--plugin", "snippet.py", "--plugin", "heads.py", "--plugin", "plugins.py"]
    command = [sys.executable, "-m", "mtl", "train", "config.yaml", *files, "--json"]
    trained = subprocess.run([*command, "--run-dir", "one"], capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["sharing"] == "average"
    changed = [*command, "backbone=plain_net", "sharing={kind: cross_stitch, points: ['0']}", "--run-dir", "two"]
    trained = subprocess.run(changed, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    assert sorted(path.name for path in in_tmp.iterdir() if path.is_dir()) == ["data", "one", "two"]
    checked = subprocess.run(
        [sys.executable, "-m", "mtl", "check-plugin", "digits_own", *files], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    (config,) = re.findall(r"```yaml\n(tasks: \[fruit_kind\].*?)```", README, re.DOTALL)
    Path("fruit.yaml").write_text(config)
    of_files = ["fruit.yaml", "--plugin", "pictures.py", "epochs=1", "data.workers=1", "data.root=data", "--run-dir", "three"]
    trained = subprocess.run([*command[:4], *of_files], capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    Path("torchs.py").write_text(torchs.replace("torchvision.datasets", "few"))
    Path("few.py").write_text(FEW)
    Path("torchs.yaml").write_text("{tasks: [cifar10_kind], data: {validation: 0.1}}")
    of_torch = ["torchs.yaml", "--plugin", "torchs.py", "epochs=1", "data.workers=1", "--run-dir", "four"]
    trained = subprocess.run([*command[:4], *of_torch], capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    done = subprocess.run([sys.executable, "-W", "error", "snippet.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    score, run_dir = done.stdout.split()
    assert 0 <= float(score) <= 1
    assert (in_tmp / run_dir / "result.json").is_file()
    (in_tmp / run_dir).rename(in_tmp / "runs" / "digits")
    predicted = subprocess.run([sys.executable, "-W", "error", "-c", predicting], capture_output=True, text=True, check=False)
    assert predicted.stdout.strip() in ("even", "odd"), predicted.stderr


def test_the_mistakes_shown_are_those_reported(in_tmp: Path) -> None:
    shown = re.search(r"\$ mtl (train [^\n]* 'tasks=\[fashion_categry\]')\n(error: .*?)\n```", README, re.DOTALL)
    assert shown
    done = subprocess.run(
        [sys.executable, "-m", "mtl", *shlex.split(shown[1])], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == shown[2].strip()


COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line.removeprefix("$ ") for line in COMMANDS if line.startswith("$ mtl ")])
def test_commands_in_the_readme_are_legal(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command and option exists; each config with its overrides is valid."""
    monkeypatch.chdir(ROOT)
    name, *words = shlex.split(line, comments=True)[1:]
    command = typer.main.get_command(cli.app)
    assert isinstance(command, typer.core.TyperGroup)
    while isinstance(command, typer.core.TyperGroup):
        command = command.commands[name]
        if isinstance(command, typer.core.TyperGroup):
            name, *words = words
    context = command.make_context(name, list(words))
    if name == "train" and context.params["resume"] is None and not [word for word in words if "lrr" in word]:
        load(context.params["config"], context.params["overrides"] or [])
    elif name == "train" and context.params["resume"] is not None:
        changed = [context.params["config"], *(context.params["overrides"] or [])]
        load(ROOT / "examples" / "configs" / "fashion_two_task.yaml", [one for one in changed if one is not None])


def test_the_custom_task_example_is_short_and_learns(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ROOT / "examples" / "custom_task.py"
    assert len(source.read_text().splitlines()) < 40
    names = runpy.run_path(str(source))
    config = mtl.RunConfig(
        tasks=["stripes_direction", "stripes_fineness"],
        backbone={"name": "small_cnn", "width": 0.25},
        data={"validation": 0.1},
        epochs=4,
    )
    assert "stripes" in names
    result = mtl.train(config, in_tmp / "run")
    assert result.test is not None
    assert result.test["score"] > 0.6


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"@[A-Z_]{4,}@", README + (ROOT / "benchmarks" / "README.md").read_text())


def test_the_benchmark_page_is_what_its_results_render_to() -> None:
    pytest.importorskip("scipy")
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks import render, throughput_tables
    finally:
        sys.path.remove(str(ROOT))
    assert (ROOT / "benchmarks" / "README.md").read_text() == render.page()
    assert throughput_tables.headline() in " ".join(README.split())
