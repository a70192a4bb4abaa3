"""Checkpoints as a reader finds them: beside a writer that removes old ones, with the newest lost, of a later version."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mtl
from mtl.checkpoints import BEST, MODEL, STATE, newest, read_weights_file, verify, weights_file
from mtl.commit import MANIFEST, POINTER, Content, commit, committed
from mtl.errors import LaterVersionError, NoCheckpointError
from mtl.strict_json import write_strict
from mtl.weights import read_weights, write_weights


def save(run: Path, number: int, keep: int = 2) -> None:
    """What a run would save after `number` steps, in little; its weights are that number."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
    weights = partial(write_weights, weights={"steps": torch.tensor(number)}, description={})
    state = {"format": 1, "epoch": 1, "steps": number, "best": None, "partial": None, "threads": 1}
    files: dict[str, Content] = {MODEL: weights, BEST: weights, STATE: write_strict(state)}
    commit(run / "checkpoints", f"checkpoint-{number:06d}", files, lambda name: int(name[-6:]) > number - keep)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_reader_beside_a_writer_that_removes_old_ones_finds_no_damage(keep: int, tmp_path: Path) -> None:
    save(tmp_path, 1, keep)
    over, wrong = threading.Event(), list[Any]()

    def read() -> None:
        before = 1
        try:
            while not over.is_set():
                wrong.extend(one for one in verify(tmp_path) if one["faults"])
                newest(tmp_path)
                state, _ = read_weights_file(tmp_path, "last", read_weights)
                assert int(state["steps"]) >= before
                before = int(state["steps"])
        except BaseException as error:
            wrong.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for one in readers:
        one.start()
    for number in range(2, 100):
        save(tmp_path, number, keep)
    over.set()
    for one in readers:
        one.join()
    assert wrong == []


def test_a_newest_checkpoint_that_is_lost_is_missed(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, number)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-000003")
    said = "checkpoint-000003 is not there, which last.json says is the newest"
    folder, wrong = newest(tmp_path)
    assert (folder.name, wrong) == ("checkpoint-000002", [said])
    assert verify(tmp_path)[-1] == {"name": POINTER, "about": "", "faults": [said]}
    with pytest.warns(UserWarning, match=f"{said}; checkpoint-000002 is used"):
        assert weights_file(tmp_path, "last") == folder / MODEL
    shutil.rmtree(folder)
    with pytest.raises(NoCheckpointError, match=f"holds no checkpoint: {said}"):
        newest(tmp_path)
    with pytest.raises(mtl.RunError, match=said):
        verify(tmp_path)


@pytest.mark.parametrize("pointer", [None, "checkpoint-000002"])
def test_a_pointer_that_a_crash_left_behind_is_no_fault(pointer: str | None, tmp_path: Path) -> None:
    save(tmp_path, 1)
    if pointer is not None:
        save(tmp_path, 2)
        save(tmp_path, 3)
        (tmp_path / "checkpoints" / POINTER).write_text(json.dumps({"newest": pointer}))
    else:
        (tmp_path / "checkpoints" / POINTER).unlink()
    folder, wrong = newest(tmp_path)
    assert (folder, wrong) == (committed(tmp_path / "checkpoints")[0], [])
    assert not any(one["faults"] for one in verify(tmp_path))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{"), lambda path: path.touch()])
def test_a_pointer_that_is_damaged_is_said_to_be_and_changes_nothing(damage: Callable[[Path], None], tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(tmp_path, number)
    pointer = tmp_path / "checkpoints" / POINTER
    pointer.write_text("")
    damage(pointer)
    folder, wrong = newest(tmp_path)
    assert folder.name == "checkpoint-000003"
    assert len(wrong) == 1
    assert POINTER in wrong[0]
    assert [bool(one["faults"]) for one in verify(tmp_path)] == [False, False, True]


def test_what_a_later_version_wrote_is_neither_used_nor_passed_over(tmp_path: Path) -> None:
    for number in (1, 2):
        save(tmp_path, number)
    manifest = tmp_path / "checkpoints" / "checkpoint-000002" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    said = "has format 2, and this version reads up to 1; use the version that wrote it"
    for read in (newest, weights_file):
        with pytest.raises(LaterVersionError, match=said):
            read(tmp_path)
    faults = {one["name"]: one["faults"] for one in verify(tmp_path)}
    assert said in faults["checkpoint-000002"][0]
    assert faults["checkpoint-000001"] == []
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 0'))
    folder, wrong = newest(tmp_path)
    assert (folder.name, len(wrong)) == ("checkpoint-000001", 1)
