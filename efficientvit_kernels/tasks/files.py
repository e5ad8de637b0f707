"""Which files are images, and which names their outputs get."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .batch import Problem

# Looked for in folders. A file that is named itself is read whatever its suffix: its content says what it is.
SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm"}
    | {".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
LONGEST_NAME = 150  # bytes; file systems allow 255, and outputs add a suffix


@dataclass(frozen=True)
class ImageFile:
    """An image, and the name that its outputs start with: no other image of the same call has it."""

    path: Path
    name: str


def find_images(
    paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str] | None = None
) -> tuple[list[ImageFile], list[Problem]]:
    """The image files that `paths` name, each once, in order; and what is wrong with the paths.

    Folders are searched to any depth, in sorted order, for files with one of `SUFFIXES`; hidden files and folders are
    left out, links to folders are not followed, and a folder `out` inside is not searched. An image's name is its
    path below the named folder with "_" for the separators, or its own name; a number is added where that is taken,
    with capitals and small letters taken for the same, as some file systems do.
    """
    files: list[ImageFile] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    names: set[str] = set()
    for path in map(Path, paths):
        if os.path.isdir(path):
            inside = list(_walk(path, None if out is None else os.path.realpath(out), problems))
            if not inside:
                problems.append(Problem(path, "is a folder without images"))
            found = [(path / relative, relative) for relative in inside]
        else:
            found = [(path, Path(path.name))]
        for file, relative in found:
            real = os.path.realpath(file)
            if not os.path.exists(file):
                problems.append(Problem(file, "does not exist"))
            elif real not in seen:
                seen.add(real)
                files.append(ImageFile(file, _new_name(relative, names)))
    return files, problems


def _walk(folder: Path, out: str | None, problems: list[Problem]) -> Iterator[Path]:
    """Paths of the images in `folder`, relative to it."""

    def unreadable(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), error.strerror or str(error)))

    for parent, folders, files in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) != out
        )
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder)


def _new_name(path: Path, names: set[str]) -> str:
    stem = "_".join(path.with_suffix("").parts)
    stem = os.fsencode(stem)[-LONGEST_NAME:].decode("utf-8", "ignore") or "image"
    name, number = stem, 1
    while name.casefold() in names:
        number += 1
        name = f"{stem}-{number}"
    names.add(name.casefold())
    return name
