"""rerank.py: datasets and their errors, BM25 against the formula, blocks, resumption, long
documents, the command."""

import gzip
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import tqdm

import rerank
import toy
from data import cache
from data.command import BadInput, guarded
from data.first_stages import bm25
from data.paper import SUITES
from data.run_names import run_name
from data.runs import RUN, best_first, read_columns, read_run, trec_order
from data.suites import datasets_of
from kernels.encoder import CrossEncoder
from kernels.sigmoid import sigmoid_in_order


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerank")
    toy.corpus(folder / "corpus")
    toy.model(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "CACHE", folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def texts(place):
    return rerank.Texts(str(place / "corpus"))


@pytest.fixture(scope="module")
def model(place):
    return CrossEncoder.from_pretrained(place / "model", device="cpu")


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["rerank.py", "--dtype", "float32", *map(str, argv)])
    return guarded(rerank.main)


# ----------------------------------------------------------------------------------------- datasets


def test_folder_is_read_as_written(place, texts):
    lines = (place / "corpus" / "corpus.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert texts.documents([r["_id"] for r in rows]) == {r["_id"]: r["text"] for r in rows}
    assert dict(texts.corpus()) == {r["_id"]: r["text"] for r in rows} and len(texts) == 60
    assert texts.documents(["nowhere", "d3"]).keys() == {"d3"}
    assert texts.missing(["nowhere", "d3"]) == ["nowhere"]
    assert texts.queries.keys() == texts.qrels.keys() == {"q9", "q19"}
    assert len(texts.all_queries) == 20
    assert rerank.Texts(f"{place / 'corpus'}/train").split == "train"


def test_long_and_titled_documents(tmp_path):
    long = "wörd " * 9000
    last = "last line without a newline"
    rows = [{"_id": "a", "title": "Title", "text": long}, {"_id": "b", "title": "", "text": last}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "q"}\n')
    expected = {"a": f"Title {long}", "b": last}
    assert rerank.Texts(str(tmp_path)).documents("ab") == expected


GOOD = {"corpus.jsonl": b'{"_id": "a", "text": "x"}\n',
        "queries.jsonl": b'{"_id": "1", "text": "q"}\n',
        "qrels/test.tsv": b"query-id\tcorpus-id\tscore\n1\ta\t1\n"}


@pytest.mark.parametrize("name, content, where, what", [
    ("corpus.jsonl", b'{"_id": "a", "text": "x"}\n{"_id": "b"\n', "corpus.jsonl:2", "JSON"),
    ("corpus.jsonl", 2 * GOOD["corpus.jsonl"], "corpus.jsonl:2", "twice"),
    ("corpus.jsonl", b'{"_id": 7, "text": "x"}\n', "corpus.jsonl:1", "strings"),
    ("corpus.jsonl", b'{"_id": "a", "text": "\xff"}\n', "corpus.jsonl:1", "UTF-8"),
    ("corpus.jsonl", gzip.compress(GOOD["corpus.jsonl"], mtime=0), "corpus.jsonl:1", "gzip|UTF-8"),
    ("queries.jsonl", 2 * GOOD["queries.jsonl"], "queries.jsonl:2", "twice"),
    ("qrels/test.tsv", b"query-id\tcorpus-id\tscore\n1\ta\n", "test.tsv:2", "column|field"),
    ("qrels/test.tsv", b"query-id\tcorpus-id\tscore\n2\ta\t1\n", "test.tsv", "'2'"),
])
def test_broken_folders_are_named_by_file_and_line(tmp_path, name, content, where, what):
    (tmp_path / "qrels").mkdir()
    for file, good in GOOD.items():
        (tmp_path / file).write_bytes(content if file == name else good)
    with pytest.raises(BadInput) as e:
        rerank.Texts(str(tmp_path))
    assert f"{where}" in str(e.value) and re.search(what, str(e.value)) and "\n" not in str(e.value)


def test_unknown_datasets(tmp_path):
    with pytest.raises(BadInput, match="neither a folder nor"):
        rerank.Texts("no/such/dataset")
    (tmp_path / "corpus.jsonl").write_bytes(GOOD["corpus.jsonl"])
    with pytest.raises(BadInput, match="queries.jsonl: not found"):
        rerank.Texts(str(tmp_path))


def test_missing_split_names_those_there(place):
    with pytest.raises(BadInput, match="dev, test, train"):
        rerank.Texts(str(place / "corpus"), split="validation")


# ------------------------------------------------------------------------------------- first stages


def test_bm25_is_the_formula(texts):
    """Lucene's BM25 in float64; the made-up words have no suffix that the stemmer takes off."""
    docs = {d: t.split() for d, t in texts.corpus()}
    mean = sum(map(len, docs.values())) / len(docs)
    frequency = Counter(w for words in docs.values() for w in set(words))
    got = bm25(texts, texts.all_queries, depth=60)
    for qid, query in texts.all_queries.items():
        expected = {}
        for docid, words in docs.items():
            total = 0.0
            for w in query.split():
                tf, df = words.count(w), frequency[w]
                if tf:
                    idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
                    total += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(words) / mean))
            if total:
                expected[docid] = total
        assert got[qid].keys() == expected.keys()
        assert all(abs(got[qid][d] - s) < 1e-4 for d, s in expected.items())


