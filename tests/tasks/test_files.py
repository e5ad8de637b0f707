"""Which files are taken for images, and the names of what is made of them."""

from __future__ import annotations

import os
from itertools import permutations
from pathlib import Path

import pytest

from efficientvit_kernels.tasks.files import LONGEST_NAME, find_images


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folders(tmp_path: Path) -> None:
    make(tmp_path, "b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/c.webp", "sub/deep/b.png", ".git/d.png")
    files, problems = find_images([tmp_path])
    assert not problems
    assert [(file.path.relative_to(tmp_path).as_posix(), file.name) for file in files] == [
        ("a.JPG", "a"),
        ("b.png", "b"),
        ("sub/c.webp", "sub_c"),
        ("sub/deep/b.png", "sub_deep_b"),
    ]


def test_a_file_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    make(tmp_path, "picture", "x.dat")
    files, _ = find_images([tmp_path / "picture", tmp_path / "x.dat"])
    assert [file.name for file in files] == ["picture", "x"]


def test_names_never_collide(tmp_path: Path) -> None:
    make(tmp_path, "one/x.png", "one/x.jpg", "two/x.png", "two/X.png", "three/one/x.png", "one_x.png", "x-2.png")
    paths = [tmp_path / name for name in ("one", "two", "three", "one_x.png", "x-2.png")]
    for order in permutations(paths, 5):
        files, _ = find_images(order)
        names = [file.name.casefold() for file in files]
        assert len(set(names)) == len(names) == 7
    files, _ = find_images(paths)
    assert [file.name for file in files] == ["x", "x-2", "X-3", "x-4", "one_x", "one_x-2", "x-2-2"]


def test_each_file_once(tmp_path: Path) -> None:
    make(tmp_path, "in/x.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "in/x.png")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    files, problems = find_images([tmp_path / "in/x.png", tmp_path / "in", tmp_path / "link.png"])
    assert ([file.path for file in files], problems) == ([tmp_path / "in/x.png"], [])


def test_results_inside_a_folder_are_no_input(tmp_path: Path) -> None:
    make(tmp_path, "x.png", "out/x_overlay.png")
    assert [file.name for file in find_images([tmp_path], tmp_path / "out")[0]] == ["x"]
    assert len(find_images([tmp_path], tmp_path)[0]) == 2
    assert len(find_images([tmp_path])[0]) == 2


def test_problems(tmp_path: Path) -> None:
    make(tmp_path, "x.png", "notes/a.txt")
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    files, problems = find_images(
        [tmp_path / "nowhere.png", tmp_path / "x.png", tmp_path / "notes", tmp_path / "broken.png"]
    )
    assert [file.name for file in files] == ["x"]
    assert [str(problem).removeprefix(f"{tmp_path}{os.sep}") for problem in problems] == [
        "nowhere.png: does not exist",
        "notes: is a folder without images",
        "broken.png: does not exist",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_folder_that_may_not_be_read(tmp_path: Path) -> None:
    make(tmp_path, "in/x.png", "in/secret/y.png")
    (tmp_path / "in/secret").chmod(0)
    files, problems = find_images([tmp_path / "in"])
    (tmp_path / "in/secret").chmod(0o700)
    assert [file.name for file in files] == ["x"]
    assert [problem.cause for problem in problems] == ["Permission denied"]


def test_odd_names(tmp_path: Path) -> None:
    long = "ä" * 120
    names = [f"{long}1.png", f"{long}2.png", "a.b.png", "two words.png"]
    make(tmp_path, *names)
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb"):
        pass
    files, problems = find_images([tmp_path])
    assert not problems
    assert len({file.name for file in files}) == 5
    assert {"a.b", "two words", "image"} < {file.name for file in files}
    assert all(len(file.name.encode()) <= LONGEST_NAME for file in files)
