"""Which file an operating system's error is of: a write to an open file, and a flush of it, do not say so."""

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike, fspath


@contextmanager
def naming(path: str | PathLike) -> Iterator[None]:
    """An OSError inside has the name of `path` in its text, unless it names a file already."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = fspath(path)
        raise