def test_bm25_cut_is_the_top_of_the_full_list(texts):
    full, cut = bm25(texts, texts.queries, 60), bm25(texts, texts.queries, 7)
    for qid in full:
        assert list(cut[qid].items()) == best_first(full[qid].items())[:7]


def test_splade_is_the_inner_product_of_the_term_weights(place, texts, tmp_path):
    """Against a dense computation, one text at a time, of log(1 + relu) and max over positions."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    tokenizer = toy.tokenizer()
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                        initializer_range=1.0, num_attention_heads=2, intermediate_size=16,
                        max_position_embeddings=64)
    mlm = BertForMaskedLM(config).eval()
    mlm.save_pretrained(tmp_path / "splade")
    tokenizer.save_pretrained(tmp_path / "splade")

    def vector(text):
        with torch.no_grad():
            logits = mlm(**tokenizer(text, return_tensors="pt")).logits[0].double()
        return torch.log1p(logits.relu()).amax(0)

    documents = {d: vector(t) for d, t in texts.corpus()}
    for again in range(2):  # the second time from the cache
        got = rerank.first_stage(texts, None, f"splade:{tmp_path / 'splade'}", 7)
        for qid, query in texts.queries.items():
            expected = {d: float(vector(query) @ v) for d, v in documents.items()}
            top = best_first(expected.items())[:7]
            assert list(got[qid]) == [d for d, _ in top], again
            assert list(got[qid].values()) == pytest.approx([s for _, s in top], rel=1e-4)
    # a head made up at random would score at random
    with pytest.raises(BadInput, match="no masked language model"):
        rerank.first_stage(texts, None, f"splade:{place / 'model'}", 7)


def test_ties_go_by_docid_descending():
    ranked = best_first([("a", 1.0), ("c", 1.0), ("b", 2.0), ("d10", 1.0), ("d9", 1.0)])
    assert ranked == [("b", 2.0), ("d9", 1.0), ("d10", 1.0), ("c", 1.0), ("a", 1.0)]


def test_ids_of_a_run_are_checked(tmp_path, texts):
    file = tmp_path / "first.run"
    file.write_text("q1 Q0 d1 1 2.0 x\nq1 Q0 d2 2 1.0 x\nq2 Q0 nowhere 1 1.0 x\n")
    with pytest.raises(BadInput, match=r"first.run:3: document 'nowhere'"):
        rerank.first_stage(texts, file, None, 10)
    assert rerank.first_stage(texts, file, None, 10, skip_missing=True)["q2"] == {}
    file.write_text("q1 Q0 d1 1 2.0 x\nq99 Q0 d2 2 1.0 x\n")
    with pytest.raises(BadInput, match=r"first.run:2: query 'q99'"):
        rerank.first_stage(texts, file, None, 10)
    packed = tmp_path / "first.run.zst"  # also packed, and with an empty line on the way
    packed.write_bytes(pa.compress(b"q1 Q0 d1 1 2.0 x\n\nq99 Q0 d2 2 1.0 x\n", "zstd",
                                   asbytes=True))
    with pytest.raises(BadInput, match=r"first.run.zst:3: query 'q99'"):
        rerank.first_stage(texts, packed, None, 10)


def test_depth_cuts_by_score_not_by_line(tmp_path, texts):
    file = tmp_path / "first.run"
    file.write_text("q1 Q0 d1 1 1.0 x\nq1 Q0 d2 2 3.0 x\nq1 Q0 d3 3 2.0 x\n")
    assert rerank.first_stage(texts, file, None, 2) == {"q1": {"d2": 3.0, "d3": 2.0}}


# ------------------------------------------------------------------------------------------ scoring


def first(texts):
    return bm25(texts, texts.all_queries, 20)


def test_scores_are_the_models_own(texts, model):
    candidates = first(texts)
    got = rerank.score_run(model, texts, candidates)
    documents = dict(texts.corpus())
    for qid, ranked in candidates.items():
        expected = model.score([texts.all_queries[qid]] * len(ranked),
                               [documents[d] for d in ranked])
        assert list(got[qid]) == list(ranked)
        np.testing.assert_allclose(list(got[qid].values()), expected.numpy(), atol=1e-5)


def test_blocks_hold_whole_queries_in_order():
    made = {f"q{i}": dict.fromkeys(range(n), 0.0) for i, n in enumerate([3, 5, 1, 9, 2])}
    assert rerank.blocks_of(made, 8) == [["q0", "q1"], ["q2", "q3"], ["q4"]]
    assert rerank.blocks_of({}, 8) == []


def test_passages_cover_the_document():
    ids = np.arange(10)

    def passages(length, stride):
        return [p.tolist() for p in rerank.split_passages(ids, length, stride)]

    assert passages(4, 3) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert passages(4, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert len(passages(10, 3)) == 1 and len(passages(9, 3)) == 2


def test_maxp_is_the_best_passage(texts, model):
    model.doc_length, keep = 8, model.doc_length
    try:
        candidates = dict(list(first(texts).items())[:4])
        scorer = rerank.PairScorer(model, texts, candidates, long_docs="max", stride=5)
        got = {q: s for block in scorer(rerank.blocks_of(candidates)) for q, s in block.items()}
        for qid, ranked in candidates.items():
            query, documents = texts.all_queries[qid], texts.documents(ranked)
            for docid in ranked:
                words = documents[docid].split()  # one token a word in this vocabulary
                starts = [0] if len(words) <= 8 else [*range(0, len(words) - 8, 5), len(words) - 8]
                best = max(model.score([query], [" ".join(words[s : s + 8])]).item()
                           for s in starts)
                assert abs(got[qid][docid] - best) < 1e-5
        assert scorer.passages > scorer.pairs
        cut = rerank.PairScorer(model, texts, candidates)
        list(cut(rerank.blocks_of(candidates)))
        assert cut.documents.truncated == {d for ranked in candidates.values() for d in ranked
                                           if len(texts.documents([d])[d].split()) > 8}
    finally:
        model.doc_length = keep


def test_scores_that_are_not_finite_name_the_query(texts, model):
    weight = model.model.classifier.bias
    keep = weight.detach().clone()
    weight.data.fill_(math.nan)
    with pytest.raises(BadInput, match="q0"):
        rerank.score_run(model, texts, first(texts))
    weight.data.copy_(keep)


def test_missing_documents_stop_or_are_counted(texts, model):
    candidates = {"q1": {"d1": 1.0, "gone": 0.5}}
    with pytest.raises(BadInput, match="gone"):
        rerank.score_run(model, texts, candidates)
    scorer = rerank.PairScorer(model, texts, candidates, skip_missing=True)
    (result,) = scorer([["q1"]])
    assert list(result["q1"]) == ["d1"] and scorer.documents.missing == {"gone"}
    assert "1 documents missing" in scorer.summary()


# ------------------------------------------------------------------------- thresholds and rankings


def test_the_sigmoid_keeps_the_order_of_the_logits():
    """Against a loop from the best logit down over np.nextafter; the ends, where all would tie, are
    strictly ordered too."""
    rng = np.random.default_rng(0)
    odd = [0, -0.0, 5, 5, 17, 18, 40, 40, 1e30]
    logits = np.float32([*rng.normal(0, 3, 300), *rng.normal(9, 1e-4, 300), *odd])
    rng.shuffle(logits)
    got, above, expected = sigmoid_in_order(logits), np.float32(2), {}
    for x in sorted({float(x) for x in logits}, reverse=True):
        above = min(np.float32(1 / (1 + math.exp(-x))), np.nextafter(above, np.float32(0)))
        expected[x] = above
    assert got.dtype == np.float32 and got.tolist() == [expected[float(x)] for x in logits]
    plain = np.float32(1) / (1 + np.exp(-logits))
    assert len(np.unique(plain)) < len(np.unique(logits)) == len(np.unique(got))
    low = sigmoid_in_order(np.float32([-1e30, -300, -200, -104, -90, -90]))
    assert [a < b for a, b in zip(low, low[1:], strict=False)] == [True] * 4 + [False]
    assert np.finfo(np.float32).tiny <= low[0] and low[4] == low[5] < 1e-37
    assert sigmoid_in_order(np.zeros(0, np.float32)).shape == (0,)


def test_sigmoid_of_a_run_changes_no_rank(place, tmp_path, monkeypatch):
    """Logits times 40, of which many are beyond 17: ranked as they are, by trec_eval's rules."""
    model = CrossEncoder.from_pretrained(place / "model", device="cpu")
    model.model.classifier.weight.data *= 40
    model.model.classifier.bias.data += 40
    model.save_pretrained(tmp_path / "steep")
    argv = ["--model", tmp_path / "steep", "--dataset", place / "corpus/train", "--first-stage",
            "bm25", "--out"]
    assert run(monkeypatch, *argv, tmp_path / "logits") == 0
    assert run(monkeypatch, *argv, tmp_path / "sigmoid", "--sigmoid") == 0
    logits, sigmoid = (read_columns(tmp_path / name, RUN) for name in ("logits", "sigmoid"))
    for columns in (logits, sigmoid):  # ranked as written
        assert trec_order(columns).tolist() == list(range(len(columns.docids)))
    assert logits.docids.equals(sigmoid.docids) and logits.qids == sigmoid.qids
    np.testing.assert_allclose(sigmoid.values, 1 / (1 + np.exp(-logits.values)), rtol=0, atol=1e-5)
    assert (logits.values > 17).sum() > 20 and (sigmoid.values == 1).sum() < 20
    tied = [(np.diff(columns.values) == 0).tolist() for columns in (logits, sigmoid)]
    assert tied[0] == tied[1]


