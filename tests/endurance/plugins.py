"""Row 30: plugins that are broken, each in its own way, and as many tasks as anybody may want."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import mtl
from mtl.build import run
from mtl.checkpoints import folder_of, newest
from mtl.config import RunConfig
from mtl.trainer import train_step
from tests.endurance.rows import Cases, row

ROOT = Path(__file__).parents[2]
TASK = """
import mtl
@mtl.register_task("NAME")
def make():
    return mtl.Task("shapes", "kind", mtl.Classification(("a", "b")))
"""
KINDS = {
    "raises": (TASK + "1 / 0\n", "ZeroDivisionError: division by zero"),
    "exits": (TASK + "import sys\nsys.exit(0)\n", "SystemExit: 0"),
    "ends": (TASK + "raise BaseException('the end')\n", "BaseException: the end"),
    "twice": (TASK + TASK.replace("import mtl", ""), "is registered twice"),
    "binary": (b"\x7fELF\x00\x01\xff", "null bytes"),
    "words": ("this is no Python\n", "SyntaxError"),
    "imports": (TASK + "import mtl_tasks.fashion, no_such_module_of_ours\n", "no_such_module_of_ours"),
    "nothing": (
        "import mtl\n@mtl.register_task('NAME')\ndef make():\n    return 'a task'\n",
        "must give an mtl.Task; found str",
    ),
}
"""How a plugin is broken -> its text, in which NAME is its task, and what is said of it."""
BUILT_IN = ("small_cnn", "shapes_kind", "fashion_group")

CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = json.loads(sys.argv[2])
import mtl
from mtl.registry import BACKBONES, TASKS, load_plugin_file
from mtl.task import make_task
folder = Path(sys.argv[1])
def tried(name, action):
    try:
        found = action()
    except mtl.MTLError as error:
        print(json.dumps([name, "refused", str(error)]))
    except BaseException as error:
        print(json.dumps([name, "raised", repr(error)]))
    else:
        print(json.dumps([name, "given", str(found)]))
def others(when):
    tried(f"{when}: small_cnn", lambda: BACKBONES.get("small_cnn").name)
    for name in ("shapes_kind", "fashion_group", "good_file", "good_dist"):
        tried(f"{when}: {name}", lambda: make_task(name).name)
load_plugin_file(folder / "good_file.py")
for name in json.loads(sys.argv[3]):
    tried(f"file {name}", lambda: (load_plugin_file(folder / f"{name}_file.py"), make_task(f"{name}_file")))
    tried(f"dist {name}", lambda: make_task(f"{name}_dist"))
    others(f"after {name}")
for side in ("left", "right"):
    tried(f"file {side}", lambda: load_plugin_file(folder / f"{side}_file.py"))
tried("file rivals", lambda: TASKS.get("rival_file"))
tried("dist rivals", lambda: TASKS.get("rival_dist"))
others("after rivals")
tried("file shadow", lambda: load_plugin_file(folder / "shadow_file.py"))
tried("shadowed by a file", lambda: BACKBONES.get("mlp"))
tried("shadowed by a dist", lambda: TASKS.get("shapes_colour"))
others("after shadows")
tried("names", lambda: len(TASKS.names()))
"""

COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
sys.path[:0] = [sys.argv.pop(1)]
import mtl.registry
mtl.registry.SLOW = float(sys.argv.pop(1))
from mtl.cli import main
main()
"""


def write(file: Path, text: str | bytes, name: str) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.replace("NAME", name).encode())


def install(folder: Path, name: str, text: str | bytes, points: dict[str, str], version: str = "2.7") -> Path:
    """A distribution as pip lays it out, its module called like it: entry points of tasks by name. Returns its folder."""
    site = folder / f"site-{name}"
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text("[mtl.tasks]\n" + "".join(f"{key} = {name}:{to}\n" for key, to in points.items()))
    write(site / f"{name}.py", text, next(iter(points)))
    return site


def broken(cases: Cases, folder: Path, short: bool) -> None:
    """All broken plugins at once in one process: each is refused by its name, and nothing else is."""
    kinds = [*KINDS][:: 3 if short else 1]
    sites = [install(folder, "good_dist", TASK, {"good_dist": "make"})]
    write(folder / "good_file.py", TASK, "good_file")
    for name in kinds:
        write(folder / f"{name}_file.py", KINDS[name][0], f"{name}_file")
        sites.append(install(folder, f"broken_{name}", KINDS[name][0], {f"{name}_dist": "make"}))
    for side in ("left", "right"):
        write(folder / f"{side}_file.py", TASK, "rival_file")
        sites.append(install(folder, f"broken_{side}", TASK, {"rival_dist": "make"}))
    (folder / "shadow_file.py").write_text("import mtl\n@mtl.register_backbone('mlp')\ndef mine(input_shape): ...\n")
    sites.append(install(folder, "broken_shadow", TASK, {"shapes_colour": "make"}))
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps([str(site) for site in sites]), json.dumps(kinds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    cases.check("the child ends by itself", done.returncode == 0, done.stderr[-300:])
    found = {name: (how, said) for name, how, said in map(json.loads, done.stdout.splitlines())}

    def refused(name: str, *words: str) -> None:
        how, said = found.pop(name, ("not tried", ""))
        cases.check(name, how == "refused" and all(word in said for word in words), (how, said[:200]))

    for name in kinds:
        refused(f"file {name}", f"{name}_file.py", KINDS[name][1])
        refused(f"dist {name}", f"broken_{name} 2.7", KINDS[name][1])
    refused("file rivals", "left_file.py", "right_file.py", "'rival_file'")
    refused("dist rivals", "broken_left 2.7", "broken_right 2.7", "'rival_dist'")
    refused("shadowed by a file", "shadow_file.py", "crosstitch", "'mlp'")
    refused("shadowed by a dist", "broken_shadow 2.7", "crosstitch", "'shapes_colour'")
    for name, (how, said) in found.items():  # the others, and the built-ins
        cases.check(f"{name} goes on", how == "given", said[:200])


def commands(cases: Cases, folder: Path) -> None:
    """A broken file given to a command ends it with status 2 and one message, and a broken distribution does not."""
    site = str(install(folder, "broken_alone", KINDS["exits"][0], {"alone_dist": "make"}))
    write(folder / "alone_file.py", KINDS["exits"][0], "alone_file")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", COMMAND, site, "5", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    done = run("tasks", "--plugin", str(folder / "alone_file.py"))
    one = done.returncode == 2 and "Traceback" not in done.stderr
    cases.check("a file that exits: status 2, one message", one and "alone_file.py" in done.stderr, done.stderr[-300:])
    done = run("tasks")
    cases.check(
        "a distribution that exits: tasks are listed", done.returncode == 0 and "alone_dist" in done.stdout, done.stderr
    )
    done = run("tasks", "alone_dist")
    cases.check("asked for: status 2", done.returncode == 2 and "broken_alone 2.7" in done.stderr, done.stderr[-300:])


def slow(cases: Cases, folder: Path, short: bool) -> None:
    """A plugin that sleeps is named while it does, Ctrl-C works, and nobody waits for it who does not ask for it."""
    text = "import time\ntime.sleep(600)\n"
    write(folder / "slow_file.py", text, "slow_file")
    site = str(install(folder, "broken_slow", text, {"slow_dist": "make"}))
    after = 0.5 if short else 5.0
    for words, named in (
        (("tasks", "--plugin", str(folder / "slow_file.py")), "slow_file.py"),
        (("tasks", "slow_dist"), "broken_slow 2.7"),
    ):
        started = time.monotonic()
        command = [sys.executable, "-c", COMMAND, site, str(after), *words]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            watch = signal.signal(signal.SIGALRM, lambda *_: child.kill())
            signal.alarm(60)
            assert child.stderr is not None
            line = child.stderr.readline()
            took = time.monotonic() - started
            cases.check(f"{named}: it is said what is being loaded", named in line and took >= after, (took, line[:200]))
            asked = time.monotonic()
            os.kill(child.pid, signal.SIGINT)
            said = child.stderr.read()
            status = child.wait()
            signal.alarm(0)
            signal.signal(signal.SIGALRM, watch)
        ended = time.monotonic() - asked
        cases.check(f"{named}: Ctrl-C ends it", status == 130 and ended < 5 and "Traceback" not in said, (status, said[-200:]))
    command = [sys.executable, "-c", COMMAND, site, "5", "tasks"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    cases.check("a slow distribution does not hold up a list", "slow_dist" in listed.stdout, listed.stderr[-200:])


def config(count: int, **more: Any) -> RunConfig:
    """`count` tasks over one dataset."""
    return RunConfig(
        tasks=[{"name": f"task{i:04d}", "task": "row_many"} for i in range(count)],
        data={"validation": 8},
        backbone={"name": "mlp", "widths": [16, 16], "dropout": 0},
        **{"batch_size": 16, "max_steps": 1, "epochs": 1, "device": "cpu", "precision": "fp32", "compile": "none", **more},
    )


def register() -> None:
    @mtl.register_dataset("row_many")
    def many(split: mtl.Split, root: Path) -> mtl.ArrayDataset:
        random = np.random.default_rng(split == mtl.Split.TRAIN)
        return mtl.ArrayDataset(random.normal(size=(40, 8)).astype(np.float32), {"t": np.arange(40) % 4})

    mtl.register_task("row_many")(lambda: mtl.Task("row_many", "t", mtl.Classification(("a", "b", "c", "d"))))


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def linear(cases: Cases, name: str, sizes: dict[int, int], tolerance: float) -> float:
    """Whether sizes by N lie on a line; its slope."""
    counts = np.array([*sizes])
    slope, offset = np.polyfit(counts, [*sizes.values()], 1, w=1 / counts)
    off = {n: abs(size / (offset + slope * n) - 1) for n, size in sizes.items()}
    cases.check(f"{name} grows linearly", max(off.values()) < tolerance, (sizes, off))
    return float(slope)


def scales(cases: Cases, folder: Path, short: bool) -> None:
    """Build, one step, validation, test, and two checkpoints, with ever more tasks."""
    register()
    models: dict[int, int] = {}
    saved: dict[int, int] = {}
    peaks: dict[int, int] = {}
    head = 4 * (16 * 4 + 4)
    for count in (1, 10, 100) if short else (1, 10, 100, 1000):
        started = time.process_time()
        result = mtl.train(config(count, sharing="hard_shared"), folder / f"hard{count}")
        took = time.process_time() - started
        cases.check(f"hard_shared, {count} tasks: every task is scored", len(result.test or {}) == count + 1, result.test)
        cases.check(f"hard_shared, {count} tasks: within {max(10, count // 10)} s", took < max(10, count / 10), f"{took:.1f} s")
        models[count] = 4 * result.parameters
        saved[count] = bytes_of(newest(folder_of(folder / f"hard{count}").parent)[0])
        peaks[count] = result.peak_memory_bytes or 0
        shutil.rmtree(folder / f"hard{count}")
    cases.check("a task costs its head", all(size == models[1] + (n - 1) * head for n, size in models.items()), models)
    per_task = linear(cases, "a checkpoint", saved, 0.1)
    most = max(saved)
    cases.notes.append(
        f"hard_shared: {head / 1e6:.6f} MB of weights per task, {per_task / 1e6:.4f} MB of a checkpoint; N = {most}: "
        f"{took:.1f} s, {(peaks[most] - peaks[1]) / 1e6:.0f} MB more memory than N = 1"
    )
    for sharing in ("unshared", "cross_stitch"):
        towers: dict[int, int] = {}
        for count in (2, 10) if short else (2, 10, 100):
            made = run(config(count, sharing=sharing), folder / f"{sharing}{count}")
            made.model.train()
            train_step(made, next(iter(made.feed.epoch(1))))
            units = sum(p.numel() for unit in made.model.exchange().values() for p in unit.parameters())
            wanted = sum(count**2 * point.shape[0] for point in made.model.points if point.role == "exchange")
            cases.check(
                f"{sharing}, {count} tasks: a unit has T x T x C numbers, and no more", units == wanted, (units, wanted)
            )
            towers[count] = 4 * (sum(p.numel() for p in made.model.parameters()) - units)
            made.close()
        cases.check(f"{sharing}: a task costs its tower and head", len({n / t for t, n in towers.items()}) == 1, towers)


@row(30, "plugins are isolated and N scales")
def plugins_are_isolated(folder: Path, short: bool) -> Cases:
    cases = Cases()
    broken(cases, folder, short)
    if not short:
        commands(cases, folder)
    slow(cases, folder, short)
    scales(cases, folder, short)
    return cases
