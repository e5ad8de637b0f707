"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


@contextmanager
def written_whole(path: Path, durable: bool = False) -> Iterator[Path]:
    """An empty file beside `path` to write to, or over; it takes the place of `path` when the block ends without error.

    Until then, and after an error, what was under `path` stays; nothing is left behind. Its permissions are those that
    the umask allows, whatever writes it.

    Args:
        durable: the content is on disk before the name is, so that even a crash of the machine leaves one or the other.

    Raises: OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{token_hex(8)}")  # not of path's name, which may be as long as names can be
    try:
        with open(temporary, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        temporary.chmod(mode)
        if durable:
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