def test_rank_and_score_from_python(model, monkeypatch, capsys):
    documents = ["kaba lodor", "mifin", "negus puba radin", "vufin vugus", "lodor sofin"]
    scores = model.score(["mifin puba"] * 5, documents)
    alone = [model.score(["mifin puba"], [d]).item() for d in documents]
    np.testing.assert_allclose(scores, alone, atol=1e-5)
    ranking = model.rank("mifin puba", documents)
    assert [i for i, _ in ranking] == np.argsort(-scores.numpy(), kind="stable").tolist()
    assert ranking == [(i, scores[i].item()) for i, _ in ranking]
    assert model.rank("mifin puba", documents, top_k=2) == ranking[:2]
    assert model.rank("mifin puba", []) == []
    expected = sigmoid_in_order(scores.numpy()).tolist()
    assert model.score(["mifin puba"] * 5, documents, sigmoid=True).tolist() == expected
    assert capsys.readouterr().err == ""  # no terminal, no bar
    bars = []

    class Bar(tqdm.tqdm):
        def close(self):
            bars.append((self.n, self.total, self.disable))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    watched, plain = (model.score(["mifin puba"] * 5, documents, max_tokens=16, progress=how)
                      for how in (True, False))
    assert watched.equal(plain) and bars[0] == (5, 5, False)
    assert "/5 [" in capsys.readouterr().err
    monkeypatch.setattr(model, "score", lambda *_: torch.tensor([1.0, 3.0, 2.0, 3.0]))
    assert model.rank("q", list("abcd"), 3) == [(1, 3.0), (3, 3.0), (2, 2.0)]


