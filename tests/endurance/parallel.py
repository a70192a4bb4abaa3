"""Rows 27 and 28: several processes that train one run agree with one, and a dead one ends the job, or restarts it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mtl.checkpoints import folder_of
from mtl.commit import committed
from tests.endurance.rig import digest, tree, write_images
from tests.endurance.rows import Cases, row

LOSS = 1e-5
"""How much losses may differ, relative to one process: sums over other parts of a batch round otherwise."""
GONE = 30.0
"""Seconds in which all processes are gone after one has died."""


def environment() -> dict[str, str]:
    """One thread each, and this checkout."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tasks"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def torchrun(world: int, *arguments: object, restarts: int = 0) -> list[str]:
    """The command that starts so many processes on this machine."""
    launch = ["--standalone", f"--nproc-per-node={world}", f"--max-restarts={restarts}"]
    return [sys.executable, "-m", "torch.distributed.run", *launch, *map(str, arguments)]


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two trees differ: losses by more than `LOSS`, everything else at all."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [text for key in one for text in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [text for i, (a, b) in enumerate(zip(one, other, strict=True)) for text in differences(a, b, f"{where}.{i}")]
    if isinstance(one, float) and isinstance(other, float) and abs(one - other) <= LOSS * max(1.0, abs(one)):
        return []
    return [] if one == other else [f"{where}: {one} and {other}"]


@row(27, "uneven shards never hang, evaluation is exact")
def uneven(folder: Path, short: bool) -> Cases:
    cases = Cases()
    sizes = [1, 2, 3, 5, 6, 7, 17] if short else list(range(1, 18))
    program, text = Path(__file__).with_name("ranks.py"), ",".join(map(str, sizes))
    subprocess.run([sys.executable, program, folder / "alone.json", text], env=environment(), check=True, capture_output=True)
    alone = json.loads((folder / "alone.json").read_text())
    for world in (2,) if short else (1, 2, 3, 4):
        out, started = folder / f"{world}.json", time.monotonic()
        command = torchrun(world, program, out, text)
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600, check=False)
        seconds = time.monotonic() - started
        found = json.loads(out.read_text()) if out.exists() else {}
        for n in sizes:
            theirs = found.get(str(n), {"norm": done.stderr[-500:], "norm, read back": "nothing"})
            tested, read_back = theirs.pop("norm"), theirs.pop("norm, read back")
            wrong = differences({key: value for key, value in alone[str(n)].items() if "norm" not in key}, theirs)
            if tested != read_back:  # the weights that are tested are those that are saved
                wrong.append(f"with batch norm {tested} was tested, and {read_back} is in the checkpoint")
            cases.check(f"{world} processes, {n} samples", not wrong and "error" not in theirs, wrong[:3] or theirs)
        cases.notes.append(f"{world} processes: {seconds:.0f} s")
    return cases


@row(28, "a dead rank ends or restarts the job")
def dead(folder: Path, short: bool) -> Cases:
    cases, draw = Cases(), random.Random(0)
    write_images(folder)
    config = tree(folder)
    config["data"]["workers"] = 0
    (folder / "rig.yaml").write_text(yaml.safe_dump(config))

    def begun(command: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    def training(name: str, *more: str) -> list[object]:
        return ["-m", "mtl", "train", folder / "rig.yaml", *more, "--run-dir", folder / name]

    with begun(torchrun(2, *training("whole"))) as job:
        _, said = job.communicate(timeout=300)
    cases.check("two processes train", job.returncode == 0, errors(said))
    wanted = digest(folder / "whole")
    with begun(torchrun(2, *training("whole", "seed=99"), restarts=1)) as job:
        _, said = job.communicate(timeout=300)
    cases.check("another's run is refused, and again", job.returncode != 0 and "is not empty" in said, said[-300:])
    cases.check("another's run is as it was", digest(folder / "whole") == wanted, "other digits")
    slowest = 0.0
    for i in range(1 if short else 3):
        run, port = folder / f"machines{i}", free_port()
        jobs = [begun(of_two_machines(port, *training(run.name))) for _ in range(2)]
        ranks = children(jobs, run, draw.randrange(1, 10))
        os.kill(ranks[draw.randrange(2)], signal.SIGKILL)
        ended = [job.communicate(timeout=300)[1] for job in jobs]
        name = "two machines, one process killed and restarted"
        cases.check(name, not any(job.returncode for job in jobs), [errors(one) for one in ended])
        cases.check(f"{name}: to the last bit", digest(run) == wanted, "other digits")
    for i in range(0 if short else 20):
        restarts, rank = i % 2, draw.randrange(2)
        job = begun(torchrun(2, *training(f"run{i}"), restarts=restarts))
        ranks = children([job], folder / f"run{i}", draw.randrange(1, 10))
        os.kill(ranks[rank], signal.SIGKILL)
        killed = time.monotonic()
        others_gone = all_gone(ranks)
        slowest = max(slowest, time.monotonic() - killed)
        _, said = job.communicate(timeout=300)
        name = f"process {rank} killed, {restarts} restarts"
        cases.check(f"{name}: the others end", others_gone, f"not within {GONE:.0f} s")
        if restarts:
            cases.check(f"{name}: the job ends well", job.returncode == 0, errors(said))
        else:
            cases.check(f"{name}: the job ends", job.returncode != 0, errors(said))
            command = torchrun(2, "-m", "mtl", "train", "--resume", folder / f"run{i}")
            again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
            cases.check(f"{name}: it goes on", again.returncode == 0, errors(again.stderr))
        cases.check(f"{name}: to the last bit", digest(folder / f"run{i}") == wanted, "other digits")
    if not short:
        cases.notes.append(
            f"all gone after {slowest:.1f} s at the most; half of the jobs restarted by torchrun, half by --resume"
        )
    return cases


def of_two_machines(port: int, *arguments: object) -> list[str]:
    """The command that each of two machines gives, which are both this one, with a process each."""
    meet = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}"]
    return [sys.executable, "-m", "torch.distributed.run", *meet, *map(str, arguments)]


def free_port() -> int:
    """Of this machine."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def errors(said: str) -> str:
    """What a job says that matters."""
    return "; ".join(line for line in said.splitlines() if line.startswith(("error:", "RuntimeError", "TypeError", "OSError")))


def children(jobs: Sequence[subprocess.Popen[str]], run: Path, checkpoints: int) -> list[int]:
    """The processes of a job, started from one machine or several, by rank, once it has written so many checkpoints."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        names = [folder.name for folder in committed(folder_of(run))] if run.is_dir() else []
        if any(name >= f"checkpoint-{checkpoints:06d}" for name in names):
            break
        time.sleep(0.02)
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) not in [job.pid for job in jobs]:
                continue
            variables = dict(item.split("=", 1) for item in (folder / "environ").read_text().split("\0") if "=" in item)
        except (OSError, ValueError):
            continue
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return [found[rank] for rank in sorted(found)]


def all_gone(pids: list[int]) -> bool:
    """Whether these processes end in time."""
    until = time.monotonic() + GONE
    while any(running(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def running(pid: int) -> bool:
    """Whether a process does anything any more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
