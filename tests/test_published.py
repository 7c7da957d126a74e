"""data.published: files of published teachers from a local server, and what others' LLMs wrote."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import teaching
from data.command import BadInput
from data.published import PUBLISHED, published
from data.runs import read_run

FILE = b"".join(f"{q} Q0 {d} {r} {6 - r} t\n".encode() for q in range(2000)
                for r, d in enumerate((7, 3, 9), 1))
MD5 = hashlib.md5(FILE).hexdigest()


@pytest.fixture
def serve():
    with teaching.servers() as start:
        yield start


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """PUBLISHED with one file on a local server."""
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "irds"))
    monkeypatch.setenv("IR_DATASETS_DL_DISABLE_PBAR", "true")
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def put(url):
        monkeypatch.setitem(PUBLISHED, "rankzephyr-50", (url, "teacher.run", MD5))
        return tmp_path / "irds" / "teachers" / "teacher.run"

    return put


def test_published_is_fetched_once(serve, shelf):
    url, seen = serve(lambda handler, number, body: teaching.reply(handler, 200, FILE))
    path = shelf(url)
    assert published("rankzephyr-50") == path and path.read_bytes() == FILE
    assert published("rankzephyr-50") == path and [p for p, *_ in seen] == ["/teacher.run"]
    assert read_run(path)["5"] == {"7": 5.0, "3": 4.0, "9": 3.0}


def test_published_is_fetched_by_one_process_at_a_time(serve, shelf):
    def slow(handler, number, body):
        time.sleep(0.3)
        teaching.reply(handler, 200, FILE)

    url, seen = serve(slow)
    path = shelf(url)
    # each call locks a file that it opened itself, as processes do
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(published, ["rankzephyr-50"] * 3)) == {path}
    assert len(seen) == 1 and path.read_bytes() == FILE


def test_published_with_another_checksum(serve, shelf):
    url, _ = serve(lambda handler, number, body: teaching.reply(handler, 200, FILE[:-1] + b"!"))
    path = shelf(url)
    with pytest.raises(BadInput, match=f"md5.*{MD5}") as e:
        published("rankzephyr-50")
    assert "\n" not in str(e.value) and not path.exists() and not list(path.parent.glob("*.tmp"))


def test_published_resumes_a_broken_transfer(serve, shelf):
    def half(handler, number, body):
        start = int((handler.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
        piece = FILE[start:] if number else FILE[: len(FILE) // 2]
        teaching.reply(handler, 206 if start else 200, piece, [("Accept-Ranges", "bytes")],
                       len(FILE) - start)

    url, seen = serve(half)
    path = shelf(url)
    assert published("rankzephyr-50").read_bytes() == FILE and path.exists()
    ranges = [{k.lower(): v for k, v in headers.items()}.get("range") for _, headers, _ in seen]
    assert ranges[0] is None and int(ranges[1][6:-1]) > 0 and len(seen) == 2


def test_published_offline_and_unknown(shelf, monkeypatch):
    monkeypatch.setenv("IR_DATASETS_DL_TRIES", "1")
    path = shelf("http://127.0.0.1:9")
    way = "offline, download http://127.0.0.1:9/teacher.run elsewhere .* its path"
    with pytest.raises(BadInput, match=way) as e:
        published("rankzephyr-50")
    assert "\n" not in str(e.value) and not path.exists()
    way = "offline, download https://huggingface.co/datasets/webis/rank-distillm"
    with pytest.raises(BadInput, match=way):
        published("hf-colbert")  # the hub is off in these tests
    with pytest.raises(BadInput, match="no-such.run: neither a file nor .*ensemble-t2"):
        published("no-such.run")


def test_published_parquet_becomes_a_run(shelf, monkeypatch, tmp_path):
    import huggingface_hub
    import pyarrow
    import pyarrow.parquet

    shelf("")
    rows = [("30", "d2", 1.0), ("30", "d9", 7.0), ("4", "d1", 2.0), ("30", "d5", 3.0),
            ("4", "d7", 2.5)]
    table = pyarrow.table([list(column) for column in zip(*rows, strict=True)],
                          names=["qid", "docno", "score"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *_, **__: str(tmp_path / "x.parquet"))
    with pytest.raises(BadInput, match="Expected md5"):
        published("hf-colbert")
    where, file, _ = PUBLISHED["hf-colbert"]
    md5 = hashlib.md5((tmp_path / "x.parquet").read_bytes()).hexdigest()
    monkeypatch.setitem(PUBLISHED, "hf-colbert", (where, file, md5))
    path = published("hf-colbert")
    assert read_run(path) == {"30": {"d9": 7.0, "d5": 3.0, "d2": 1.0}, "4": {"d7": 2.5, "d1": 2.0}}
    assert [line.split()[2:4] for line in path.read_text().splitlines()] == [
        ["d9", "1"], ["d5", "2"], ["d2", "3"], ["d7", "1"], ["d1", "2"]]


def test_docpairs(shelf, monkeypatch):
    import ir_datasets
    from ir_datasets.formats import GenericDocPair

    shelf("")

    class Train:
        def docpairs_iter(self):
            yield from [GenericDocPair("1", "22", "33"), GenericDocPair("2", "5", "6")]

    monkeypatch.setattr(ir_datasets, "load", {"msmarco-passage/train": Train()}.__getitem__)
    assert published("docpairs").read_text() == "1\t22\t33\n2\t5\t6\n"


@pytest.mark.parametrize("name", ["rankgpt-3.5", "rankvicuna"])
def test_real_llm_orders_are_read_as_they_are(shared_data, name):
    runs = shared_data / "trec-dl-2019" / "runs"
    teacher_run = read_run(runs / f"teacher-{name}.bm25.top100.txt")
    assert len(teacher_run) == 43
    for ranked in teacher_run.values():
        assert len(ranked) == 100
        scores = list(ranked.values())
        assert scores == sorted(scores, reverse=True) and len(set(scores)) > 50
