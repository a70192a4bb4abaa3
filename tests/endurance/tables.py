"""Rows 18 and 22: tables of labels, and the names of files in them."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

import mtl
from tests.endurance.rows import Cases, row

GOOD = "path,kind,age\na.jpg,cat,3\nb.jpg,dog,4.5\n"
PARSED = (["a.jpg", "b.jpg"], ["cat", "dog"], [3.0, 4.5])

ASIDE = {
    "too few fields": ("c.jpg,cat", "2 fields, where the header has 3"),
    "too many fields": ("c.jpg,cat,3,4", "4 fields, where the header has 3"),
    "no path": (",cat,3", "is missing"),
    "NUL in a path": ("c\0.jpg,cat,3", "zero byte"),
    "a field of 10 MB": ("c" * 10_000_000 + ",cat,3", "more than 1,048,576 characters"),
    "a field of 100 kB": ("c" * 100_000 + ",cat,3", "100,000 characters"),
}
"""A third row -> why it is set aside, at line 3."""
ODD_AGES = ("inf", "-inf", "1e400", "three", "1_000", "3 years", "0x10", "½")
NO_AGES = ("", "NaN", "unknown", "null", "-")
SAME = {
    "as it should be": GOOD,
    "a byte order mark": "\ufeff" + GOOD,
    "CRLF": GOOD.replace("\n", "\r\n"),
    "blank lines": GOOD.replace("\n", "\n\n"),
    "blanks around fields": GOOD.replace(",", " , "),
    "quotes": GOOD.replace("cat", '"cat"'),
    "a stray comma": GOOD.replace("3\n", "3,\n"),
    "no end of line": GOOD.rstrip("\n"),
}
REFUSED = {
    "empty": ("", "is empty"),
    "a header only": ("path,kind,age\n", "no rows that can be used"),
    "a column twice": ("path,kind,age,kind\na,b,1,c\n", "t.csv:1: the header has column 'kind' 2 times"),
    "no such column": ("path,kinds,age\na,b,1\n", "t.csv:1: unknown column 'kind'"),
    "another delimiter": (GOOD.replace(",", ";"), 'parted by ";"'),
    "one line of 200 kB": ("x" * 200_000 + "\n", "t.csv:1: the header cannot be read"),
}


def read(file: Path) -> tuple[tuple[list[str], list[str | None], list[float]], mtl.SetAside]:
    path, kind, age, aside = mtl.TextColumn(), mtl.ClassColumn(), mtl.NumberColumn(), mtl.SetAside()
    mtl.read_table(file, [("path", path), ("kind", kind), ("age", age)], aside)
    kinds = [kind.names[code] if code >= 0 else None for code in kind.codes]
    return ([one.decode("utf-8", "surrogateescape") for one in path], kinds, age.values.tolist()), aside


@row(18, "bad CSV rows are counted")
def bad_rows_are_counted(folder: Path, short: bool) -> Cases:
    cases, file = Cases(), folder / "t.csv"

    def write(text: str | bytes) -> None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())

    for name, text in SAME.items():
        write(text)
        found, aside = read(file)
        cases.check(name, (found, aside.total) == (PARSED, 0), found)
    for name, (line, why) in ASIDE.items():
        write(GOOD.replace("b.jpg", f"{line}\nb.jpg"))
        found, aside = read(file)
        where, said = aside.listed[0] if aside.listed else ("", "")
        held = found == PARSED and aside.total == 1 and where == f"{file}:3" and why in said and len(said) < 300
        cases.check(name, held, (where, said[:100]))
    for age in ODD_AGES:
        write(GOOD.replace("4.5", age))
        (paths, _, ages), aside = read(file)
        held = len(paths) == 2 and ages[1] != ages[1] and aside.listed[0][0] == f"{file}:3"
        cases.check(f"age {age}", held, aside.listed)
    for age in NO_AGES:
        write(GOOD.replace("4.5", age))
        (_, _, ages), aside = read(file)
        cases.check(f"age {age!r} is none", ages[1] != ages[1] and aside.total == 0, aside.listed)
    write(GOOD.replace("cat", "café").encode("latin-1"))
    (_, kinds, _), aside = read(file)
    cases.check("latin-1", kinds == [None, "dog"] and "not UTF-8" in aside.listed[0][1], aside.listed)
    for name, (text, message) in REFUSED.items():
        write(text)
        try:
            read(file)
        except mtl.DataError as error:
            cases.check(name, message in str(error), str(error)[:200])
        else:
            cases.check(name, False, "it was read")
    return cases


WATCHED = """
import os, sys
from pathlib import Path
opened, watching = [], False
def hook(event, arguments):
    if watching and event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, bytes)):
        opened.append(os.fsdecode(arguments[0]))
