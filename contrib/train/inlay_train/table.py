"""Tables of text from files: csv, tsv, jsonl, parquet; what cannot be read is named by line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay import InlayError
from inlay.errors import near

LONGEST_CELL = 1 << 30
GUESSES = ("cp1252", "latin-1")  # latin-1 reads any bytes, so it is the last


@dataclass(frozen=True)
class Table:
    """Rows of a file with named columns. `lines[i]` is where row i stands in the file, from 1 on."""

    path: Path
    columns: dict[str, list[Any]]
    lines: Sequence[int]

    def __len__(self) -> int:
        return len(self.lines)

    def texts(self, name: str) -> list[str]:
        """Return a column of texts; a cell that is missing or not text is an error."""
        values = self._column(name)
        for line, value in zip(self.lines, values, strict=True):
            if not isinstance(value, str):
                raise self._bad_cell(name, line, value, "text")
        return values

    def labels(self, name: str) -> list[str]:
        """Return a column of labels as text; whole numbers and true/false count as labels."""
        values = self._column(name)
        for line, value in zip(self.lines, values, strict=True):
            if not isinstance(value, (str, int)) or value == "":
                raise self._bad_cell(name, line, value, "a label")
        return [str(value) for value in values]

    def rows(self, indices: Sequence[int]) -> Table:
        """Return the table of these rows, in this order."""
        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return Table(self.path, columns, [self.lines[i] for i in indices])

    def _column(self, name: str) -> list[Any]:
        if name not in self.columns:
            raise InlayError(
                f"the data has no column {name!r}",
                saw=f"{self.path.name} with the columns {', '.join(map(repr, self.columns))}",
                do=near(name, self.columns),
            )
        return self.columns[name]

    def _bad_cell(self, name: str, line: int, value: Any, wanted: str) -> InlayError:
        shown = "nothing" if value is None or value == "" else f"{value!r:.60} ({type(value).__name__})"
        return InlayError(
            f"a cell of the column {name!r} is not {wanted}",
            saw=f"{shown} in line {line} of {self.path.name}",
            do="correct or remove that row",
        )


def read(path: str | Path, *, encoding: str = "utf-8") -> Table:
    """Return the table in a file; its ending says how it is written.

    csv and tsv begin with a line of column names; cells of a tsv are never quoted. Every line of a
    jsonl is an object. Raises `InlayError` naming the line at fault.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InlayError(
            "this kind of file is not read",
            saw=f"{path.name} ends in {path.suffix!r}" if path.suffix else f"{path.name} has no ending",
            do=f"give a file that ends in {', '.join(READERS)}",
        )
    if not path.is_file():
        raise InlayError("there is no such file", saw=str(path), do=_nearby(path))
    table = reader(path, encoding)
    if not len(table):
        raise InlayError(
            "the data has no rows",
            saw=f"{path.name}, {path.stat().st_size:,} bytes",
            do="give a file with a row for each text",
        )
    return table


def _nearby(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; check the path"
    files = [p.name for p in path.parent.iterdir() if p.suffix.lower() in READERS]
    return (
        near(path.name, files) if files else f"{path.parent} has no file that could be read; check the path"
    )


def _csv(path: Path, encoding: str) -> Table:
    return _separated(path, encoding, delimiter=",")


def _tsv(path: Path, encoding: str) -> Table:
    return _separated(path, encoding, delimiter="\t", quoting=csv.QUOTE_NONE)


def _separated(path: Path, encoding: str, **style: Any) -> Table:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(_decoded(path, encoding), newline=""), strict=True, **style)
    try:
        names = next(reader, [])
        _check_names(path, names)
        lines, rows = [], []
        line = reader.line_num + 1
        for row in reader:
            if row:  # not an empty line
                _check_width(path, line, row, names)
                lines.append(line)
                rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        raise _unreadable(path, f"line {reader.line_num}: {error}") from error
    return Table(path, {name: [row[i] for row in rows] for i, name in enumerate(names)}, lines)


def _check_names(path: Path, names: Sequence[str]) -> None:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise InlayError(
            "two columns have the same name",
            saw=f"{', '.join(map(repr, twice))} in the first line of {path.name}",
            do="give every column a name of its own",
        )


def _check_width(path: Path, line: int, row: Sequence[str], names: Sequence[str]) -> None:
    if len(row) != len(names):
        raise InlayError(
            "a row has another number of cells than there are columns",
            saw=f"{len(row)} cells in line {line} of {path.name}, which has {len(names)} columns",
            do="correct that line; cells of a csv that hold a comma or a line break are put in quotes",
        )


def _jsonl(path: Path, encoding: str) -> Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for line, text in enumerate(_decoded(path, encoding).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, f"line {line}: {error}") from error
        if not isinstance(row, dict):
            raise _unreadable(path, f"line {line} is a {type(row).__name__}, not an object")
        rows.append(row)
        lines.append(line)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, lines)


def _parquet(path: Path, encoding: str) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, str(error).splitlines()[0]) from error
    columns = {name: table.column(i).to_pylist() for i, name in enumerate(table.column_names)}
    return Table(path, columns, range(1, table.num_rows + 1))


def _decoded(path: Path, encoding: str) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError as error:
        raise InlayError(
            "there is no such text encoding",
            saw=repr(encoding),
            do="give one that Python knows, such as utf-8, latin-1, cp1252 or utf-16",
        ) from error
    except UnicodeError as error:
        raise _undecodable(path, data, encoding, error) from error


def _undecodable(path: Path, data: bytes, encoding: str, error: UnicodeError) -> InlayError:
    saw = f"{path.name}: {error}"
    if isinstance(error, UnicodeDecodeError):
        line = data.count(b"\n", 0, error.start) + 1
        saw = f"byte {data[error.start]:#04x} in line {line} of {path.name}"
    return InlayError(
        f"the file is not text in the encoding {encoding}",
        saw=saw,
        do="; or ".join(f"--encoding {guess}" for guess in _reading(data, encoding)),
    )


def _reading(data: bytes, but: str) -> Iterator[str]:
    """Yield the encodings to try: those that read these bytes, other than the one that did not."""
    marked = ("utf-16",) if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ()
    for guess in (*marked, "utf-8", *GUESSES):
        try:
            data.decode(guess)
        except UnicodeError:
            continue
        if guess != but:
            yield guess


def _unreadable(path: Path, why: str) -> InlayError:
    return InlayError(
        f"the file cannot be read as {path.suffix.lower()[1:]}",
        saw=f"{path.name}, {why}",
        do="correct the file, or give it the ending that fits what is in it",
    )


READERS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
