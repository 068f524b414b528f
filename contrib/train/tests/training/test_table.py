"""Reading tables: every kind of file, and what is said of those that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from inlay import InlayError
from inlay_train.table import read

ROWS = [("a, b", "x"), ('say "c"', "y")]


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_kind_of_file_gives_the_same_table(tmp_path: Path) -> None:
    csv = file(tmp_path, "t.csv", 'text,label\n"a, b",x\n\n"say ""c""",y\n')
    tsv = file(tmp_path, "t.tsv", 'text\tlabel\r\na, b\tx\r\nsay "c"\ty\r\n')
    lines = "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS)
    jsonl = file(tmp_path, "t.JSONL", f"{lines}\n\n")
    columns = {"text": [r[0] for r in ROWS], "label": [r[1] for r in ROWS]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    for path in (csv, tsv, jsonl, tmp_path / "t.parquet"):
        table = read(path)
        assert (table.texts("text"), table.labels("label")) == (columns["text"], columns["label"]), path
    assert list(read(csv).lines) == [2, 4]


def test_a_mark_of_byte_order_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    assert read(file(tmp_path, "t.csv", b"\xef\xbb\xbftext\nhello\n")).texts("text") == ["hello"]


def test_other_encodings_are_read_when_named(tmp_path: Path) -> None:
    path = file(tmp_path, "t.csv", "text\nna\xefve\n".encode("latin-1"))
    assert read(path, encoding="latin-1").texts("text") == ["naïve"]


def test_whole_numbers_and_truths_are_labels(tmp_path: Path) -> None:
    path = file(tmp_path, "t.jsonl", '{"label": 3}\n{"label": true}\n{"label": "x"}\n')
    assert read(path).labels("label") == ["3", "True", "x"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.xlsx", "", r"file is not read\n.*t\.xlsx ends in '\.xlsx'\n.*\.csv, \.tsv, \.jsonl, \.parquet"),
        ("data", "", r"data has no ending"),
        ("t.csv", "", r"the data has no rows\n.*t\.csv, 0 bytes"),
        ("t.csv", "text,label\n", r"the data has no rows\n.*11 bytes"),
        ("t.csv", "a,a\n1,2\n", r"two columns have the same name\n.*'a' in the first line"),
        ("t.csv", "a,b\n1,2\n3\n", r"another number of cells.*\n.*1 cells in line 3 of t\.csv, which has 2"),
        ("t.csv", 'a,b\n1,"2\n', r"cannot be read as csv\n.*line \d: unexpected end of data"),
        ("t.jsonl", '{"a": 1}\n{"a"\n', r"cannot be read as jsonl\n.*line 2: Expecting ':'"),
        ("t.jsonl", "[1]\n", r"cannot be read as jsonl\n.*line 1 is a list, not an object"),
        ("t.parquet", "text", r"cannot be read as parquet\n.*Parquet"),
        ("t.csv", b"text\nok\nna\xefve\n", r"the encoding utf-8\n.*0xef in line 3.*\n.*--encoding cp1252"),
        ("t.csv", b"text\n\x81\n", r"byte 0x81 in line 2 of t\.csv\n.*do:  --encoding latin-1$"),
        ("t.csv", b"\xff\xfet\x00\n\x00", r"encoding utf-8\n.*\n.*do:  --encoding utf-16; or"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    with pytest.raises(InlayError, match=told):
        read(file(tmp_path, name, content))


def test_a_wrong_encoding_is_told(tmp_path: Path) -> None:
    path = file(tmp_path, "t.csv", "text\nhello\n")
    with pytest.raises(InlayError, match=r"no such text encoding\n.*'latin-eins'"):
        read(path, encoding="latin-eins")
    with pytest.raises(
        InlayError, match=r"in the encoding utf-16\n.*0x0a in line 2.*\n.*--encoding utf-8; or"
    ):
        read(path, encoding="utf-16")
    with pytest.raises(InlayError, match=r"in the encoding undefined\n.*t\.csv: .*undefined encoding"):
        read(path, encoding="undefined")


def test_a_missing_file_is_told_with_its_neighbours(tmp_path: Path) -> None:
    file(tmp_path, "train.csv", "a\n1\n")
    with pytest.raises(InlayError, match=r"no such file\n.*trian\.csv\n.*did you mean 'train\.csv'\?"):
        read(tmp_path / "trian.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InlayError, match=r"no file that could be read"):
        read(tmp_path / "empty" / "x.csv")
    with pytest.raises(InlayError, match=r"there is no folder .*nowhere either"):
        read(tmp_path / "nowhere" / "x.csv")


def test_columns_and_cells_that_do_not_fit_are_told(tmp_path: Path) -> None:
    path = file(
        tmp_path, "t.jsonl", '{"text": "a", "label": 1}\n\n{"text": null, "label": ""}\n{"text": 2.5}\n'
    )
    table = read(path)
    with pytest.raises(
        InlayError, match=r"no column 'txt'\n.*columns 'text', 'label'\n.*did you mean 'text'"
    ):
        table.texts("txt")
    with pytest.raises(InlayError, match=r"'text' is not text\n.*nothing in line 3 of t\.jsonl"):
        table.texts("text")
    with pytest.raises(InlayError, match=r"'text' is not text\n.*2\.5 \(float\) in line 4"):
        table.rows([2]).texts("text")
    with pytest.raises(InlayError, match=r"'label' is not a label\n.*nothing in line 3"):
        table.labels("label")
