"""The README is the product's face: its tree, its code and its commands are held to the project."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from test_layers import RANK

import mtl

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


def test_the_python_snippets_run(in_tmp: Path) -> None:
    """The first as a program, the second beside it as the plugin it shows; what they register trains together."""
    program, plugins = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    Path("snippet.py").write_text(program)
    Path("plugins.py").write_text(plugins)
    Path("config.yaml").write_text(
        "{tasks: [digits_digit, digits_parity], backbone: tiny_net, sharing: average, balancer: worst_first, "
        "data: {validation: 0.1}, epochs: 1, device: cpu}"
    )
    files = ["--plugin", "snippet.py", "--plugin", "plugins.py"]
    command = [sys.executable, "-m", "mtl", "train", "config.yaml", *files, "--json", "--run-dir", "with_plugins"]
    trained = subprocess.run(command, capture_output=True, text=True, check=False)
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["sharing"] == "average"
    assert sorted(path.name for path in in_tmp.iterdir() if path.is_dir()) == ["with_plugins"]
    done = subprocess.run([sys.executable, "-W", "error", "snippet.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    score, run_dir = done.stdout.split()
    assert 0 <= float(score) <= 1
    assert (in_tmp / run_dir / "result.json").is_file()


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
        from benchmarks import three_epochs
    finally:
        sys.path.remove(str(ROOT))
    template = (ROOT / "benchmarks" / "README.template.md").read_text()
    assert (ROOT / "benchmarks" / "README.md").read_text() == template.replace("@THREE_EPOCHS@", three_epochs.render())