# -------------------------------------------------------------------------------------------- files


def test_written_runs_keep_float32_exactly(tmp_path):
    scores = np.random.default_rng(0).standard_normal(50).astype(np.float32) * np.float32(1e-3)
    rerank.write_run(tmp_path / "a.run", {"q": {f"d{i}": s for i, s in enumerate(scores)}})
    back = read_run(tmp_path / "a.run")["q"]
    assert all(np.float32(back[f"d{i}"]) == s for i, s in enumerate(scores))
    lines = (tmp_path / "a.run").read_text().splitlines()
    assert [line.split()[3] for line in lines] == [str(i + 1) for i in range(50)]
    assert [float(line.split()[4]) for line in lines] == sorted(
        map(float, back.values()), reverse=True)


def test_zipped_runs_have_the_same_bytes_every_time(tmp_path, monkeypatch):
    made = []
    for name, now in (("a.run.gz", 1e9), ("b.run.gz", 1.5e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        rerank.write_run(tmp_path / name, {"q": {"d": 1.5}})
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1] and gzip.decompress(made[0]) == b"q Q0 d 1 1.5 run\n"


def test_the_line_of_an_error_in_a_packed_run_with_blank_lines(tmp_path, texts):
    import pyarrow as pa

    content = "q1 Q0 d1 1 2.0 x\n\nq1 Q0 gone\u3000gone 2 1.0 x\n".encode()
    (tmp_path / "a.run.gz").write_bytes(gzip.compress(content))
    (tmp_path / "b.run.zst").write_bytes(pa.compress(content, "zstd", asbytes=True))
    for name in ("a.run.gz", "b.run.zst"):
        with pytest.raises(BadInput, match=rf"{name}:3: document 'gone.u3000gone'"):
            rerank.first_stage(texts, tmp_path / name, None, 10)


def test_a_part_without_its_header_is_begun_again(tmp_path, texts, model, monkeypatch):
    """Killed while the header is written: there is no part yet, and the same command goes on."""
    candidates, out = first(texts), tmp_path / "x.run"

    def killed(_path):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        rerank.write_in_blocks(out, {}, candidates, "t",
                               rerank.PairScorer(model, texts, candidates))
    monkeypatch.undo()
    assert not (tmp_path / "x.run.part-0").exists()
    rerank.write_in_blocks(out, {}, candidates, "t", rerank.PairScorer(model, texts, candidates))
    assert len(read_run(out)) == 20


def test_an_interrupted_run_ends_as_the_uninterrupted(tmp_path, texts, model, monkeypatch):
    monkeypatch.setattr(rerank.blocks_of, "__defaults__", (60,))
    candidates, plan = first(texts), {"model": "m"}
    whole, broken = tmp_path / "whole.run", tmp_path / "broken.run"
    rerank.write_in_blocks(whole, plan, candidates, "t",
                           rerank.PairScorer(model, texts, candidates))
    assert not list(tmp_path.glob("*.part*"))

    class Killed(Exception):
        pass

    def until(n):
        def score(blocks):
            for i, result in enumerate(rerank.PairScorer(model, texts, candidates)(blocks)):
                if i == n:
                    raise Killed
                yield result
        return score

    part = tmp_path / "broken.run.part-0"
    for n in (1, 2, 0, 1):
        with pytest.raises(Killed):
            rerank.write_in_blocks(broken, plan, candidates, "t", until(n))
        with open(part, "ab") as file:
            file.write(b"q7 Q0 d1 1 0.5")  # a line cut in the middle
    with pytest.raises(BadInput, match="other flags"):
        rerank.write_in_blocks(broken, {"model": "another"}, candidates, "t", until(9))
    scored = []

    def counted(blocks):
        scored.extend(blocks)
        return rerank.PairScorer(model, texts, candidates)(blocks)

    rerank.write_in_blocks(broken, plan, candidates, "t", counted)
    assert broken.read_bytes() == whole.read_bytes()
    assert len(scored) == len(rerank.blocks_of(candidates)) - 4  # nothing is scored twice


# -------------------------------------------------------------------------------------- the command


def test_command_writes_the_run(place, tmp_path, monkeypatch, capsys, model, texts):
    out = tmp_path / "out.run"
    argv = ["--model", place / "model", "--dataset", place / "corpus", "--first-stage", "bm25",
            "--depth", 10]
    argv += ["--out", out]
    assert run(monkeypatch, *argv) == 0
    candidates = bm25(texts, texts.queries, 10)
    expected = rerank.score_run(model, texts, candidates)
    got = read_run(out)
    assert got.keys() == expected.keys()
    for qid in got:
        written = {d: np.float32(s) for d, s in got[qid].items()}
        assert written == {d: np.float32(s) for d, s in expected[qid].items()}
    pairs = json.loads((tmp_path / "out.run.json").read_text())["pairs"]
    assert pairs == sum(map(len, candidates.values()))
    assert run(monkeypatch, *argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert run(monkeypatch, *argv, "--overwrite") == 0


@pytest.mark.slow
def test_two_processes_write_the_same_file(place, tmp_path):
    """Some blocks to each: the block size is cut, so that this corpus has several. The two go
    through two datasets."""
    root = Path(rerank.__file__).resolve().parent
    script = tmp_path / "small_blocks.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(root)!r})\nimport rerank\n"
                      "rerank.blocks_of.__defaults__ = (40,)\n"
                      "sys.exit(rerank.command.guarded(rerank.main))\n")
    rerank.write_run(tmp_path / "first.run", first(rerank.Texts(str(place / "corpus"))))
    argv = [script, "--model", place / "model", "--run", *[tmp_path / "first.run"] * 2]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    names = [f"{place / 'corpus'}/{split}" for split in ("dev", "train")]
    for runner, flags in (([], [*argv[:-1], "--dataset", names[0], "--out", tmp_path / "1.run.gz"]),
                          (two, [*argv, "--dataset", *names, "--out", tmp_path / "2"])):
        command = [sys.executable, *runner, *flags, "--device", "cpu"]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                              timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
    runs = [path for path in sorted((tmp_path / "2/model").iterdir()) if path.suffix == ".gz"]
    assert [path.read_bytes() for path in runs] == [(tmp_path / "1.run.gz").read_bytes()] * 2
    assert len(read_run(runs[0])) == 20 and not list(tmp_path.rglob("*.part*"))


def test_query_form(place, tmp_path, monkeypatch, capsys, model):
    file = tmp_path / "lines.txt"
    file.write_text("kaba lodor\nmifin\n\nnegus puba radin\n")
    assert run(monkeypatch, "--model", place / "model", "--query", "mifin puba", file) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    lines = ["kaba lodor", "mifin", "negus puba radin"]
    expected = dict(zip(lines, model.score(["mifin puba"] * 3, lines).tolist(), strict=True))
    assert [r[1] for r in rows] == sorted(lines, key=lambda line: -expected[line])
    assert all(abs(float(s) - expected[line]) < 1e-5 for s, line in rows)
    numbers = {"kaba lodor": 1, "mifin": 2, "negus puba radin": 4}
    argv = ["--query", "mifin puba", "--json", "--top", 2, "--model", place / "model", file]
    assert run(monkeypatch, *argv) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.pop("score") for row in found] == [
        float(str(np.float32(expected[r[1]]))) for r in rows[:2]]
    assert found == [{"rank": i, "line": numbers[r[1]], "text": r[1]}
                     for i, r in enumerate(rows[:2], 1)]
    assert run(monkeypatch, *argv, "--sigmoid") == 0
    for line, (_, text) in zip(capsys.readouterr().out.splitlines(), rows, strict=False):
        assert json.loads(line)["score"] == pytest.approx(1 / (1 + math.exp(-expected[text])))


