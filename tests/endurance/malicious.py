"""Row 29: checkpoints and YAML that somebody made to do harm."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import mtl
from tests.endurance.rows import Cases, row

ROOT = Path(__file__).parents[2]
CONFIG = """
tasks: [{{name: kind, task: column_class, dataset: vectors}}]
backbone: {{name: mlp, widths: [4], dropout: 0}}
data: {{root: {root}, validation: 8, datasets: {{vectors: {{file: vectors.npz}}}}}}
device: cpu
precision: fp32
max_steps: 2
"""
PAYLOAD = """
import pathlib
def touch(*_):
    pathlib.Path(__file__).with_name("canary").touch()
class Touch:
    def __init__(self, *_):
        touch()
    __setstate__ = __init__
touch()
"""


class Touch:
    """Unpickled where that is let, it leaves the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


Files = dict[str, bytes | Callable[[Path], None]]
"""Name -> what takes a file's place in a checkpoint."""


def sealed(folder: Path, files: Files) -> None:
    """Put files into a checkpoint, and describe them in its manifest as they are: hashes prove no good will."""
    said = json.loads((folder / "manifest.json").read_text())
    for name, content in files.items():
        if callable(content):
            (folder / name).unlink()
            content(folder / name)
            said["files"][name] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        else:
            (folder / name).write_bytes(content)
            said["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(said))


def tensors(header: str | bytes, body: int = 16) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def one(begin: int = 0, end: int = 16, shape: str = "[2, 2]", dtype: str = "F32") -> str:
    """A tensor of a header."""
    return f'{{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [{begin}, {end}]}}'


def weights(canary: Path) -> dict[str, bytes]:
    """Files in the place of weights."""
    pickled, archive, npz = pickle.dumps(Touch(canary)), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
    np.savez(npz, x=np.array([Touch(canary)], dtype=object), allow_pickle=True)
    big = f'{{"x": {one()}, "__metadata__": {{"a": "{"b" * 40_000_000}"}}}}'
    return {
        "a pickle": pickled,
        "a zip as torch saves": archive.getvalue(),
        "an npz of objects": npz.getvalue(),
        "nothing": b"",
        "tensors that overlap": tensors(f'{{"x": {one()}, "y": {one(8, 24)}}}', 24),
        "two tensors at one place": tensors(f'{{"x": {one()}, "y": {one()}}}'),
        "a hole between tensors": tensors(f'{{"x": {one()}, "y": {one(32, 48)}}}', 48),
        "offsets beyond the end": tensors(f'{{"x": {one(0, 1 << 40)}}}'),
        "offsets below zero": tensors(f'{{"x": {one(-16, 0)}}}'),
        "offsets in reverse": tensors(f'{{"x": {one(16, 0)}}}'),
        "a shape of more than its bytes": tensors(f'{{"x": {one(shape="[1000000, 1000000]")}}}'),
        "a shape beyond all numbers": tensors(f'{{"x": {one(shape=f"[{1 << 63}, {1 << 63}]")}}}'),
        "an unknown type": tensors(f'{{"x": {one(dtype="O")}}}'),
        "a name that is there twice": tensors(f'{{"x": {one()}, "x": {one(shape="[4]")}}}'),
        "a key that is there twice": tensors(f'{{"__metadata__": {{"format": "1", "format": "2"}}, "x": {one()}}}'),
        "a header of 2^60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
        "a header beyond the end": struct.pack("<Q", 1000) + b"{}",
        "a header of 40 MB": tensors(big),
        "a header that is a pickle": tensors(pickled),
        "a header of 10,000 levels": tensors("[" * 10_000),
        "tensors of nobody": tensors(f'{{"x": {one()}}}'),
    }


def described(said: Any) -> bytes:
    """Weights of nothing, with a description of them."""
    about = {"format": "2", "description": said if isinstance(said, str) else json.dumps(said)}
    return tensors(json.dumps({"__metadata__": about, "x": json.loads(one())}))


def descriptions() -> dict[str, bytes]:
    """Weights whose description, which names heads, types and shapes, is hostile."""
    task = {"name": "kind", "dataset": "vectors", "target": "kind", "head": "Classification", "classes": ["0", "1"]}
    taken = {"shape": [3], "dtype": "float32"}
    return {
        "a description of 10,000 levels": described("[" * 10_000),
        "a description that is none": described([1, 2]),
        "a head without a name": described({"tasks": [{}], "input": taken}),
        "a head by its import path": described({"tasks": [{**task, "head": "os:system"}], "input": taken}),
        "classes that are a number": described({"tasks": [{**task, "classes": 5}], "input": taken}),
        "a function as a type": described({"tasks": [task], "input": {**taken, "dtype": "load"}}),
        "a sample of 10^10 numbers": described({"tasks": [task], "input": {**taken, "shape": [100_000, 100_000]}}),
        "a sample of a text": described({"tasks": [task], "input": {**taken, "shape": "3"}}),
    }


def states(good: Mapping[str, Any], canary: Path) -> dict[str, bytes]:
    """`state.json` as it should not be."""
    text = json.dumps(good)

    def changed(**values: Any) -> bytes:
        return json.dumps({**good, **values}).encode()

    numpy = good["random"]["numpy"]
    return {
        "a pickle": pickle.dumps(Touch(canary)),
        "NaN": changed(seconds=float("nan")),
        "infinity": changed(seconds=float("inf")),
        "1e999": text.replace("{", '{"more": 1e999, ', 1).encode(),
        "a key twice": text.replace("{", '{"epoch": 9, ', 1).encode(),
        "100,000 levels": text.replace("{", '{"more": ' + "[" * 100_000 + "]" * 100_000 + ", ", 1).encode(),
        "more than 8 MB": text.encode() + b" " * (8 << 20),
        "four million lists": text.replace("{", '{"more": [' + "[]," * 2_000_000 + "1], ", 1).encode(),
        "an integer of a million digits": text.replace("{", f'{{"more": {"9" * 1_000_000}, ', 1).encode(),
        "a list": b"[]",
        "steps that are a text": changed(steps="1"),
        "steps below zero": changed(steps=-1),
        "10^30 steps": changed(steps=10**30),
        "threads that are none": changed(threads=0),
        "a best epoch that is a list": changed(best=[1]),
        "another format": changed(format=2),
        "an optimizer of nobody": changed(groups=[{"name": "__class__"}]),
        "a schedule with methods": changed(schedule={**good["schedule"], "step": 1}),
        "a log of a text": changed(logs={"metrics": "a", "exchange": 0}),
        "a log of less than nothing": changed(logs={"metrics": -1, "exchange": 0}),
        "a balancer of a module": changed(balancer={"module": "os"}),
        "a generator beyond its end": changed(random={**good["random"], "numpy": [*numpy[:2], 10**9, *numpy[3:]]}),
        "a generator of words": changed(random={**good["random"], "python": [3, ["a"] * 625, None]}),
        "a generator of nothing": changed(random={}),
    }


def manifests(good: Mapping[str, Any]) -> dict[str, bytes]:
    """`manifest.json` as it should not be."""
    file = {"bytes": 1, "sha256": "0" * 64}

    def named(name: str, about: Any = file) -> bytes:
        return json.dumps({**good, "files": {**good["files"], name: about}}).encode()

    return {
        "a name that leads out": named("../../../../etc/passwd.json"),
        "an absolute name": named("/etc/passwd.json"),
        "a name with NUL": named("state.json\0"),
        "a size that is another": named("state.json", {**good["files"]["state.json"], "bytes": 1}),
        "a size that is a text": named("state.json", {"bytes": "1", "sha256": "0" * 64}),
        "a size of 10^300": named("state.json", {"bytes": 10**300, "sha256": "0" * 64}),
        "a hash that is a list": named("state.json", {"bytes": 1, "sha256": []}),
        "a file that is a list": named("state.json", []),
        "a file that is not there": named("more.json"),
        "a later format": json.dumps({**good, "format": 99}).encode(),
        "a key twice": json.dumps(good).replace("{", '{"format": 1, ', 1).encode(),
        "100,000 levels": b"[" * 100_000,
        "more than 1 MB": json.dumps(good).encode() + b" " * (1 << 20),
        "a pickle": pickle.dumps({}),
    }


def documents(good: str, canary: Path) -> dict[str, tuple[str | bytes, str]]:
    """YAML that should not be read, and a word of why."""
    call = f"['touch {canary}']"
    laughs = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    named = {f"k{i}": i for i in range(60_000)}
    return {
        "a call of os.system": (f"{good}seed: !!python/object/apply:os.system {call}\n", "tags are not read"),
        "a call of a module's own": (f"{good}seed: !!python/object/apply:payload.touch []\n", "tags are not read"),
        "an object": (f"{good}seed: !!python/object:payload.Touch {{}}\n", "tags are not read"),
        "a new object": (f"{good}seed: !!python/object/new:payload.Touch {{state: 1}}\n", "tags are not read"),
        "a function's name": (f"{good}seed: !!python/name:os.system ''\n", "tags are not read"),
        "a module": (f"{good}seed: !!python/module:payload ''\n", "tags are not read"),
        "a tag behind a handle": (
            f"%TAG !p! tag:yaml.org,2002:python/\n---\n{good}seed: !p!name:os.system ''\n",
            "tags are not",
        ),
        "a tag of its own": (f"{good}seed: !touch {canary}\n", "tags are not read"),
        "bytes": (f"{good}seed: !!binary aGVsbG8=\n", "tags are not read"),
        "a set": (f"{good}init_from: !!set {{a, b}}\n", "tags are not read"),
        "an alias": (f"{good}seed: &a 1\nepochs: *a\n", "anchors and aliases"),
        "a billion laughs": (good + laughs, "anchors and aliases"),
        "a list within itself": (f"{good}init_from: &a [*a]\n", "anchors and aliases"),
        "a merge": (f"{good}<<: {{seed: 1}}\n", "'<<'"),
        "100,000 levels of lists": (f"{good}init_from: {'[' * 100_000}", "20 levels"),
        "400 levels of mappings": (good + "".join(" " * i + "a:\n" for i in range(400)), "20 levels"),
        "a list of 200,000": (f"{good}init_from: [{'a,' * 200_000}]", "20,000 keys and values"),
        "60,000 keys": (good + yaml_of(named), "20,000 keys and values"),
        "a key twice": (f"{good}seed: 1\nseed: 2\n", "'seed' is given twice"),
        "a key twice, within": (good.replace("name: mlp", "name: mlp, name: small_cnn"), "'name' is given twice"),
        "a key that nobody knows": (f"{good}sede: 1\n", "did you mean 'seed'?"),
        "the key self": (f"{good}self: 1\n", "unknown key 'self'"),
        "dunder keys": (f"{good}__class__: 1\n", "unknown key '__class__'"),
        "a key that is a list": (f"{good}? [a, b]\n: 1\n", "unhashable key"),
        "a key that is a number": (f"{good}1: 2\n", "is not a string"),
        "more than 1 MB": (good + "#" * (1 << 20), "1,048,576 bytes"),
        "two documents": (f"{good}---\n{good}", "single document"),
        "a number in base 60 of 900 kB": (f"{good}seed: 1{':1' * 450_000}\n", "64 characters"),
        "a fraction in base 60": (f"{good}optim: {{lr: 1{':1' * 300}.5}}\n", "64 characters"),
        "an integer of 900,000 hexadecimal digits": (f"{good}seed: 0x{'f' * 900_000}\n", "64 characters"),
        "an integer of 900,000 digits": (f"{good}seed: {'9' * 900_000}\n", "64 characters"),
        "a day that is none": (f"{good}seed: 2001-99-99\n", "month"),
        "infinity": (f"{good}optim: {{lr: .inf}}\n", "optim.lr"),
        "a text of 900,000 escapes": (f'{good}device: "{chr(92) + "x41"}{(chr(92) + "x41") * 225_000}"\n', "device"),
        "a task by its import path": (good.replace("task: column_class", "task: 'os:system'"), "unknown task"),
        "a backbone by its path": (good.replace("name: mlp", "name: ../../payload.py"), "unknown backbone"),
        "a plugin of its own": (f"{good}plugin: payload.py\n", "unknown key 'plugin'"),
        "a pickle": (pickle.dumps(Touch(canary)), "UTF-8"),
        "NUL": (f"{good}seed: \0\n", "special characters"),
        "UTF-16": (good.encode("utf-16"), "UTF-8"),
        "a list in the place of keys": ("- tasks\n", "a mapping of keys"),
        "nothing": ("", "empty"),
    }


def yaml_of(named: Mapping[str, int]) -> str:
    return "".join(f"{key}: {value}\n" for key, value in named.items())


def arrays(canary: Path) -> dict[str, bytes]:
    """Files of vectors with what must be unpickled to be read."""
    made = {}
    touch = np.array([Touch(canary)] * 40, dtype=object)
    plain = {"features": np.zeros((40, 3)), "kind": np.arange(40) % 2}
    for name in plain:
        stream = io.BytesIO()
        np.savez(stream, **{**plain, name: touch}, allow_pickle=True)
        made[f"{name} of objects"] = stream.getvalue()
    made["a pickle"] = pickle.dumps(Touch(canary))
    made["a zip of a pickle"] = weights(canary)["a zip as torch saves"]
    return made


class Rig:
    """A run that is whole, and copies of it in which something is hostile, with the commands that read them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        self.hostile: dict[str, list[str]] = {}
        self.words: dict[str, str] = {}
        (folder / "payload.py").write_text(PAYLOAD)
        random = np.random.default_rng(0)
        np.savez(folder / "vectors.npz", features=random.normal(size=(60, 3)).astype(np.float32), kind=np.arange(60) % 2)
        np.save(folder / "some.npy", random.normal(size=(3, 3)).astype(np.float32))
        self.config = CONFIG.format(root=folder).lstrip()
        (folder / "good.yaml").write_text(self.config)
        self.run = folder / "run"
        mtl.train(mtl.load_config(folder / "good.yaml"), self.run)
        (self.run / "result.json").rename(folder / "result.json")
        checkpoints = sorted((self.run / "checkpoints").glob("*-*"))
        for older in checkpoints[:-1]:
            shutil.rmtree(older)
        self.checkpoint = checkpoints[-1]

    def commands(self, run: Path, number: int = 0) -> dict[str, list[str]]:
        """What reads a run."""
        new = str(self.folder / f"new{number}")
        return {
            "resume": ["train", "--resume", str(run)],
            "evaluate": ["evaluate", str(run), "--device", "cpu"],
            "predict": ["predict", str(run), str(self.folder / "some.npy"), "--device", "cpu"],
            "init_from": ["train", str(self.folder / "good.yaml"), f"init_from.kind={run}", "--run-dir", new],
            "verify": ["checkpoint", "verify", str(run)],
        }

    def good(self) -> list[list[str]]:
        """Every command on a run that is as it should be, `resume` last since it changes it."""
        copy = self.copied("good")
        commands = self.commands(copy)
        plan = ["compare", str(self.folder / "good.yaml"), "--arms", "unshared", "--dry-run"]
        return [plan, *(commands[key] for key in ("evaluate", "predict", "init_from", "verify", "resume"))]

    def copied(self, name: str) -> Path:
        made = self.folder / name
        shutil.copytree(self.run, made)
        return made

    def case(self, name: str, command: list[str], word: str = "") -> None:
        self.hostile[name], self.words[name] = command, word

    def cases(self, name: str, change: Callable[[Path], None], entries: tuple[str, ...], word: str = "") -> None:
        """A copy of the run in which `change` changed the checkpoint, for each of these commands."""
        number = len(self.hostile)
        run = self.copied(f"copy{number}")
        change(run / "checkpoints" / self.checkpoint.name)
        for entry in entries:
            self.case(f"{entry}: {name}", self.commands(run, number)[entry], word)


EVERY = ("resume", "evaluate", "predict", "init_from", "verify")


def fill(rig: Rig, short: bool) -> None:
    """Every hostile thing for everything that reads it; in the short form a part of them."""
    step = 20 if short else 1
    for i, (name, (text, word)) in enumerate(documents(rig.config, rig.canary).items()):
        data = text if isinstance(text, bytes) else text.encode()
        file = rig.folder / f"{i}.yaml"
        file.write_bytes(data)
        if not short or i % 4 == 0:
            rig.case(f"config: {name}", ["train", str(file), "--run-dir", str(rig.folder / f"of{i}")], word)
        if i % step:
            continue
        run = rig.copied(f"yaml{i}")
        (run / "config.yaml").write_bytes(data)
        for entry in ("resume", "evaluate"):
            rig.case(f"{entry}: config.yaml with {name}", rig.commands(run)[entry], word)
        if "unknown" not in word and "'" not in word and word not in ("optim.lr", "device"):  # predict reads what it needs
            rig.case(f"predict: config.yaml with {name}", rig.commands(run)["predict"], word)
    (rig.folder / "arms.yaml").write_text(f"[unshared, !!python/object/apply:os.system ['touch {rig.canary}']]")
    base = str(rig.folder / "good.yaml")
    rig.case("compare: arms with a call", ["compare", base, "--arms", str(rig.folder / "arms.yaml")], "tags are not read")
    rig.case("override: a call", ["train", base, f"seed=!!python/object/apply:os.system ['touch {rig.canary}']"], "tags are")
    for name, data in [*weights(rig.canary).items()][:: 9 if short else 1]:
        files = dict.fromkeys(("model.safetensors", "best.safetensors", "training.safetensors"), data)
        entries = EVERY[:-1] if name == "tensors of nobody" else EVERY
        rig.cases(f"in place of weights {name}", lambda at, files=files: sealed(at, files), entries)  # type: ignore[misc]
        plain = rig.folder / f"plain{len(rig.hostile)}.safetensors"
        plain.write_bytes(data)
        new = str(rig.folder / f"new-{plain.stem}")
        rig.case(f"init_from: a file that is {name}", ["train", base, f"init_from.kind={plain}", "--run-dir", new])
        files = {"training.safetensors": data}
        rig.cases(f"in place of moments {name}", lambda at, files=files: sealed(at, files), ("resume",))  # type: ignore[misc]
    for name, data in [*descriptions().items()][:: 5 if short else 1]:
        files = {"model.safetensors": data, "best.safetensors": data}
        rig.cases(f"weights with {name}", lambda at, files=files: sealed(at, files), EVERY[:-1])  # type: ignore[misc]
    state = json.loads((rig.checkpoint / "state.json").read_text())
    for i, (name, data) in enumerate(states(state, rig.canary).items()):
        if i % (8 if short else 1) == 0:
            own = ("resume", "verify", "evaluate") if i < 15 and name != "four million lists" else ("resume",)
            files = {"state.json": data}
            rig.cases(f"a state of {name}", lambda at, files=files: sealed(at, files), own)  # type: ignore[misc]
    manifest = json.loads((rig.checkpoint / "manifest.json").read_text())
    for name, data in [*manifests(manifest).items()][:: 7 if short else 1]:
        entries = ("resume", "verify") if name == "a file that is not there" else EVERY
        rig.cases(f"a manifest with {name}", lambda at, data=data: replace(at / "manifest.json", data), entries)  # type: ignore[misc]
    rig.cases("a pipe as weights", lambda at: sealed(at, dict.fromkeys(WEIGHTS, os.mkfifo)), EVERY, "is no file")
    rig.cases("a pipe as a manifest", lambda at: pipe(at / "manifest.json"), EVERY, "is no file")
    rig.cases("a device as weights", lambda at: sealed(at, dict.fromkeys(WEIGHTS, zeros)), EVERY, "is no file")
    for name, data in arrays(rig.canary).items():
        (rig.folder / f"{len(rig.hostile)}.npz").write_bytes(data)
        own = [f"data.datasets.vectors.file={len(rig.hostile)}.npz", "--run-dir", str(rig.folder / f"npz{len(rig.hostile)}")]
        rig.case(f"vectors: {name}", ["train", base, *own], "cannot read")
        if name != "kind of objects":  # which prediction does not read
            rig.case(f"predict: {name}", ["predict", str(rig.run), str(rig.folder / own[0].partition("=")[2])])


WEIGHTS = ("model.safetensors", "best.safetensors")


def replace(file: Path, data: bytes) -> None:
    file.write_bytes(data)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


@row(29, "malicious checkpoint and YAML are inert")
def malice_is_inert(folder: Path, short: bool) -> Cases:
    cases, rig = Cases(), Rig(folder)
    call = documents("", rig.canary)["a call of os.system"][0]
    assert isinstance(call, str)
    for kind, data in {"pickle": pickle.dumps(Touch(rig.canary)), "yaml": call.encode()}.items():
        (folder / f"control.{kind}").write_bytes(data)
        rig.case(f"control {kind}", ["control", kind, str(folder / f"control.{kind}")])
    good = rig.good()
    fill(rig, short)
    (folder / "cases.json").write_text(json.dumps({"good": good, "hostile": rig.hostile}))
    command = [sys.executable, "-m", "tests.endurance.trap", str(folder / "cases.json"), str(rig.canary)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    cases.check("the child ends by itself", done.returncode == 0, done.stderr[-500:])
    found = {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}
    for name, word in rig.words.items():
        if (one := found.get(name)) is None:
            cases.check(name, False, "it was not tried")
        elif name.startswith("control"):
            cases.check(f"{name}: the trap shuts", one["canary"] and "os.system" in str(one["seen"]), one)
        else:
            ended = one["ended"] == ("faults" if name.startswith("verify") else "refused")
            cheap = one["seconds"] < 2 and one["megabytes"] < 500
            cases.check(name, ended and word in one["said"] and cheap and not one["seen"] and not one["canary"], one)
    slowest, largest = (max(one[key] for one in found.values()) for key in ("seconds", "megabytes"))
    cases.notes.append(f"slowest {slowest:.2f} s, at most {largest:.0f} MB more memory")
    return cases
