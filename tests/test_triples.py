"""data.triples.TripleFile, against the lines as Python reads them."""

import gzip
import os
import re
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

import data.cache
import data.triples
from data.command import BadInput
from data.triples import TripleFile

TEXTS = SimpleNamespace(name="D", all_queries={"q1", "q2"})
LINES = b"q1\td1\td2\nq2\td3\td4\n"


def gz(content):
    return gzip.compress(content, mtime=0)


def zst(content):
    return pa.compress(content, "zstd", asbytes=True)


PACKED = {"plain": bytes, "gzip": gz, "zstd": zst}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data.cache, "CACHE", tmp_path / "cache")


def written(tmp_path, content):
    (tmp_path / "t.tsv").write_bytes(content)
    return tmp_path / "t.tsv"


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("columns", [3, 5])
def test_values(tmp_path, packed, columns):
    """Told apart by the first bytes, whatever the name."""
    scores = ["9.5", "-1e3"] if columns == 5 else []
    rows = [[*scores, "q1", "d1", "é日本"], [*scores, "q2", '"d3', "d 4"]]
    content = "".join("\t".join(row) + "\n" for row in rows).encode()
    file = TripleFile(written(tmp_path, PACKED[packed](content)), TEXTS)
    assert (len(file), file.columns, file.header) == (2, columns, 0)
    assert [file.fields(i) for i in range(2)] == rows
    assert list(file) == [tuple(row[-3:]) for row in rows]
    assert file.where(1) == f"{tmp_path / 't.tsv'}:2"


@pytest.mark.parametrize("packed", PACKED)
def test_any_line_of_a_file_in_several_blocks(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(data.triples, "BLOCK", 1 << 12)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 10 ** rng.integers(1, 9, (2000, 2)))
    content = b"qid\tpos\tneg\n" + b"".join(b"q%d\td%d\td%d\n" % (1 + i % 2, *pair)
                                            for i, pair in enumerate(ids))
    file = TripleFile(written(tmp_path, PACKED[packed](content)), TEXTS)
    lines = content.decode().splitlines()
    assert len(file.batches) > 5 and len(file) == 2000
    for i in rng.permutation(2000).tolist():
        assert "\t".join(file.fields(i)) == lines[int(file.where(i).rpartition(":")[2]) - 1]
    assert ["\t".join(row) for row in file] == lines[1:]


BOM, HEADER = b"\xef\xbb\xbf", b"qid\tpos\tneg\n"
FORMS = {  # (content, its lines, whether the first is a header)
    "BOM": (BOM + LINES, 2, 0),
    "BOM and header": (BOM + HEADER + LINES, 2, 1),
    "packed BOM and header": (gz(BOM + HEADER + LINES), 2, 1),
    "CRLF": ((HEADER + LINES).replace(b"\n", b"\r\n") + b"\r\n", 2, 1),
    "blank lines at the end": (LINES + b"\n \n\t\t\n\n", 2, 0),
    "no end of the last line": (LINES[:-1], 2, 0),
    "one line": (LINES[:9], 1, 0),
    "a first query that is not of the dataset": (b"nobody\td1\td2\n" + LINES, 2, 1),
}


@pytest.mark.parametrize("form", FORMS)
def test_as_other_programs_write_them(tmp_path, capsys, form):
    content, rows, header = FORMS[form]
    file = TripleFile(written(tmp_path, content), TEXTS)
    assert list(file) == [("q1", "d1", "d2"), ("q2", "d3", "d4")][:rows]
    assert len(file) == rows and file.header == header
    assert file.where(0).endswith(f"t.tsv:{1 + header}")
    assert capsys.readouterr().err.count("t.tsv:1: taken for a header and skipped") == header


def test_without_a_dataset_no_line_is_a_header(tmp_path):
    assert list(TripleFile(written(tmp_path, b"qid\tpos\tneg\n" + LINES)))[0][0] == "qid"


def test_the_scores_of_five_columns_say_nothing_of_a_header(tmp_path):
    content = b"pos_score\tneg_score\tqid\tpos\tneg\n-1.5\tnan\tq1\td1\td2\n"
    assert list(TripleFile(written(tmp_path, content), TEXTS)) == [("q1", "d1", "d2")]


NOISE = b"".join(b"q1\td%d\td%d\n" % tuple(pair)
                 for pair in np.random.default_rng(0).integers(0, 10**9, (9999, 2)))
