"""Names in a table lead to regular files under the root, or to a reason; nothing outside is opened."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl.folders import usable_files, walk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with files, links and other things, and a secret beside it."""
    root = tmp_path / "root"
    (root / "a" / "deep").mkdir(parents=True)
    for name in ("1.jpg", "a/2.jpg", "a/deep/3.jpg", "a/caf\udce9.jpg"):
        (root / os.fsdecode(os.fsencode(name))).write_bytes(b"x")
    (tmp_path / "secret.jpg").write_bytes(b"s")
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "4.jpg").write_bytes(b"s")
    (root / "inward.jpg").symlink_to(root / "a" / "2.jpg")
    (root / "outward.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "nowhere.jpg").symlink_to(root / "none.jpg")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "folder.jpg").symlink_to(root / "a")
    (root / "out").symlink_to(tmp_path / "beside")
    (root / "in").symlink_to(root / "a")
    os.mkfifo(root / "fifo.jpg")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "5.jpg").write_bytes(b"s")
    return root


@pytest.mark.parametrize(
    "name", ["1.jpg", "a/2.jpg", "a//2.jpg", "./a/./2.jpg", "a/deep/3.jpg", "inward.jpg", "in/2.jpg", "a/caf\udce9.jpg"]
)
def test_what_is_there_is_used(name: str, root: Path) -> None:
    mask, refused = usable_files(root, [os.fsencode(name), os.fsencode(root / name)])
    assert (mask.tolist(), list(refused)) == ([True, True], [])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../secret.jpg", "leads out"),
        ("a/../../secret.jpg", "leads out"),
        ("a/../1.jpg", "leads out"),
        ("/etc/passwd", "leads out"),
        ("../root2/5.jpg", "leads out"),
        ("outward.jpg", "leads out"),
        ("out/4.jpg", "leads out"),
        ("nowhere.jpg", "link to no file"),
        ("loop.jpg", "link to no file"),
        ("folder.jpg", "is a folder"),
        ("fifo.jpg", "no regular file"),
        ("a/deep", "is a folder"),
        ("a\\2.jpg", "backslash"),
        ("..\\secret.jpg", "backslash"),
        ("1.jpg\0.png", "zero byte"),
        ("none.jpg", "not there"),
        ("none/1.jpg", "not there"),
        ("1.jpg/2.jpg", "cannot be read"),
        ("", "names no file"),
        ("a/", "names no file"),
        ("~/1.jpg", "not there"),
        ("$HOME/1.jpg", "not there"),
        ("file:///etc/passwd", "not there"),
        ("a" * 5000, "not there"),
    ],
)
def test_what_is_not_is_not_and_why(name: str, why: str, root: Path) -> None:
    mask, refused = usable_files(root, [b"1.jpg", os.fsencode(name)])
    assert mask.tolist() == [True, False]
    [(position, said)] = refused
    assert position == 1
    assert why in said


def test_a_root_that_begins_like_another_is_another(root: Path) -> None:
    assert usable_files(root, [os.fsencode(root.parent / "root2" / "5.jpg")])[0].tolist() == [False]


def test_a_root_that_is_a_link_itself(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert usable_files(tmp_path / "link", [b"a/2.jpg", os.fsencode(root / "1.jpg"), b"out/4.jpg"])[0].tolist() == [
        True,
        True,
        False,
    ]


@given(st.lists(st.sampled_from(["..", "a", "deep", "out", "in", "1.jpg", "2.jpg", "4.jpg", "", ".", "/", "\\"]), max_size=6))
@settings(max_examples=300, deadline=None)
def test_whatever_is_used_is_under_the_root(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    base = tmp_path_factory.getbasetemp() / "tree"
    if not base.exists():
        (base / "root" / "a").mkdir(parents=True)
        for name in ("root/1.jpg", "root/a/2.jpg", "4.jpg"):
            (base / name).write_bytes(b"x")
        (base / "root" / "out").symlink_to(base)
        (base / "root" / "in").symlink_to(base / "root" / "a")
    mask, _ = usable_files(base / "root", [os.fsencode("/".join(parts))])
    if mask[0]:
        target = (base / "root" / "/".join(parts)).resolve()
        assert target.is_file()
        assert target.is_relative_to((base / "root").resolve())


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_nothing_is_opened(root: Path) -> None:
    opened: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir"):
            opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else str(arguments[0]))

    sys.addaudithook(hook)
    names = ["1.jpg", "../secret.jpg", "out/4.jpg", "outward.jpg", "/etc/passwd", "a/2.jpg", "in/2.jpg"]
    usable_files(root, map(os.fsencode, names))
    watching = False
    real = root.resolve()
    assert opened
    assert all(Path(path).resolve().is_relative_to(real) for path in opened)


def test_a_walk_finds_what_the_table_of_it_would_use(root: Path) -> None:
    """Links inside are followed, once; nothing outside is looked at, hidden folders neither."""
    (root / ".git").mkdir()
    (root / ".git" / "9.jpg").write_bytes(b"x")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "4.PNG").write_bytes(b"x")
    (root / "a" / "notes.txt").write_bytes(b"x")
    found = {one.folder: one for one in walk(root, (".jpg", ".png"))}
    assert {folder: one.files for folder, one in found.items()} == {
        b"": [b"1.jpg", b"inward.jpg"],
        b"a": [b"2.jpg", b"4.PNG", b"caf\xe9.jpg"],
        b"a/deep": [b"3.jpg"],
    }
    refused = {os.path.join(one.folder, name): why for one in found.values() for name, why in one.refused}
    assert refused == {
        b"fifo.jpg": "is no regular file",
        b"loop.jpg": "is a link to no file",
        b"nowhere.jpg": "is a link to no file",
        b"outward.jpg": "leads out of the folder",
    }
    names = [os.path.join(one.folder, name) for one in found.values() for name in one.files]
    assert usable_files(root, names)[0].all()
    assert [one.folder for one in walk(root / "none", (".jpg",))] == [b""]