def test_a_first_stage_without_a_model(place, tmp_path, monkeypatch, capsys, texts):
    argv = ["--dataset", place / "corpus", "--first-stage", "bm25", "--depth", 7, "--out",
            tmp_path / "first.run.gz"]
    assert run(monkeypatch, *argv) == 0
    assert read_run(tmp_path / "first.run.gz") == bm25(texts, texts.queries, 7)
    lines = gzip.decompress((tmp_path / "first.run.gz").read_bytes()).decode().splitlines()
    assert {line.split()[5] for line in lines} == {"bm25"}
    assert [path.name for path in tmp_path.iterdir()] == ["first.run.gz"]
    assert run(monkeypatch, *argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert run(monkeypatch, *argv, "--overwrite") == 0


# --------------------------------------------------------------------- several models and datasets


@pytest.fixture
def several(place, tmp_path, monkeypatch):
    """Two models and two datasets in the current folder: the flags that re-rank all four."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/corpus").symlink_to(place / "corpus")
    for seed in (1, 2):
        toy.model(tmp_path / f"runs/toy-seed{seed}", seed=seed)
    for split in ("test", "dev"):
        texts = rerank.Texts(f"data/corpus/{split}")
        rerank.write_run(tmp_path / f"{split}.run", bm25(texts, texts.queries, 12))
    return ["--model", "runs/toy-seed1", "runs/toy-seed2/", "--dataset", "./data/corpus",
            "data/corpus/dev", "--run", "test.run", "dev.run", "--device", "cpu", "--out", "runs"]


NAMES = ["data-corpus.run.gz", "data-corpus-dev.run.gz"]


def test_several_models_and_datasets(several, tmp_path, monkeypatch, capsys):
    """Each as a command of its own writes it, into the models' own folders; a model is loaded once,
    and not at all where all is finished, or an interruption left nothing of it to do."""
    for model in ("runs/toy-seed1", "runs/toy-seed2"):
        for dataset, first in zip(several[4:6], ("test.run", "dev.run"), strict=True):
            out = f"{Path(model).name}-{Path(dataset).name}.run.gz"
            assert run(monkeypatch, "--model", model, "--dataset", dataset, "--run", first, "--out",
                       out) == 0
    opened, whole, scored = [], rerank.open_model, []
    monkeypatch.setattr(rerank, "open_model", lambda name, args: opened.append(name)
                        or whole(name, args))
    scoring = rerank.PairScorer.__call__

    def until_the_fourth(self, blocks):
        scored.append(self.texts.name)
        if len(scored) == 4:
            raise KeyboardInterrupt
        return scoring(self, blocks)

    monkeypatch.setattr(rerank.PairScorer, "__call__", until_the_fourth)
    assert run(monkeypatch, *several) == 130
    assert opened == ["runs/toy-seed1", "runs/toy-seed2/"]
    assert scored == ["./data/corpus", "data/corpus/dev"] * 2
    assert run(monkeypatch, *several) == 0 and scored[4:] == ["data/corpus/dev"]
    assert opened[2:] == ["runs/toy-seed2/"] and "3 of 4 runs" in capsys.readouterr().err
    assert run(monkeypatch, *several) == 0 and len(opened) == 3
    assert "4 of 4 runs are finished" in capsys.readouterr().err
    for seed in (1, 2):
        folder = tmp_path / f"runs/toy-seed{seed}"
        assert sorted(path.name for path in folder.glob("*.run*")) == sorted(
            NAMES + [f"{name}.json" for name in NAMES])
        for name, own in zip(NAMES, ("corpus", "dev"), strict=True):
            alone = tmp_path / f"toy-seed{seed}-{own}.run.gz"
            assert (folder / name).read_bytes() == alone.read_bytes()
            assert json.loads((folder / f"{name}.json").read_text())["pairs"] > 0


def test_finished_runs_of_another_plan_are_refused(several, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, *several) == 0
    first, last = (Path("runs/toy-seed1", name) for name in NAMES)
    before = first.read_bytes()
    for change, which in ((["--sigmoid"], first), (["--depth", "5"], first), ([], last)):
        if not change:
            with open("dev.run", "a") as file:
                file.write("\n")
        assert run(monkeypatch, *several, *change) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {which}: ") and "--overwrite" in error
    assert first.read_bytes() == before
    note = Path(f"{last}.json")
    note.write_text('{"seconds": 1.0, "pairs": 3}')
    assert run(monkeypatch, "--model", "runs/toy-seed1/", *several[3:]) == 0  # one is of no plan
    assert f"{NAMES[1]}: taken as finished" in capsys.readouterr().err
    note.write_text("[1]")
    assert run(monkeypatch, *several) == 2 and f"{NAMES[1]}.json:1" in capsys.readouterr().err
    note.unlink()
    assert run(monkeypatch, *several, "--overwrite", "--sigmoid") == 0
    assert all(0 < score <= 1 for score in [*read_run(last)["q8"].values(),
                                            *read_run(first)["q9"].values()])
    assert run(monkeypatch, *several, "--sigmoid") == 0
    assert "4 of 4 runs" in capsys.readouterr().err


@pytest.mark.parametrize("change, word", [
    (["--run", "test.run"], "1 --run for 2 --dataset"),
    (["--run", "test.run", "gone.run"], "gone.run"),
    (["--dataset", "data/corpus", "no/such"], "no/such"),
    (["--dataset", "data/corpus", "runs"], "runs/corpus.jsonl"),
    (["--dataset", "data/corpus", "./data/corpus/"], "data-corpus.run.gz"),
    (["--model", "runs/toy-seed1", "other/toy-seed1"], "other/toy-seed1"),
    (["--out", "test.run"], "no folder"),
])
def test_what_is_wrong_is_said_before_anything_is_scored(several, tmp_path, monkeypatch, capsys,
                                                         change, word):
    monkeypatch.setattr(rerank, "open_model", None)
    before = sorted(tmp_path.rglob("*"))
    assert run(monkeypatch, *several, *change) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and word in error and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_the_suites_are_named_as_evaluate_reads_them():
    for suite in SUITES.values():
        for short, dataset in datasets_of(suite).items():
            model, name = Path(run_name("runs/bert-bce-seed1", dataset)).parts
            assert model == "bert-bce-seed1"
            assert name == f"{dataset.replace('/', '-')}.run.gz", short
    for folder in ("/a/b/", "./a/b", "../../a/b", ".././a/b"):  # no file that a shell's * passes by
        assert run_name(".", folder) == f"{Path.cwd().name}/a-b.run.gz"


def test_help_and_usage_need_no_torch(tmp_path):
    code = ("import sys; sys.modules['torch'] = None; import rerank; "
            "sys.exit(rerank.command.guarded(rerank.main))")
    for flag, expected in (("--help", 0), ("--bogus", 2)):
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=Path(rerank.__file__).parent,
                              capture_output=True, text=True)
        assert done.returncode == expected and "Traceback" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_run_goes_on(place, tmp_path):
    import resource

    argv = [sys.executable, str(Path(rerank.__file__)), "--model", str(place / "model"),
            "--dataset", f"{place / 'corpus'}/train", "--first-stage", "bm25", "--device", "cpu",
            "--out"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place), "OMP_NUM_THREADS": "1"}
    how = dict(capture_output=True, text=True, env=environment)
    assert subprocess.run([*argv, "1.run"], cwd=tmp_path, **how).returncode == 0
    full = subprocess.run(
        [*argv, "2.run"], cwd=tmp_path, **how,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    last = full.stderr.splitlines()[-1]
    assert full.returncode == 2 and last.startswith("error: cannot write: File too large")
    assert not (tmp_path / "2.run").exists()
    assert subprocess.run([*argv, "2.run"], cwd=tmp_path, **how).returncode == 0
    assert (tmp_path / "2.run").read_bytes() == (tmp_path / "1.run").read_bytes()


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_ends_the_query_form(place, tmp_path):
    (tmp_path / "lines").write_text("kaba lodor\n" * 9)
    process = subprocess.Popen([sys.executable, str(Path(rerank.__file__)), "--model",
                                str(place / "model"), "--query", "kaba", str(tmp_path / "lines"),
                                "--device", "cpu"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


TO_X = ["--model", "MODEL", "--dataset", "CORPUS", "--out", "x.run"]
BM25 = [*TO_X, "--first-stage", "bm25"]
QUERY = ["--model", "MODEL", "--query", "x"]


@pytest.mark.parametrize("argv, word", [
    ([], "--model"),
    (["--model", "MODEL"], "--dataset"),
    (["--model", "no/such/model", "--query", "x", "f"], "no/such/model"),
    ([*BM25, "--dataset", "no/such"], "no/such"),
    ([*BM25, "--out", "gone/x.run"], "gone"),
    ([*BM25, "--out", "CORPUS", "--overwrite"], "a folder"),
    ([*TO_X, "--first-stage", "scoreddocs"], "scoreddocs"),
    ([*TO_X, "--first-stage", "nope"], "nope"),
    ([*BM25, "--bogus"], "--bogus"),
    ([*BM25, "--run", "y.run"], "either --run"),
    ([*BM25, "--depth", "-3"], "--depth"),
    ([*BM25, "--depth", "x"], "--depth"),
    ([*BM25, "--stride", "0"], "--stride"),
    ([*BM25, "--max-tokens", "0"], "--max-tokens"),
    ([*BM25, "--query-length", "0"], "--query-length"),
    ([*BM25, "--doc-length", "-4"], "--doc-length"),
    ([*BM25, "--device", "foo"], "--device"),
    ([*BM25, "lines.txt"], "--query"),
    ([*BM25, "--top", "3"], "--query"),
    ([*QUERY, "--out", "x.run"], "--query"),
    ([*QUERY, "--top", "0", "f"], "--top"),
    (["--model", "MODEL", "CORPUS", "--query", "x", "f"], "one --model"),
    (["--query", "x", "f"], "one --model"),
    (["--dataset", "CORPUS", "--run", "y.run", "--depth", "9", "--out", "x.run"], "--model is"),
    (["--dataset", "CORPUS", "--first-stage", "bm25", "--sigmoid", "--out", "x.run"], "--model is"),
    ([*QUERY, "no-such-file"], "no-such-file"),
    ([*QUERY, "."], ".: Is a directory"),
    ([*QUERY, "UTF16"], "UTF16:2: not UTF-8"),
    ([*QUERY, "MODEL/model.safetensors"], "UTF-8"),
])
def test_bad_input_is_one_line_and_exit_2(place, tmp_path, monkeypatch, capsys, argv, word):
    monkeypatch.chdir(tmp_path)
    (place / "UTF16").write_bytes(b"kaba\n\xff\xfe\n")
    names = {"MODEL": place / "model", "CORPUS": place / "corpus", "UTF16": place / "UTF16",
             "MODEL/model.safetensors": place / "model" / "model.safetensors"}
    assert run(monkeypatch, *[names.get(a, a) for a in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and word in error and "\n" not in error
    assert not list(tmp_path.iterdir())


def test_help_and_usage_errors_need_no_torch():
    for script in ("rerank", "teacher"):
        for flag, status in (("--help", 0), ("--nonsense", 2)):
            done = subprocess.run([sys.executable, "-X", "importtime", f"{script}.py", flag],
                                  capture_output=True, text=True, timeout=100,
                                  cwd=Path(rerank.__file__).parent)
            assert (
                done.returncode == status
                and "| numpy\n" in done.stderr
                and "| torch\n" not in done.stderr
            )


def test_known_first_stage_of_scifact(shared_data):
    """BM25 over SciFact's test queries: the figure of the collection's own run, made by the same
    library, is 0.6762."""
    import evaluate

    texts = rerank.Texts(str(shared_data / "scifact"))
    got = bm25(texts, texts.queries, 100)
    assert abs(evaluate.mean(evaluate.evaluate(texts.qrels, got, ["nDCG@10"]))["nDCG@10"]
               - 0.6762) < 0.01