WRONG = {  # (content, what is said behind the name of the file)
    "nothing": (b"", ": empty; expected one triple per line"),
    "blank lines": (b"\n\n", ": empty"),
    "packed nothing": (gz(b""), ": empty"),
    "a blank first line": (b"\n" + LINES, ": empty"),
    "a header alone": (HEADER, ":1: query 'qid' is not in dataset D; triples hold ids"),
    "texts": (b"words " * 99 + b"\td1\td2\n", ":1: query 'words words "),
    "another dataset": (b"1\t2\tnobody\td1\td2\n" * 2, ":1: query 'nobody' is not in dataset D"),
    "two columns": (b"q1\td1\n", ":1: 2 tab-separated columns; expected qid pos neg"),
    "four columns": (b"q1\td1\td2\td3\n", ":1: 4 tab-separated columns; expected"),
    "a line of two": (LINES + b"q1\td1\n", ":3: 2 tab-separated columns, 3 in the lines before"),
    "a line of five": (LINES + b"1\t2\tq1\td1\td2\n", ":3: 5 tab-separated columns, 3 in"),
    "a line of three": (b"1\t2\tq1\td1\td2\n" + LINES, ":2: 3 tab-separated columns, 5 in"),
    "a gap": (LINES + b"\n" + LINES, ":3: 1 tab-separated columns"),
    "a gap of blanks": (LINES + b" \r\n\n" + LINES, ":3: 1 tab-separated columns"),
    "a gap of tabs": (LINES + b"\t\t\n" + LINES, ":3: 3 tab-separated columns"),
    "no query": (LINES + b"\td1\td2\n", ":3: the id of its query is empty"),
    "CRCRLF": (LINES.replace(b"\n", b"\r\r\n"), ": lines hold carriage returns"),
    "a document of Latin-1": (LINES + b"q1\t\xff\td2\n", ":3: not UTF-8"),
    "a query of Latin-1": (b"\xff\td1\td2\n", ":1: not UTF-8"),
    "a line beyond a block": (b"q1\t" + b"d" * 9999 + b"\td1\n", ": cannot be read (straddling"),
    "five bytes of gzip": (gz(NOISE)[:5], ": damaged gzip"),
    "half of gzip": (gz(NOISE)[:50_000], ": damaged gzip"),
    "gzip with another checksum": (gz(NOISE)[:-6] + b"abcdef", ": damaged gzip"),
    "no gzip": (b"\x1f\x8bxxxx\n", ": damaged gzip"),
    "gzip and more": (gz(LINES) + b"junk", ": damaged gzip"),
    "half of zstd": (zst(NOISE)[:50_000], ": damaged gzip or zstd"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, wrong):
    content, what = WRONG[wrong]
    monkeypatch.setattr(data.triples, "BLOCK", 1 << 12)
    path = written(tmp_path, content)
    with pytest.raises(BadInput, match=f"^{re.escape(f'{path}{what}')}") as e:
        list(TripleFile(path, TEXTS))
    assert "\n" not in str(e.value) and len(str(e.value)) < 300
    assert not list(tmp_path.glob("cache/*.*"))  # no half of a file


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.tsv", tmp_path):
        with pytest.raises(BadInput, match=f"{path}: not found"):
            TripleFile(path)


def test_a_full_disk_is_not_the_files_fault(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = written(tmp_path, LINES)
    monkeypatch.setattr(pa.ipc, "new_file", full)
    with pytest.raises(OSError, match="No space left"):
        TripleFile(path)


def test_the_cache_is_used_again_until_the_file_changes(tmp_path, monkeypatch):
    path, made = written(tmp_path, LINES), []
    to_arrow = data.triples._to_arrow

    def counted(*args):
        made.append(args)
        to_arrow(*args)

    monkeypatch.setattr(data.triples, "_to_arrow", counted)
    assert list(TripleFile(path)) == list(TripleFile(path)) and len(made) == 1
    before = path.stat().st_mtime_ns
    written(tmp_path, LINES.replace(b"d4", b"d5"))  # of the same size
    os.utime(path, ns=(before + 1, before + 1))
    assert list(TripleFile(path))[1] == ("q2", "d3", "d5") and len(made) == 2
    written(tmp_path, LINES * 2)
    os.utime(path, ns=(before, before))
    assert len(TripleFile(path)) == 4 and len(made) == 3


def test_a_damaged_cache_is_named(tmp_path):
    path = written(tmp_path, LINES)
    TripleFile(path)
    kept = next(tmp_path.glob("cache/triples-*/lines.arrow"))
    kept.write_bytes(b"x" * 99)
    with pytest.raises(BadInput, match=f"^{kept}: damaged .* remove it: it is made anew"):
        TripleFile(path)
