"""A table of image files as a dataset, its columns as tasks, by config alone."""

from __future__ import annotations

import csv
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mtl
from mtl.build import load_data, make_tasks
from mtl.config import RunConfig
from mtl.data import Samples, Split
from mtl.inspection import inspect
from mtl.progress import Silent

ROOT = Path(__file__).parent.parent
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 200)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sixty pictures in folders of their owners, and `pets.csv` with colour, weight and owner."""
    rng, root = random.Random(0), tmp_path / "root"
    rows = []
    for i in range(60):
        colour, weight, owner = rng.choice(list(COLOURS)), rng.uniform(1, 9), f"o{i % 12}"
        file = root / owner / f"{i}.{'png' if i % 2 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + i % 3, 10), tuple(int(c * weight / 9) for c in COLOURS[colour])).save(file)
        rows.append([f"{owner}/{file.name}", colour, f"{weight:.2f}", owner])
    with open(root / "pets.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["path", "colour", "weight", "owner"], *rows])
    return root


def config(root: Path, tasks: Any = ("colour",), **options: Any) -> RunConfig:
    kinds = {"colour": "column_class", "weight": "column_number", "traits": "column_flags"}
    given = {"file": "pets.csv", "size": [8, 8], "classes": {"colour": None}, "numbers": ["weight"], **options}
    return RunConfig(
        tasks=[{"name": name, "task": kinds[name]} for name in tasks],
        backbone={"name": "mlp", "widths": [8]},
        data={"root": root, "validation": 0.2, "datasets": {"csv_images": given}, "workers": 0},
        epochs=2,
        batch_size=8,
        device="cpu",
        precision="fp32",
    )


def load(config: RunConfig) -> dict[Split, Samples]:
    return {split: parts["csv_images"] for split, parts in load_data(config, make_tasks(config)).items() if parts}


def added(root: Path, *rows: str) -> None:
    with open(root / "pets.csv", "a") as stream:
        stream.writelines(f"{row}\n" for row in rows)


def test_a_table_is_trained_on_by_config_alone(root: Path, in_tmp: Path) -> None:
    added(root, "o1/none.jpg,red,3,o1")
    result = mtl.train(config(root, ("colour", "weight"), group="owner", bad=0.1), "run")
    assert set(result.test) == {"colour", "weight", "score"}
    with open("run/set_aside.csv", newline="") as stream:
        [row] = list(csv.DictReader(stream))
    assert row == {"dataset": "csv_images", "where": f"{root / 'pets.csv'}:62", "why": "path 'o1/none.jpg' is not there"}
    model = mtl.load_model("run").model
    assert model.tasks[0].head.class_names() == ("blue", "green", "red")
    assert mtl.evaluate_run("run", "test")["colour"] == result.test["colour"]


def test_the_readmes_config_is_one(root: Path, in_tmp: Path) -> None:
    (text,) = re.findall(r"```yaml\n(tasks:\n  - \{name: breed.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = (root / "pets.csv").read_text().replace("colour", "breed", 1).splitlines()
    lines = [
        f"{lines[0]},shy,loud,trained",
        *(f"{line},{i % 2},{int(i % 3 > 0)},{int(i % 5 > 1)}" for i, line in enumerate(lines[1:])),
    ]
    (root / "pets.csv").write_text("\n".join(lines) + "\n")
    Path("pets.yaml").write_text(text)
    result = mtl.train(mtl.load_config("pets.yaml", [f"data.root={root}", "epochs=1", "device=cpu", "data.workers=0"]), "run")
    assert set(result.test) == {"breed", "weight", "traits", "score"}


def test_the_example_for_own_tables_is_one(root: Path, in_tmp: Path) -> None:
    with open(root / "pets.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(root / "pets.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["path", "breed", "weight", "size", "shy", "loud", "owner"])
        for i, row in enumerate(rows):
            size = ("small", "medium", "large")[min(2, int(float(row["weight"]) / 3))]
            table.writerow([row["path"], row["colour"], row["weight"], size, i % 2, int(i % 3 == 0), row["owner"]])
    config = mtl.load_config(
        ROOT / "examples" / "configs" / "my_csv.yaml",
        [f"data.root={root}", "epochs=1", "device=cpu", "data.workers=0", "data.datasets.csv_images.size=[16,16]"],
    )
    result = mtl.train(config, "run")
    assert set(result.test) == {"breed", "size", "weight", "traits", "score"}


def test_groups_are_never_parted(root: Path) -> None:
    whole = RunConfig(
        **{
            **config(root).model_dump(mode="json"),
            "tasks": [{"name": "owner", "task": "column_class"}],
            "data": {**config(root, group="owner", classes={"owner": None}).data.model_dump(mode="json")},
        }
    )
    seen = [set(part.targets["owner"].tolist()) for part in load(whole).values()]
    assert len(seen) == 3
    assert sum(map(len, seen)) == len(set().union(*seen)) == 12


def test_without_groups_the_share_for_testing_is_by_name_and_stays(root: Path) -> None:
    before = {split: sorted(part.images.paths.encoded()) for split, part in load(config(root)).items()}
    assert 0.05 < len(before[Split.TEST]) / 60 < 0.4
    (root / "o0" / "more.png").write_bytes((root / "o1" / "1.png").read_bytes())
    added(root, "o0/more.png,red,2,o0")
    after = {split: sorted(part.images.paths.encoded()) for split, part in load(config(root)).items()}
    assert set(before[Split.TEST]) <= set(after[Split.TEST])
    assert len(after[Split.TEST]) - len(before[Split.TEST]) <= 1


def test_a_column_may_say_which_split(root: Path) -> None:
    lines = (root / "pets.csv").read_text().splitlines()
    words = ["train", "train", "valid", "test"]
    (root / "pets.csv").write_text(
        "\n".join([lines[0] + ",part", *(f"{line},{words[i % 4]}" for i, line in enumerate(lines[1:]))]) + "\n"
    )
    assert {split: len(part) for split, part in load(config(root, split="part")).items()} == {
        "train": 30,
        "val": 15,
        "test": 15,
    }
    text = (root / "pets.csv").read_text()
    (root / "pets.csv").write_text(text.replace(",valid", ",train"))
    assert {split: len(part) for split, part in load(config(root, split="part")).items()} == {"train": 36, "val": 9, "test": 15}
    (root / "pets.csv").write_text(text.replace(",valid", ",train").replace(",test", ",train"))
    assert {split: len(part) for split, part in load(config(root, split="part")).items()} == {"train": 48, "val": 12}


def test_missing_values_are_missing_labels(root: Path) -> None:
    text = (root / "pets.csv").read_text().splitlines()
    text[5] = ",".join([text[5].split(",")[0], "unknown", "heavy", "o1"])
    (root / "pets.csv").write_text("\n".join(text) + "\n")
    parts = load(config(root, ("colour", "weight"), bad=0.02))
    assert sum(part.labelled["colour"] for part in parts.values()) == 59
    assert sum(part.labelled["weight"] for part in parts.values()) == 59
    assert parts[Split.TRAIN].set_aside.summary() == "1 values of weight that cannot be used"


def test_too_many_bad_rows_stop_the_run(root: Path) -> None:
    added(root, "../secret.jpg,red,3,o1", "/etc/passwd,red,3,o1", ",red,3,o1", "o1,red,3,o1")
    with pytest.raises(mtl.DataError, match=r"4 of 64 rows of '.*pets.csv' cannot be used .*pets.csv:64: path '' is missing"):
        load(config(root))
    assert load(config(root, bad=0.1))[Split.TRAIN].set_aside.total == 4


def test_the_order_of_classes_may_be_given(root: Path) -> None:
    given = config(root, classes={"colour": ["red", "green", "blue"]})
    assert load(given)[Split.TRAIN].classes == {"colour": ("red", "green", "blue")}
    few = load(config(root, classes={"colour": ["red", "green"]}, bad=0.6))[Split.TRAIN]
    assert few.set_aside.counts["values of colour that cannot be used"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file": "none.csv"}, "cannot read table .*none.csv"),
        ({"images": "file"}, "unknown column 'file'"),
        ({"numbers": ["wieght"]}, "unknown column 'wieght'.*did you mean 'weight'"),
        ({"split": "owner"}, "no rows that can be used; set aside: 60 rows without a usable owner"),
        ({"flags": {"traits": ["wieght"]}}, "unknown column 'wieght'.*did you mean 'weight'"),
        ({"folder": "nowhere"}, "cannot be used .*is not there"),
    ],
)
def test_mistakes_in_the_options(options: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(mtl.DataError, match=message):
        load(config(root, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"numbers": ["colour"]}, "colour: given more than once in classes, numbers and flags"),
        ({"flags": {"weight": ["owner"]}}, "weight: given more than once"),
        ({"flags": {"traits": []}}, "flags of traits: no column"),
        ({"flags": {"traits": ["owner", "owner"]}}, "flags: owner in traits: given twice"),
        ({"flags": {"traits": ["colour"]}}, "flags: colour in traits: given twice"),
    ],
)
def test_every_target_is_one_thing(options: dict[str, Any], message: str, root: Path) -> None:
    with pytest.raises(mtl.ConfigError, match=message):
        load(config(root, **options))


def test_a_task_of_a_column_that_is_not_named(root: Path) -> None:
    with pytest.raises(mtl.DataError, match="wants unknown target 'weight'; known: colour"):
        load(config(root, ("colour", "weight"), numbers=[]))


def test_two_tables_in_one_run(root: Path, in_tmp: Path) -> None:
    tree = config(root).model_dump(mode="json")
    tree["tasks"] = [
        {"name": "colour", "task": "column_class"},
        {"name": "heavy", "task": "column_number", "dataset": "others", "target": "weight", "unit": "kg"},
    ]
    tree["data"]["datasets"]["others"] = {**tree["data"]["datasets"]["csv_images"], "dataset": "csv_images", "test": 0.3}
    result = mtl.train(RunConfig(**tree), "run")
    assert "rmse_kg" in result.test["heavy"]
    assert torch.isfinite(torch.tensor(result.test["colour"]["accuracy"]))


def test_one_file_has_one_row_however_it_is_spelt(root: Path) -> None:
    added(root, "./o0/0.jpg,red,3,o0", "o1//1.png,red,3,o1", f"{root}/o2/2.jpg,red,3,o2", "o3/3.png,red,3,o3")
    parts = load(config(root, bad=0.1))
    files = [name for part in parts.values() for name in part.images.paths.encoded()]
    assert len(files) == len(set(files)) == 60
    assert parts[Split.TRAIN].set_aside.counts == {"rows of images that have one": 4}


def test_classes_of_rows_that_are_not_used_are_none(root: Path) -> None:
    added(root, "none.jpg,purple,3,o1", "path,colour,weight,owner")
    parts = load(config(root, bad=0.1))
    assert parts[Split.TRAIN].classes["colour"] == ("blue", "green", "red")


def test_numbers_that_float32_cannot_hold_are_set_aside(root: Path) -> None:
    added(root, "o1/1.png,red,3,o1")
    text = (root / "pets.csv").read_text().splitlines()
    text[1] = text[1].replace(text[1].split(",")[2], "1e39")
    (root / "pets.csv").write_text("\n".join(text) + "\n")
    parts = load(config(root, ("weight",), bad=0.1))
    assert parts[Split.TRAIN].set_aside.counts["values of weight that cannot be used"] == 1
    assert all(part.targets["weight"].isfinite().all() for part in parts.values())


def test_groups_that_a_split_column_parts_are_refused(root: Path) -> None:
    lines = (root / "pets.csv").read_text().splitlines()
    rows = [f"{line},{('train', 'test')[i % 2]}" for i, line in enumerate(lines[1:])]
    (root / "pets.csv").write_text("\n".join([f"{lines[0]},split", *rows]) + "\n")
    load(config(root, split="split"))
    (root / "pets.csv").write_text("\n".join([f"{lines[0]},split", *rows[:-1], rows[-1].replace("test", "train")]) + "\n")
    with pytest.raises(mtl.DataError, match="1 groups are in both train and test"):
        load(config(root, split="split", group="owner"))


def test_too_many_unusable_values_of_a_column_are_refused(root: Path) -> None:
    text = (root / "pets.csv").read_text().splitlines()
    for i in range(1, 11):
        fields = text[i].split(",")
        fields[2] = "12.3 kg"
        text[i] = ",".join(fields)
    (root / "pets.csv").write_text("\n".join(text) + "\n")
    message = r"10 of 60 values of weight in '.*pets.csv' cannot be used .*, more than bad=0.01 .*pets.csv:2: weight"
    with pytest.raises(mtl.DataError, match=message):
        load(config(root, ("weight",)))
    assert load(config(root, ("weight",), bad=0.2))[Split.TRAIN].set_aside.total == 10


def flagged(root: Path) -> None:
    """Two columns of flags in the table: `dark` by weight, `odd` in words; one of each is empty, one `odd` is none."""
    lines = (root / "pets.csv").read_text().splitlines()
    dark = [str(int(float(line.split(",")[2]) < 5)) for line in lines[1:]]
    odd = [("TRUE", "yes", "1.0")[i % 3] if i % 2 else ("False", "NO", "0.0", "0")[i % 4] for i in range(60)]
    dark[0], odd[1], odd[2] = "", "", "perhaps"
    rows = (",".join(row) for row in zip(lines[1:], dark, odd, strict=True))
    (root / "pets.csv").write_text("\n".join([f"{lines[0]},dark,odd", *rows]) + "\n")


def test_columns_of_flags_are_one_task_of_several_labels(root: Path, in_tmp: Path) -> None:
    flagged(root)
    result = mtl.train(config(root, ("traits",), flags={"traits": ["dark", "odd"]}, bad=0.1, split=None), "run")
    assert set(result.test["traits"]) == {"n", "loss", "average_precision", "accuracy", "f1_macro"}
    assert mtl.load_model("run").model.tasks[0].head.classes == ("dark", "odd")
    with open("run/set_aside.csv", newline="") as stream:
        assert [row["why"] for row in csv.DictReader(stream)] == ["odd 'perhaps' is none of what flags are: 0, 1"]


def test_flags_are_missing_one_by_one(root: Path) -> None:
    flagged(root)
    parts = load(config(root, ("traits",), flags={"traits": ["dark", "odd"]}, bad=0.1))
    masks = [part.valid["traits"] for part in parts.values()]
    missing = sum(((~mask).sum(0) for mask in masks if mask is not None), torch.zeros(2))
    assert missing.tolist() == [1, 2]
    with pytest.raises(mtl.DataError, match=r"1 of 59 values of odd in '.*pets.csv' cannot be used .*, more than bad=0.001"):
        load(config(root, ("traits",), flags={"traits": ["dark", "odd"]}, bad=0.001))


def test_a_comparison_says_what_was_set_aside(root: Path, in_tmp: Path) -> None:
    added(root, "o1/none.jpg,red,3,o1")
    (root / "o2" / "2.jpg").write_bytes(b"no picture")
    base = config(root, ("colour", "weight"), group="owner", bad=0.1)
    found = mtl.compare(base, arms=["unshared", "hard_shared"], seeds=1, out="compared")
    assert found.results["set_aside"] == {"csv_images": {"files: is not there": 1, "image files that cannot be read": 1}}
    said = "Of dataset csv_images were set aside: 1 files: is not there; 1 image files that cannot be read (the most "
    assert said in Path("compared/report.md").read_text()


def test_a_column_whose_name_begins_as_another_is_counted_by_itself(root: Path) -> None:
    lines = (root / "pets.csv").read_text().splitlines()
    rows = [f"{line},{i % 2},{'perhaps' if i < 3 else i % 2}" for i, line in enumerate(lines[1:])]
    (root / "pets.csv").write_text("\n".join([f"{lines[0]},big,big ears", *rows]) + "\n")
    with pytest.raises(mtl.DataError, match=r"3 of 60 values of big ears in .*bad=0.04 .*pets.csv:2: big ears 'perhaps'"):
        load(config(root, ("traits",), flags={"traits": ["big", "big ears"], "more": ["big ears"]}, bad=0.04))


def test_a_regression_on_the_numbers_of_classes_is_refused(root: Path) -> None:
    wrong = config(root).replaced(tasks=[{"name": "colour", "task": "column_number"}])
    with pytest.raises(mtl.DataError, match=r"task 'colour': the labels of this target stand for blue, green, red"):
        load(wrong)


def test_flags_are_inspected_one_by_one(root: Path) -> None:
    flagged(root)
    about = inspect(config(root, ("traits",), flags={"traits": ["dark", "odd"]}, bad=0.1), Silent())["csv_images"]["tasks"]
    labels, present = about["traits"]["labels"], about["traits"]["classes"]
    assert {name: sum(of[name] for of in labels.values()) for name in ("dark", "odd")} == {"dark": 59, "odd": 58}
    assert all(0 < present["train"][name] < labels["train"][name] for name in ("dark", "odd"))
    assert about["traits"]["absent"]["train"] == []
