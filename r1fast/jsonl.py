"""JSONL and JSON arrays: objects with their line numbers, read with errors that say where, written whole."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import IO

from r1fast.file_errors import naming
from r1fast.partial import partial_of

MAX_LINE = 1 << 28  # bytes of a line
MAX_ARRAY = 1 << 31  # characters of a .json file, which is read as a whole


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """(line number, object) of each line that is not blank."""
    for line, text in read_lines(path):
        try:
            row = _parsed(text)
        except (ValueError, RecursionError) as error:
            hint = ""
            if line == 1 and str(path).removesuffix(".gz").endswith((".csv", ".tsv")):
                hint = " (a CSV? JSON Lines are read here, one object a line; presets of evaluate read CSV)"
            raise ValueError(f"{path}:{line}: not valid JSON: {error}{hint}") from None
        if not isinstance(row, dict):
            hint = " (JSON Lines: one object a line, no array around)" * isinstance(row, list)
            raise ValueError(
                f"{path}:{line}: expected a JSON object, got {type(row).__name__} "
                f"{text[:60]!r}{hint}"
            )
        yield line, row


def read_rows(path: str | Path) -> Iterator[tuple[int, dict]]:
    """`read_jsonl`, or (position from 1, object) of a .json file that is one array, as MBPP's is."""
    path = Path(path)
    lines = (text for _, text in read_lines(path))
    if path.suffix != ".json" or not next(lines, "").lstrip().startswith("["):
        yield from read_jsonl(path)
        return
    parts, num_chars = [], 0
    for _, part in read_lines(path):
        parts.append(part)
        num_chars += len(part)
        if num_chars > MAX_ARRAY:
            raise ValueError(f"{path}: an array of over {MAX_ARRAY >> 30} GiB; use JSON Lines")
    text = "\n".join(parts)
    try:
        rows = _parsed(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON array of objects, got {text[:60]!r}")
    yield from enumerate(rows, 1)


def _parsed(text: str) -> object:
    return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_each_once)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _each_once(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there more than once, and only one can count")
    return found


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of each line that is not blank; only \\n ends a line, of at most MAX_LINE bytes."""
    path = Path(path)
    if not os.path.isfile(path):  # False, too, for a name that is too long
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"data file {str(path)!r} {what}")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line, raw in enumerate(_raw_lines(file, path), 1):
            if line == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise ValueError(f"{path}:1: is UTF-16; save it as UTF-8")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}:{line}: not valid UTF-8 at byte {error.start}: {error.reason}"
                ) from None
            if "\0" in text:
                raise ValueError(f"{path}:{line}: holds a NUL byte")
            if text.strip():
                yield line, text.rstrip("\r\n")


def _raw_lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Lines of bounded length: a few kilobytes of gzip can be a line of gigabytes."""
    for line in itertools.count(1):
        try:
            raw = file.readline(MAX_LINE + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{line}: not a whole gzip file: {error}") from None
        if not raw:
            return
        if len(raw) > MAX_LINE:
            raise ValueError(f"{path}:{line}: a line of over {MAX_LINE >> 20} MiB; one row a line")
        yield raw


def write_jsonl(path: str | Path, rows: Iterable) -> int:
    """Write mappings or dataclasses, one a line, all or nothing; returns how many."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    num_rows = 0
    try:
        with naming(partial), partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                row = asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
                num_rows += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return num_rows


def append_jsonl(path: str | Path, rows: Iterable[Mapping]) -> None:
    """Append mappings, one a line, all or none: where the disk is full (OSError), no torn line stays."""
    rest = memoryview("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
    with naming(path), Path(path).open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise
