"""CSV files: what is right becomes columns, what is wrong is set aside with file and line, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtl
from mtl.columns import ClassColumn, NumberColumn, SetAside, TextColumn
from mtl.tables import match_names, read_table, table_columns


def read(text: str | bytes, tmp_path: Path, **options: Any) -> tuple[dict[str, Any], SetAside, list[int]]:
    """The columns path, kind and age of a table, what was set aside, and the lines of the rows that are used."""
    file = tmp_path / "t.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    path, kind, age, set_aside = TextColumn(), ClassColumn(), NumberColumn(), SetAside()
    lines = read_table(file, [("path", path), ("kind", kind), ("age", age)], set_aside, **options)
    kinds = [kind.names[code] if code >= 0 else None for code in kind.codes]
    ages = [None if np.isnan(value) else float(value) for value in age.values]
    return {"path": [one.decode("utf-8", "surrogateescape") for one in path], "kind": kinds, "age": ages}, set_aside, [*lines]


GOOD = "path,kind,age\na.jpg,cat,3\nb.jpg,dog,4.5\n"
BOTH = {"path": ["a.jpg", "b.jpg"], "kind": ["cat", "dog"], "age": [3.0, 4.5]}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (GOOD, {}),
        ("\ufeff" + GOOD, {}),  # a byte order mark
        (GOOD.replace("\n", "\r\n"), {}),
        (GOOD.replace("\n", "\r"), {}),
        (GOOD.rstrip("\n"), {}),
        (GOOD.replace("\n", "\n\n"), {}),  # blank lines
        (GOOD.replace(",", ", "), {}),  # a comma and a space
        (GOOD.replace(",", " , "), {}),
        (GOOD.replace(",", ";"), {"delimiter": ";"}),
        (GOOD.replace(",", "\t"), {"delimiter": "\t"}),
        (GOOD.replace("cat", '"cat"').replace("dog", ' "dog"'), {}),
        (GOOD.replace("3\n", "3,\n"), {}),  # a stray comma
        ("age,other,path,kind\n3,x,a.jpg,cat\n4.5,,b.jpg,dog\n", {}),  # other order, other columns
        ("a.jpg,cat,3\nb.jpg,dog,4.5\n", {"names": ["path", "kind", "age"]}),  # no header
        (GOOD, {"names": ["path", "kind", "age"]}),  # a header all the same
        (GOOD.encode("utf-16"), {"encoding": "utf-16"}),
    ],
)
def test_the_same_table_in_many_forms(text: str | bytes, options: dict[str, Any], tmp_path: Path) -> None:
    found, set_aside, lines = read(text, tmp_path, **options)
    assert (found, set_aside.total, len(lines)) == (BOTH, 0, 2)


def test_quoted_names_hold_commas_quotes_line_breaks_and_any_letters(tmp_path: Path) -> None:
    found, set_aside, lines = read('path,kind,age\n"a,1.jpg","Ümit ""Ü"" Ç\nx",3\nб.jpg,猫,1\n', tmp_path)
    assert (found["path"], found["kind"]) == (["a,1.jpg", "б.jpg"], ['Ümit "Ü" Ç\nx', "猫"])
    assert (set_aside.total, lines) == (0, [3, 4])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("c.jpg,cat", "2 fields, where the header has 3"),
        ("c.jpg,cat,3,4", "4 fields, where the header has 3"),
        (",cat,3", "path '' is missing"),
        ("c\0.jpg,cat,3", "path 'c\\x00.jpg' holds a zero byte"),
        ("c" * 10_000_000 + ",cat,3", "the line has more than 1,048,576 characters"),
        ("c" * 100_000 + ",cat,3", "has 100,000 characters"),
    ],
    ids=["short", "long", "no path", "zero byte", "10 MB", "100 kB"],
)
def test_a_row_that_cannot_be_used_is_set_aside_and_the_others_are_not(row: str, why: str, tmp_path: Path) -> None:
    found, set_aside, lines = read(GOOD.replace("b.jpg", f"{row}\nb.jpg"), tmp_path)
    assert (found, lines) == (BOTH, [2, 4])
    [(where, said)] = set_aside.listed
    assert where == f"{tmp_path / 't.csv'}:3"
    assert why in said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("rows", "found", "lines"),
    [
        ('a.jpg,"cat,3\nb.jpg,"dog",4\nc.jpg,emu,5\n', ["b.jpg", "c.jpg"], {2}),
        ('a.jpg,"cat,3\nb.jpg,dog,4\nc.jpg,emu,5\n', ["b.jpg", "c.jpg"], {2}),
        ('a.jpg,"cat,3\nb.jpg,dog,4\nc.jpg,"emu,5\nd.jpg,fox,6\n', ["b.jpg", "d.jpg"], {2, 4}),
        ('a.jpg,ca"t,3\nb.jpg,dog,4\n', ["b.jpg"], {2}),
        ('a.jpg,"ca"t,3\nb.jpg,dog,4\n', ["a.jpg", "b.jpg"], set()),
        ('a.jpg,"c\na\nt",3\nb.jpg,dog,4\n', ["a.jpg", "b.jpg"], set()),
        ('a.jpg,"cat,3\n' + "".join(f"{i}.jpg,dog,4\n" for i in range(5000)), [f"{i}.jpg" for i in range(5000)], {2}),
    ],
)
def test_a_stray_quote_costs_its_own_line(rows: str, found: list[str], lines: set[int], tmp_path: Path) -> None:
    """And never moves a label to another row."""
    columns, set_aside, _ = read("path,kind,age\n" + rows, tmp_path)
    assert columns["path"] == found
    assert {int(where.rsplit(":", 1)[1]) for where, _ in set_aside.listed} == lines
    for path, age in zip(columns["path"], columns["age"], strict=True):
        assert age == {"a": 3.0, "b": 4.0, "c": 5.0, "d": 6.0}.get(path[0], 4.0)


@pytest.mark.parametrize("age", ["inf", "-inf", "1e400", "three", "1_000", "3 years", "0x10", "½", "3\0"])
def test_a_value_that_is_no_number_is_set_aside_and_its_row_is_not(age: str, tmp_path: Path) -> None:
    found, set_aside, _ = read(f"path,kind,age\na.jpg,cat,3\nb.jpg,dog,{age}\n", tmp_path)
    assert found == {**BOTH, "age": [3.0, None]}
    assert [where for where, _ in set_aside.listed] == [f"{tmp_path / 't.csv'}:3"]
    assert set_aside.summary() == "1 values of age that cannot be used"


@pytest.mark.parametrize("text", ["", " ", "NaN", "nan", "NA", "n/a", "null", "None", "unknown", "Unknown", "?", "-"])
def test_what_stands_for_no_value_is_none(text: str, tmp_path: Path) -> None:
    found, set_aside, _ = read(f"path,kind,age\na.jpg,{text},{text}\n", tmp_path)
    assert (found["kind"], found["age"], set_aside.total) == ([None], [None], 0)


def test_text_in_another_encoding_is_told(tmp_path: Path) -> None:
    table = "path,kind,age\na.jpg,café,3\nb.jpg,dog,4\n".encode("latin-1")
    found, set_aside, _ = read(table, tmp_path)
    assert found["kind"] == [None, "dog"]
    assert "kind 'caf\\udce9' is not UTF-8 text (give the table's encoding, such as latin-1)" in set_aside.listed[0][1]
    assert read(table, tmp_path, encoding="latin-1")[0]["kind"] == ["café", "dog"]


def test_a_path_keeps_its_bytes(tmp_path: Path) -> None:
    found, set_aside, _ = read(b"path,kind,age\ncaf\xe9.jpg,cat,3\n", tmp_path)
    assert (found["path"][0].encode("utf-8", "surrogateescape"), set_aside.total) == (b"caf\xe9.jpg", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("path,kind,age\n", "has a header and no rows that can be used"),
        ("path,kind,age\n,cat,3\n", "no rows that can be used; set aside: 1 rows without a usable path"),
        ("path,kind,age,kind\na,b,1,c\n", r"t.csv:1: the header has column 'kind' 2 times"),
        ("path,kinds,age\na,b,1\n", r"t.csv:1: unknown column 'kind'.*did you mean 'kinds'"),
        (GOOD.replace(",", ";"), r"its fields look parted by \";\": give it, or save with ','"),
        (GOOD.replace(",", "\t"), r'parted by "\\t": give it'),
        (GOOD.encode("utf-16"), r"'.*t.csv' is utf-16, not UTF-8: save it as UTF-8, or give its encoding"),
        (GOOD.encode("utf-16-le"), "is utf-16-le, not UTF-8"),
        (GOOD.encode("utf-16-be"), "is utf-16-be, not UTF-8"),
        (GOOD.encode("utf-32"), "is utf-32, not UTF-8"),
        ("x" * 200_000 + "\n", r"t.csv:1: the header cannot be read: a field has 200,000 characters"),
    ],
    ids=[
        "empty",
        "header",
        "no good row",
        "duplicate",
        "unknown",
        "semicolons",
        "tabs",
        "UTF-16",
        "LE",
        "BE",
        "UTF-32",
        "huge",
    ],
)
def test_a_table_that_cannot_be_read_says_where(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(mtl.DataError, match=message):
        read(text, tmp_path)


def test_a_file_that_is_not_there_and_an_encoding_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(mtl.DataError, match=r"cannot read table '.*none.csv': No such file"):
        read_table(tmp_path / "none.csv", [], SetAside())
    with pytest.raises(mtl.DataError, match="unknown encoding: klingon"):
        read(GOOD, tmp_path, encoding="klingon")


def test_utf_16_is_read_and_damage_in_it_is_told(tmp_path: Path) -> None:
    whole = GOOD.encode("utf-16")
    assert read(whole, tmp_path, encoding="utf-16")[0]["kind"] == read(GOOD, tmp_path)[0]["kind"]
    with pytest.raises(mtl.DataError, match=r"t.csv"):
        read(whole[:-1], tmp_path, encoding="utf-16")


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(mtl.DataError, match=r"t.csv' is no regular file"):
        read_table(tmp_path / "t.csv", [], SetAside())


def test_names_that_are_almost_numbers_are_sorted_as_names() -> None:
    found = ClassColumn()
    for name in ("10", "--5", "9", "5-", "1_0"):
        found.append(found.parse(name))
    assert found.names == ("--5", "10", "1_0", "5-", "9")


def test_classes_are_sorted_numbers_by_value_or_in_the_order_given() -> None:
    found = ClassColumn()
    for text in ("10", "9", "-1", "9"):
        found.append(found.parse(text))
    assert (found.names, found.codes.tolist()) == (("-1", "9", "10"), [2, 1, 0, 1])
    fixed = ClassColumn(["young", "old"])
    fixed.append(fixed.parse("old"))
    fixed.append(None)
    assert (fixed.names, fixed.codes.tolist()) == (("young", "old"), [1, -1])
    with pytest.raises(ValueError, match="is none of the classes young, old"):
        fixed.parse("middle")


@given(st.lists(st.tuples(st.text(min_size=1), st.text(), st.text()), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_whatever_is_written_is_read_or_set_aside(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, ...]]
) -> None:
    import csv

    file = tmp_path_factory.mktemp("tables") / "t.csv"
    with open(file, "w", newline="", encoding="utf-8", errors="surrogatepass") as stream:
        csv.writer(stream).writerows([("path", "kind", "age"), ("sure", "", ""), *rows])
    path, kind, age, set_aside = TextColumn(), ClassColumn(), NumberColumn(), SetAside()
    lines = read_table(file, [("path", path), ("kind", kind), ("age", age)], set_aside)
    assert len(lines) == len(list(path)) == len(kind.codes) == len(age.values)
    lost = sum(count for why, count in set_aside.counts.items() if why.startswith("rows"))
    assert len(lines) + lost == 1 + len(rows)
    assert not np.isinf(age.values).any()


# --- joining ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=3), max_size=30), st.lists(st.binary(max_size=3), max_size=30))
def test_names_are_matched_as_a_dictionary_would(names: list[bytes], table: list[bytes]) -> None:
    first: dict[bytes, int] = {}
    again = [row for row, name in enumerate(table) if first.setdefault(name, row) != row]
    rows, twice = match_names(names, table)
    assert rows.tolist() == [first.get(name, -1) for name in names]
    assert twice.tolist() == again


def test_a_number_outside_its_range_and_another_spelling(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("age,sex\n30,m\n150,F\n-1,male\n7,0\n")
    age, set_aside = NumberColumn(between=(0, 120)), SetAside()
    sex = ClassColumn(("female", "male"), also={"m": "male", "F": "female"}, missing=["0"])
    read_table(tmp_path / "t.csv", [("age", age), ("sex", sex)], set_aside)
    assert [value if value == value else None for value in age.values] == [30, None, None, 7]
    assert sex.codes.tolist() == [1, 0, 1, -1]
    assert [why for _, why in set_aside.listed] == ["age '150' is not between 0 and 120", "age '-1' is not between 0 and 120"]


def test_the_columns_of_a_table_with_a_header_and_without(tmp_path: Path) -> None:
    names = ("id", "name", "age")
    for text, expected in (("ID, n, age\n1, a, 3\n", ("ID", "n", "age")), ("7, a\n", ("id", "name")), ("7,a,b,c\n", names)):
        (tmp_path / "t.csv").write_text(text)
        assert table_columns(tmp_path / "t.csv", names=names) == expected
    for text in ("", "\n"):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(mtl.DataError, match="has no first row"):
            table_columns(tmp_path / "t.csv")
