"""Feature vectors in a file: what is in it is data, never run, and rows keep their split."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mtl_tasks import vectors
from safetensors.torch import save_file

import mtl
from mtl import build
from mtl.build import load_data, make_tasks
from mtl.config import RunConfig
from mtl.data import Samples, Split

ROOT = Path(__file__).parent.parent


def arrays(count: int = 60) -> dict[str, Any]:
    random = np.random.default_rng(0)
    kind = np.arange(count) % 3
    return {
        "features": random.normal(size=(count, 8)) + kind[:, None],
        "kind": np.array(["a", "b", "c"])[kind],
        "code": np.where(np.arange(count) % 5 == 0, -1, kind),
        "size": np.where(np.arange(count) % 7 == 0, np.nan, kind / 2),
        "person": np.arange(count) // 4,
    }


def config(root: Path, tasks: Any = ("kind", "code", "size"), **options: Any) -> RunConfig:
    task = {"kind": "column_class", "code": "column_class", "size": "column_number"}
    return RunConfig(
        tasks=[{"name": name, "task": task[name], "dataset": "vectors"} for name in tasks],
        backbone={"name": "mlp", "widths": [8]},
        data={"root": root, "validation": 0.2, "datasets": {"vectors": {"file": "v.npz", "test": 0.3, **options}}},
        epochs=1,
        batch_size=8,
        device="cpu",
        precision="fp32",
    )


def load(config: RunConfig) -> dict[Split, Samples]:
    return {split: parts["vectors"] for split, parts in load_data(config, make_tasks(config)).items() if parts}


def known(part: Samples, task: str) -> list[bool]:
    mask = part.valid[task]
    return [True] * len(part) if mask is None else mask.tolist()


def test_labels_of_every_kind(tmp_path: Path, in_tmp: Path) -> None:
    given = arrays()
    np.savez(tmp_path / "v.npz", **given)
    found = load(config(tmp_path, group="person"))
    assert found[Split.TRAIN].classes == {"kind": ("a", "b", "c"), "code": ("0", "1", "2")}
    rows = {tuple(row): i for i, row in enumerate(given["features"].astype(np.float32).tolist())}
    people = {}
    for split, part in found.items():
        index = [rows[tuple(row)] for row in part.images.tolist()]
        people[split] = {int(given["person"][i]) for i in index}
        assert part.targets["kind"].tolist() == [i % 3 for i in index]
        assert known(part, "code") == [i % 5 > 0 for i in index]
        assert known(part, "size") == [i % 7 > 0 for i in index]
    assert sum(map(len, people.values())) == len(set().union(*people.values())) == 15
    result = mtl.train(config(tmp_path), "run")
    assert set(result.test) == {"kind", "code", "size", "score"}


def test_safetensors_say_the_same(tmp_path: Path) -> None:
    given = {name: value for name, value in arrays().items() if name != "kind"}
    np.savez(tmp_path / "v.npz", **given)
    save_file({name: torch.as_tensor(value) for name, value in given.items()}, tmp_path / "v.safetensors")
    one, other = (load(config(tmp_path, ["code", "size"], file=file)) for file in ("v.npz", "v.safetensors"))
    for split, part in one.items():
        assert torch.equal(part.images, other[split].images)
        assert all(torch.equal(part.targets[name], other[split].targets[name]) for name in ("code", "size"))


@pytest.mark.parametrize("values", [["train", "val", "test"], [0, 1, 2]])
def test_an_array_may_say_the_split(tmp_path: Path, values: list[Any]) -> None:
    given = arrays()
    np.savez(tmp_path / "v.npz", **given, split=np.array(values)[np.arange(60) % 3])
    found = load(config(tmp_path, ["kind"], split="split"))
    rows = given["features"].astype(np.float32)
    for i, split in enumerate(Split):
        assert sorted(map(tuple, found[split].images.tolist())) == sorted(map(tuple, rows[i::3].tolist()))
    np.savez(tmp_path / "v.npz", **given, split=np.array(["train", "other"])[np.arange(60) % 2])
    with pytest.raises(mtl.DataError, match="'split' must hold train, val, test or 0, 1, 2; found 'other'"):
        load(config(tmp_path, ["kind"], split="split"))


def test_what_is_appended_moves_nothing(tmp_path: Path) -> None:
    longer = arrays(90)
    np.savez(tmp_path / "v.npz", **{name: value[:60] for name, value in longer.items()})
    before = {tuple(row) for row in load(config(tmp_path))[Split.TEST].images.tolist()}
    np.savez(tmp_path / "v.npz", **longer)
    assert before < {tuple(row) for row in load(config(tmp_path))[Split.TEST].images.tolist()}


def test_whole_numbers_of_any_type_are_classes_where_their_names_are_given(tmp_path: Path) -> None:
    given = arrays()
    code = given["code"].astype(np.float64)
    code[0] = np.nan
    np.savez(tmp_path / "v.npz", **{**given, "code": code})
    with pytest.raises(mtl.DataError, match=r"names none for this target: .* in the dataset's options where it has `classes`"):
        load(config(tmp_path))
    parts = load(config(tmp_path, classes={"code": ["x", "y", "z"]}))
    assert parts[Split.TRAIN].classes["code"] == ("x", "y", "z")
    assert sum(known(part, "code").count(False) for part in parts.values()) == 12
    np.savez(tmp_path / "v.npz", **{**given, "code": code + 0.5})
    with pytest.raises(mtl.DataError, match=r"'code': its 3 classes are 0 to 2, and not all of its numbers are"):
        load(config(tmp_path, classes={"code": ["x", "y", "z"]}))
    with pytest.raises(mtl.DataError, match="classes of cood, no target; there are code"):
        load(config(tmp_path, classes={"cood": ["x"]}))


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/mtl-was-here"),))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"there is no file '.*v.npz'"),
        ("text", r"cannot read '.*v.npz', which must be .npz or .safetensors: File is not a zip"),
        ("pickle", r"cannot read '.*v.npz'.*allow_pickle"),
        ("bomb", r"unpacks to 8,000,\d+ bytes, more than the 1,000,000 that are read"),
        ("claims", r"cannot read '.*v.npz'.*features.npy says that it has shape \(68719476736,\), and has"),
        ("ids", r"'kind': integers up to 10,000,000,000 are no classes; name the arrays that are labels in targets"),
        ("no features", r"v.npz: no array 'features'; there are: code, kind, person, size"),
        ("three dimensions", r"'features' must be \(N, D\); found shape \(60, 2, 4\)"),
        ("short labels", r"'kind' must have one entry per row of the features, 60; found shape \(59,\)"),
    ],
)
def test_a_file_that_is_none_is_an_error_and_nothing_in_it_runs(
    what: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, file = arrays(), tmp_path / "v.npz"
    match what:
        case "text":
            file.write_text("hello")
        case "pickle":
            np.savez(file, **{**given, "features": np.array([Evil()], dtype=object)})
        case "bomb":
            np.savez_compressed(file, features=np.zeros((1000, 1000)))
            monkeypatch.setattr(vectors, "LARGEST", 1_000_000)
        case "claims":
            text = "{'descr': '<f8', 'fortran_order': False, 'shape': (68719476736,), }".ljust(117).encode()
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("features.npy", np.lib.format.magic(1, 0) + b"\x76\x00" + text + b"\n" + bytes(40))
        case "ids":
            np.savez(file, **{**given, "kind": np.arange(60) + 10**10 - 59})
        case "no features":
            np.savez(file, **{name: value for name, value in given.items() if name != "features"})
        case "three dimensions":
            np.savez(file, **{**given, "features": given["features"].reshape(60, 2, 4)})
        case "short labels":
            np.savez(file, **{**given, "kind": given["kind"][:59]})
    with pytest.raises(mtl.DataError, match=message):
        load(config(tmp_path))
    assert not Path("/tmp/mtl-was-here").exists()


def test_the_references_second_experiment_has_its_settings(tmp_path: Path, in_tmp: Path) -> None:
    """FC 32 three times, dropout 0.2 after the second and third, dense stitches after each: 3 matrices of 64 x 64."""
    random = np.random.default_rng(0)
    labels = {"gender": np.array(["f", "m"] * 40), "age_group": np.array(["a", "b", "c", "b"] * 20)}
    np.savez(tmp_path / "embeddings.npz", features=random.normal(size=(80, 128)), **labels)
    given = mtl.load_config(
        ROOT / "examples/configs/face_embeddings.yaml", [f"data.root={tmp_path}", "device=cpu", "max_steps=2"]
    )
    assert (given.epochs, given.optim.lr, given.optim.l2) == (800, 3e-4, 1e-3)
    run = build.run(given, "run")
    units = run.model.exchange()
    assert {point: tuple(p.shape for p in unit.parameters()) for point, unit in units.items()} == {
        f"fc{i}": ((64, 64),) for i in (1, 2, 3)
    }
    run.close()


@pytest.mark.parametrize("kind", ["npz", "half", "bfloat16", "integers"])
def test_the_file_that_was_trained_on_can_be_predicted(kind: str, tmp_path: Path, in_tmp: Path) -> None:
    """Also with another array of the same shape under a common name, and in any type that vectors are read in."""
    given, file = arrays(), tmp_path / ("v.safetensors" if kind == "bfloat16" else "v.npz")
    wanted = (10 * given["features"]).round()
    of_type = {"npz": wanted, "half": wanted.astype(np.float16), "integers": wanted.astype(np.int64), "bfloat16": wanted}[kind]
    if kind == "bfloat16":
        tensors = {"features": torch.zeros(60, 4), "mine": torch.from_numpy(of_type).bfloat16()}
        save_file({**tensors, "code": torch.from_numpy(given["code"])}, file)
    else:
        np.savez(file, features=np.zeros_like(wanted), mine=of_type, code=given["code"])
    run = config(tmp_path, file=file.name, features="mine", targets=["code"])
    mtl.train(run.replaced(tasks=[task for task in run.tasks if task.name == "code"]), "run")
    said = [row["tasks"]["code"]["label"] for row in mtl.predict("run", [file]).predictions]
    assert said == [row["tasks"]["code"]["label"] for row in mtl.predict("run", [wanted.astype(np.float32)]).predictions]
    assert len(set(said)) > 1


def test_a_text_that_is_no_class_is_told_by_row(tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", **arrays())
    with pytest.raises(mtl.DataError, match=r"v.npz: 'kind': 'c' in row 2 is none of the classes a, b"):
        load(config(tmp_path, classes={"kind": ["a", "b"]}))
    with pytest.raises(mtl.DataError, match=r"classes of code: none; leave them out"):
        load(config(tmp_path, classes={"code": []}))