sys.addaudithook(hook)
import mtl
from mtl.build import load_data, make_tasks
from mtl.config import RunConfig
import torchvision.io
def read(root):
    config = RunConfig(
        tasks=[{"name": "kind", "task": "column_class"}],
        device="cpu",
        data={"root": root, "validation": 0, "workers": 0,
              "datasets": {"csv_images": {"file": "t.csv", "size": [4, 4], "classes": {"kind": None}, "bad": 1.0}}},
    )
    samples = load_data(config, make_tasks(config))
    parts = [one for part in samples.values() for one in part.values()]
    for one in parts:
        one.images[:]
    for where, why in parts[0].set_aside.listed:
        print("aside", where.rsplit(":", 1)[1], why)
    return sum(map(len, parts))
root = Path(sys.argv[1])
read(Path(sys.argv[2]))  # whatever is imported late
print("now")
watching = True
count = read(root)
watching = False
print("read", count)
places = [root, sys.prefix, sys.base_prefix, Path(mtl.__file__).parent.parent]  # Python looks for plugins among its packages
for path in opened:
    if path != "." and not any(Path(path).resolve().is_relative_to(Path(place).resolve()) for place in places):
        print("outside", path)
"""

NAMES = (
    "../secret.jpg",
    "a/../../secret.jpg",
    "/etc/passwd",
    "out.jpg",
    "folder/secret.jpg",
    "..\\\\secret.jpg",
    "C:\\\\secret.jpg",
    "secret.jpg\0.png",
    "a/../good1.jpg",
    "//etc/passwd",
    "/proc/self/environ",
    "../root2/secret.jpg",
    "~/secret.jpg",
    "pipe.jpg",
    "loop.jpg",
)


@row(22, "a CSV cannot leave its root")
def a_table_cannot_leave(folder: Path, short: bool) -> Cases:
    cases, root = Cases(), folder / "root"
    for place in (root / "a", folder / "root2", folder / "beside"):
        place.mkdir(parents=True)
    for file in (folder / "secret.jpg", folder / "root2" / "secret.jpg", folder / "beside" / "secret.jpg"):
        Image.new("RGB", (4, 4)).save(file)
    for i in range(8):
        Image.new("RGB", (4, 4), (30 * i,) * 3).save(root / f"good{i}.jpg")
    (root / "out.jpg").symlink_to(folder / "secret.jpg")
    (root / "folder").symlink_to(folder / "beside")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    shutil.copytree(root, folder / "warm", ignore=lambda *_: ["out.jpg", "folder", "loop.jpg", "pipe.jpg"])
    for place, names in ((root, NAMES), (folder / "warm", ("none.jpg",))):
        with open(place / "t.csv", "w", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(["path", "kind"])
            table.writerows([f"good{i}.jpg", "ab"[i % 2]] for i in range(8))
            table.writerows([name.replace("\\\\", "\\"), "a"] for name in names)
    command = [sys.executable, "-c", WATCHED, str(root), str(folder / "warm")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    cases.check("it loads", done.returncode == 0, done.stderr[-300:])
    lines = done.stdout.split("now\n")[-1].splitlines()
    cases.check("the eight good files are read, and nothing else", "read 8" in lines, lines[:3])
    outside = [line for line in lines if line.startswith("outside")]
    cases.check("nothing outside is opened", not outside, outside[:3])
    aside = {line.split()[1]: line for line in lines if line.startswith("aside")}
    for number, name in enumerate(NAMES, 10):
        cases.check(f"{name!a} is listed with its line", str(number) in aside, aside.get(str(number)))
    cases.notes.append(f"{len(outside)} opens outside")
    return cases
