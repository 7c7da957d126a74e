"""The paper's grid, 9 backbones x 6 losses: its recipes, the same lists or documents for all, and
every cell run (12 of them daily, all with `-m "slow or not slow"`)."""

import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers as hf

import data.cache
import evaluate
import rerank
import teacher
import toy
import train
from data.first_stages import SPLADE, bm25
from data.lists import FROM_TEACHER, Batches
from data.model_card import model_card
from data.run_folder import read_log
from data.runs import read_run, write_run
from data.texts import Texts
from kernels import losses
from kernels.encoder import CrossEncoder
from kernels.tokenizers import load_tokenizer
from test_encoder import word_tokenizer
from training import run_main, teacher_of

ROOT = Path(train.__file__).resolve().parent
TOKENIZERS = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data")) / "tokenizers"

# The configuration of arXiv 2603.03010, copied out by hand: hub id, batch B, learning rate,
# parameters in millions of the layers (not the embeddings).
BACKBONES = {
    "minilm": ("microsoft/MiniLM-L12-H384-uncased", 64, 7e-6, 21.3),
    "ettin-17m": ("jhu-clsp/ettin-encoder-17m", 64, 7e-6, 3.9),
    "ettin-32m": ("jhu-clsp/ettin-encoder-32m", 64, 7e-6, 12.5),
    "ettin-68m": ("jhu-clsp/ettin-encoder-68m", 64, 7e-6, 42.3),
    "bert": ("bert-base-uncased", 32, 1e-5, 85),
    "roberta": ("FacebookAI/roberta-base", 32, 1e-5, 85),
    "electra": ("google/electra-base-discriminator", 32, 1e-5, 85),
    "deberta": ("microsoft/deberta-v3-base", 32, 1e-5, 85),
    "ettin-150m": ("jhu-clsp/ettin-encoder-150m", 32, 1e-5, 110),
}
# lists per step of a batch of B, documents per list, depth of the lists, file, md5
LOSSES = {
    "bce": (lambda b: b, 2, None, "qidpidtriples.train.full.tsv.gz",
            "215a5204288820672f5e9451d9e202c5"),
    "hinge": (lambda b: b, 2, None, "qidpidtriples.train.full.tsv.gz",
              "215a5204288820672f5e9451d9e202c5"),
    "marginmse": (lambda b: b, 2, None, "bert_cat_ensemble_msmarcopassage_train_scores_ids.tsv",
                  "4d99696386f96a7f1631076bcc53ac3c"),
    "infonce": (lambda b: b // 8, 8, 500, "__colbert__msmarco-passage-train-judged.run",
                "6ed152027f7270f32fcbfaaa6def951e"),
    "ranknet": (lambda b: 1, 50, 50,
                "__rankzephyr-colbert-10000-sampled-50__msmarco-passage-train-judged.run",
                "c37b78874d4893a00566ab40aa453c56"),
    "adrmse": (lambda b: 1, 50, 50,
               "__rankzephyr-colbert-10000-sampled-50__msmarco-passage-train-judged.run",
               "c37b78874d4893a00566ab40aa453c56"),
}
FILES = {"bce": "docpairs", "hinge": "docpairs", "marginmse": "ensemble-t2", "infonce": "colbert",
         "ranknet": "rankzephyr-50", "adrmse": "rankzephyr-50"}
NANO = ["arguana", "climate-fever", "dbpedia-entity", "fever", "fiqa", "hotpotqa", "msmarco",
        "nfcorpus", "nq", "quora", "scidocs", "scifact", "webis-touche2020"]
CELLS = [(backbone, loss) for backbone in BACKBONES for loss in LOSSES]
# every backbone once or twice, every loss twice
DAILY = [(list(BACKBONES)[i % 9], list(LOSSES)[i % 6]) for i in range(12)]


def test_every_cell_is_the_papers_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "irds"))
    assert len(CELLS) == 54
    for backbone, loss in CELLS:
        hub, b, lr, millions = BACKBONES[backbone]
        lists, size, depth, file, md5 = LOSSES[loss]
        args = train.parse(["--backbone", backbone, "--loss", loss])
        got = (args.dataset, args.batch_size, args.list_size, args.lr, args.steps, args.warmup,
               args.weight_decay, args.clip, args.query_length, args.doc_length, args.eval_every,
               args.eval_measure)
        assert got == ("msmarco-passage/train", lists(b), size, lr, 200_000, 5_000, 0.0, 1.0, 32,
                       256, 5_000, "RR@10")
        assert sorted(args.eval_dataset) == [f"nano-beir/{name}" for name in NANO]
        assert args.random_share is None and args.eval_queries is None and args.eval_depth == 100
        assert depth is None or args.depth >= depth and (loss != "infonce" or args.depth == depth)
        text = train.plan(args)
        documents = lists(b) * size
        assert hub in text and f"{documents:,} documents, about {90 * documents:,} tokens" in text
        assert f"documents  {200_000 * documents:,} in all" in text
        # a training step takes 6 operations per parameter and token, and some for attention
        tflop = float(re.search(r"([\d.]+) TFLOP a step", text)[1])
        assert tflop == pytest.approx(6e-12 * millions * 1e6 * 90 * documents, rel=0.15), backbone
        lines = train.files(args)
        (source,) = (line for line in lines if file in line)
        assert md5 in source and source.endswith("not here")
        assert "1.058 GB, md5 31644046b18952c1386cd4564ba2ae69" in lines[1] and hub in lines[0]
        assert sum("nano-beir/" in line for line in lines) == 13
    assert not list(tmp_path.iterdir())


def test_mse_takes_a_cross_encoders_logits_never_ranks():
    """No cell of the paper: the lists of `--negatives shared`, 8 of their documents at a time."""
    for backbone, (_, b, lr, _) in BACKBONES.items():
        args = train.parse(["--backbone", backbone, "--loss", "mse"])
        got = args.lists, args.triples, args.depth, args.batch_size, args.list_size, args.lr
        assert got == ("hf-monoelectra", None, 100, b // 8, 8, lr)
    args = train.parse(["--backbone", "bert", "--loss", "mse", "--triples", "ensemble-t2"])
    assert (args.lists, args.batch_size, args.list_size) == (None, 32, 2)


def test_the_plan_says_what_is_here(tmp_path, monkeypatch):
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    for path in ("msmarco-passage/collection.tsv", "msmarco-passage/train/docpairs.tsv.gz",
                 "teachers/__colbert__msmarco-passage-train-judged.run",
                 "nano-beir/nq/corpus.parquet", "nano-beir/nq/qrels.parquet"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()

    def here(loss):
        lines = train.files(train.parse(["--backbone", "bert", "--loss", loss]))
        return [line.split(",")[0].split()[1] for line in lines if not line.endswith("not here")]

    assert here("bce") == ["collectionandqueries.tar.gz", "qidpidtriples.train.full.tsv.gz"]
    assert here("infonce") == ["collectionandqueries.tar.gz", "colbert:"]
    assert here("ranknet") == ["collectionandqueries.tar.gz"]
    (tmp_path / "nano-beir/nq/queries.parquet").touch()
    assert here("ranknet") == ["collectionandqueries.tar.gz", "nano-beir/nq"]


def test_shared_negatives_mean_one_recipe_for_all_losses():
    for backbone, (_, b, _, _) in BACKBONES.items():
        seen = set()
        for loss in losses.LOSSES:
            args = train.parse(["--backbone", backbone, "--loss", loss, "--negatives", "shared"])
            seen.add((args.lists, args.triples, args.depth, args.batch_size, args.list_size,
                      args.steps, args.warmup))
        assert seen == {("hf-monoelectra", None, 100, b // 8, 8, 200_000, 5_000)}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_equal_documents(backbone):
    b = BACKBONES[backbone][1]
    for loss, (lists, size, *_) in LOSSES.items():
        args = train.parse(["--backbone", backbone, "--loss", loss, "--budget", "docs"])
        documents = lists(b) * size
        assert 0 <= args.steps * documents - 200_000 * b < documents
        assert args.warmup == args.steps // 40 == args.eval_every
        odd = train.parse(["--backbone", backbone, "--loss", loss, "--budget", "docs",
                           "--steps", "1001"])
        assert odd.steps == math.ceil(1001 * b / documents)
    assert "docs" in args.out.name and "budget" not in train.result_flags(args)


# ---------------------------------------------------------------------------------- every cell, run


def layers(number, **more):
    return {"num_hidden_layers": number, **more}


SMALL = dict(hidden_size=16, num_attention_heads=2, intermediate_size=24, num_labels=1,
             initializer_range=0.2)
DEBERTA = dict(relative_attention=True, position_buckets=256, pos_att_type="p2c|c2p",
               share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
               type_vocab_size=0)
ETTIN = dict(classifier_pooling="mean", global_attn_every_n_layers=3)
MODELS = {  # configuration, tokenizer, sizes
    "minilm": (hf.BertConfig, "bert-uncased", layers(3)),
    "bert": (hf.BertConfig, "bert-uncased", layers(2)),
    "electra": (hf.ElectraConfig, "bert-uncased", layers(2, embedding_size=12)),
    "roberta": (hf.RobertaConfig, "roberta-base",
                layers(2, type_vocab_size=1, max_position_embeddings=514)),
    "deberta": (hf.DebertaV2Config, "deberta-v3", layers(2, **DEBERTA)),
    "ettin-17m": (hf.ModernBertConfig, "modernbert", layers(2, **ETTIN)),
    "ettin-32m": (hf.ModernBertConfig, "modernbert", layers(3, **ETTIN)),
    "ettin-68m": (hf.ModernBertConfig, "modernbert", layers(4, **ETTIN)),
    "ettin-150m": (hf.ModernBertConfig, "modernbert", layers(5, **ETTIN)),
}


def small_model(backbone: str) -> CrossEncoder:
    """Of random weights, with the backbone's own tokenizer where that is here."""
    kind, name, sizes = MODELS[backbone]
    if (TOKENIZERS / name).is_dir():
        tokenizer = load_tokenizer(str(TOKENIZERS / name), kind())
    else:
        tokenizer = word_tokenizer(kind.model_type, toy.WORDS)
    special = {f"{part}_token_id": getattr(tokenizer, f"{part}_token_id")
               for part in ("pad", "cls", "sep")}
    rows = len(tokenizer)
    if rows == 128001:  # DeBERTa-v3's embedding has more rows than its tokenizer has tokens
        rows = 128100
    torch.manual_seed(0)
    config = kind(**SMALL, **sizes, **special, vocab_size=rows)
    return CrossEncoder(hf.AutoModelForSequenceClassification.from_config(config), tokenizer)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A corpus, the published files in small, and a small model of each backbone."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.cache, "CACHE", folder / "cache")
        toy.corpus(folder / "corpus", queries=40)
        texts = Texts(str(folder / "corpus"))
        rng, run = np.random.default_rng(0), {}
        for qid, ranked in bm25(texts, texts.all_queries, 30).items():
            run[qid] = dict(zip(ranked, rng.standard_normal(60).tolist(), strict=False))
        write_run(folder / "lists.run", run)
        pairs = [f"{qid}\td{qid[1:]}\t{docid}\n" for qid, ranked in run.items()
                 for docid in ranked if docid != f"d{qid[1:]}"]
        (folder / "pairs.tsv").write_text("".join(pairs))
        scored = [f"{i % 7}\t{i % 5}\t{pair}" for i, pair in enumerate(pairs)]
        (folder / "scored.tsv").write_text("".join(scored))
        for backbone in MODELS:
            small_model(backbone).save_pretrained(folder / backbone)
        yield folder


@pytest.mark.parametrize("backbone, loss", [
    cell if cell in DAILY else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS])
def test_every_cell_trains_reranks_and_evaluates(place, tmp_path, monkeypatch, capsys, backbone,
                                                 loss):
    """Two steps at the recipe's own batch and learning rate; then the model folder is re-ranked
    with and judged."""
    published = {"docpairs": "pairs.tsv", "ensemble-t2": "scored.tsv"}
    monkeypatch.setattr(train, "published", lambda name: place / published.get(name, "lists.run"))
    _, b, lr, _ = BACKBONES[backbone]
    lists, size, *_ = LOSSES[loss]
    group = train.BACKBONES[backbone][1]
    monkeypatch.setitem(train.BACKBONES, backbone, (str(place / backbone), group))
    out = tmp_path / f"{backbone}-{loss}-seed1"
    here = ["--dtype", "float32", "--device", "cpu"]
    source = "--triples" if size == 2 else "--lists"
    assert run_main(monkeypatch, train, "--backbone", backbone, "--loss", loss, "--dataset",
                    place / "corpus", "--steps", 2, "--out", out, source, FILES[loss],
                    "--eval-depth", 5, *here) == 0
    rows = [row for row in read_log(out / "log.jsonl")[0] if "loss" in row]
    assert [(row["step"], row["lr"]) for row in rows] == [(1, lr), (2, lr / 2)]
    assert all(0 < row["loss"] < 1e4 and row["grad_norm"] > 0 for row in rows)
    before, after = (safetensors.torch.load_file(folder / "model.safetensors")
                     for folder in (place / backbone, out))
    assert before.keys() == after.keys()
    # AdamW moves a weight by the learning rate in its first step and by at most about as much in
    # its second
    assert 0.95 * lr < max((after[k] - before[k]).abs().max() for k in after) < 1.55 * lr
    capsys.readouterr()
    assert run_main(monkeypatch, rerank, "--model", out, "--dataset", place / "corpus/test",
                    "--first-stage", "bm25", "--depth", 10, "--out", out / "test.run",
                    *here) == 0
    texts, run = Texts(str(place / "corpus/test")), read_run(out / "test.run")
    assert run.keys() == texts.qrels.keys() and len(run) == 4
    model = CrossEncoder.from_pretrained(out, dtype="float32", device="cpu").eval()
    reciprocal = 0.0
    for qid, ranked in run.items():
        documents = texts.documents(ranked)
        scores = model.score([texts.queries[qid]] * len(ranked), [documents[d] for d in ranked])
        assert scores.tolist() == pytest.approx(list(ranked.values()), abs=1e-5)
        order = sorted(ranked, key=lambda d: (ranked[d], d), reverse=True)
        ranks = [order.index(docid) + 1 for docid in texts.qrels[qid] if docid in order]
        reciprocal += sum(1 / rank for rank in ranks) / len(run)
    assert run_main(monkeypatch, evaluate, "--dataset", place / "corpus/test", out / "test.run",
                    "--measures", "RR@10") == 0
    assert f"{reciprocal:.4f}" in capsys.readouterr().out


def test_shared_lists_are_drawn_alike_whatever_the_loss_and_the_budget(place):
    """From the command line to the batches: ids of every list, the documents per step and the
    number of updates."""
    drawn = {}
    for loss, budget in itertools.product(losses.LOSSES, ("steps", "docs")):
        args = train.parse(["--backbone", str(place / "bert"), "--loss", loss, "--dataset",
                            str(place / "corpus"), "--lists", str(place / "lists.run"),
                            "--negatives", "shared", "--budget", budget, "--steps", "60"])
        texts = Texts(args.dataset, split="train")
        batches = Batches(train.open_source(args, texts), texts, None, size=args.batch_size,
                          seed=args.seed, query_length=args.query_length,
                          doc_length=args.doc_length)
        ids = [batches.ids(k) for k in range(30)]
        drawn[loss, budget] = args.steps, [[item[:3] for item in step] for step in ids]
        targets = {target for step in ids for *_, values in step for target in values}
        assert (targets == {0.0, 1.0}) == (loss not in FROM_TEACHER)
    steps, lists = drawn["bce", "steps"]
    assert steps == 60 and {len(step) for step in lists} == {4}
    assert {len(docids) for step in lists for _, _, docids in step} == {8}
    assert all(other == drawn["bce", "steps"] for other in drawn.values())


# ------------------------------------------------------------------------------- the README's loops


def a_python(folder: Path, script: str) -> Path:
    """That only notes in $CALLS what it is called with and does as the script says: a program read
    from standard input alone is run."""
    path = folder / "python"
    path.write_text(NOTE + script)
    path.chmod(0o755)
    return path


NOTE = """#!/bin/bash
case $1 in -) exec "$REAL" "$@" ;; esac
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
"""
STUB = """[ -z "$FAIL" ] || exit "$FAIL"
case $1 in
    train.py|rerank.py) while [ "$1" != --out ]; do shift; done; case $2 in
        *.run.gz) touch "$2" ;; *) mkdir -p "$2/last"; touch "$2/README.md" ;; esac ;;
esac
"""


def test_the_loops_of_the_readme(tmp_path, monkeypatch):
    """Run by bash with a `python` that only notes what it is called with and makes the files that
    it should."""
    first, training, judging = re.findall(
        r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "bin").mkdir()
    a_python(tmp_path / "bin", STUB)
    calls = tmp_path / "calls"

    def bash(script, fail=""):
        calls.unlink(missing_ok=True)
        env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
               "CALLS": str(calls), "FAIL": fail}
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True,
                              text=True)
        assert not done.stderr
        return [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []

    suite = {dataset for column in evaluate.SUITES["paper"].values() for dataset in column.values()}
    assert len(bash(first, fail="130")) == 1  # Ctrl-C ends the loop, not the command alone
    made = [rerank_flags(monkeypatch, call) for call in bash(first)]
    assert {(*a.dataset, a.first_stage, a.model) for a in made} == {
        (d, f"splade:{SPLADE}", None) for d in suite}
    assert len(made) == len(suite) == 22
    assert bash(first) == []  # all made: nothing to do
    assert {f.name for f in (tmp_path / "first").iterdir()} == {
        f"{d.replace('/', '-')}.run.gz" for d in suite}

    assert len(bash(training, fail="143")) == 1
    made = bash(training)
    cells = {(a.backbone, a.loss, a.seed, str(a.out))
             for a in (train.parse(call[1:]) for call in made) if a.resume}
    assert cells == {(b, loss, s, f"runs/{b}-{loss}-seed{s}") for b, loss in CELLS
                     for s in (1, 2, 3)}
    assert {f.name for f in (tmp_path / "runs").glob("*/*")} == {"README.md"}

    for folder in (tmp_path / "runs").iterdir():
        if folder.name not in ("bert-bce-seed1", "bert-bce-seed2"):
            shutil.rmtree(folder)
    (tmp_path / "runs/bert-bce-seed2/README.md").unlink()  # still in training
    judging = first + judging
    reranked, judged = bash(judging)
    assert judged[:3] == ["evaluate.py", "--suite", "paper"]
    monkeypatch.chdir(tmp_path)
    runs = rerank.outputs(rerank_flags(monkeypatch, reranked))
    assert {a.dataset for a in runs} == suite and len(runs) == 22
    for a in runs:
        name = f"{a.dataset.replace('/', '-')}.run.gz"
        assert a.run == Path("first", name) and a.run.is_file()
        assert (a.model, a.out) == ("runs/bert-bce-seed1", Path("runs/bert-bce-seed1", name))


def rerank_flags(monkeypatch, call: list[str]):
    """What rerank.py reads of a call."""
    assert call[0] == "rerank.py"
    monkeypatch.setattr(sys, "argv", call)
    return rerank.parse()


def collection(folder: Path, queries: dict, documents: dict) -> None:
    """In BEIR layout: the text of each query, title and text of each document."""
    rows = [{"_id": qid, "text": text} for qid, text in queries.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"_id": docid, "title": title, "text": text}
            for docid, (title, text) in documents.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


WORKER = """all="$*"; score=0.5
case $all in *"--loss $FAIL "*) exit 1 ;; *"--loss kl "*"--lr 1e-4"*) score=0.6 ;; esac
while [ $# -gt 1 ] && [ "$1" != --out ]; do shift; done
case $all in
    train.py*|results/peer.py*) mkdir -p "$2"; touch "$2/README.md"
        echo "{\\"score\\": $score}" > "$2/log.jsonl" ;;
    teacher.py*) touch "$2" ;;
    rerank.py*) for folder in "$2"/*/; do  # the relevant document first, for seed 1 alone
        order="b a"; case $folder in *seed1/) order="a b" ;; esac
        printf 'q Q0 %s 1 2 x\\nq Q0 %s 2 1 x\\n' $order | gzip > "${folder}wikiqa-test.run.gz"
    done ;;
esac
"""


def test_the_study_on_wikiqa(tmp_path, monkeypatch):
    """results/study.sh, with a `python` as above: every call parses; a failed run is named, and
    alone made when the study goes on; the members learn from the candidates and everybody else from
    one file; what is best on dev, of equals the lower rate, gets the other seeds."""
    wikiqa, out, calls = tmp_path / "wikiqa", tmp_path / "out", tmp_path / "calls"
    (wikiqa / "qrels").mkdir(parents=True)
    (wikiqa / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    collection(wikiqa, {"q": "who"}, {"a": ("", "he")})
    python = a_python(tmp_path, WORKER)

    def study(**variables):
        calls.write_text("")
        env = {**os.environ, "CALLS": str(calls), "FAIL": "none", "REAL": sys.executable,
               "PYTHON": str(python), "OUT_DIR": str(out), "JOBS": "1",
               "LRS": "1e-4 3e-5", "SEEDS": "1 2", "DATA": str(wikiqa), **variables}
        done = subprocess.run(["bash", "results/study.sh", "minilm"], cwd=ROOT, env=env,
                              capture_output=True, text=True)
        made = [line.split() for line in calls.read_text().splitlines()]
        return done, {script: [call for call in made if call[0] == f"{script}.py"]
                      for script in ("train", "results/peer", "teacher", "rerank", "evaluate")}

    done, made = study(FAIL="hinge")
    assert done.returncode == 1 and not made["teacher"]
    assert "failed: members-hinge-lr1e-4-steps320-seed1\n" in done.stderr
    done, made = study()
    assert (done.returncode, done.stderr) == (0, "")
    cells = [train.parse(call[1:]) for call in made["train"]]
    candidates, teacher_run = wikiqa / "runs/candidates.train.txt", out / "teacher.run"
    chosen = dict.fromkeys(losses.LOSSES, 3e-5) | {"kl": 1e-4}
    assert {(a.lists, a.loss, a.lr, a.seed) for a in cells} == {
        (str(candidates), "hinge", 1e-4, 1),  # the members are trained at the first rate alone
        *((str(teacher_run), loss, lr, 1) for loss in chosen for lr in (1e-4, 3e-5)),
        *((str(teacher_run), loss, lr, 2) for loss, lr in chosen.items())}
    assert {(a.negatives, a.batch_size, a.list_size, a.steps, a.eval_measure, a.eval_dataset[0])
            for a in cells} == {("shared", 4, 8, 320, "AP", str(wikiqa / "dev"))}
    taught = {a.dataset: a for a in (teacher.parse(call[1:]) for call in made["teacher"])}
    scored = taught[str(wikiqa / "train")]
    assert (scored.run, scored.out, len(scored.model)) == (candidates, teacher_run, 3)
    (call,) = made["rerank"]
    assert {Path(model).name for model in rerank_flags(monkeypatch, call).model} == {
        f"{loss}-lr{'1e-4' if loss == 'kl' else '3e-5'}-steps320-seed{seed}"
        for loss in chosen for seed in (1, 2)}
    baselines = [evaluate.parse_args(call[1:]).baseline for call in made["evaluate"]]
    assert [Path(b).parent.name.partition("-")[0] for b in baselines] == ["bce", "mse"]
    written = (out / "study.md").read_text()
    assert "| kl | lr1e-4-steps320 | lr3e-5-steps320 0.5000, lr1e-4-steps320 0.6000 |" in written
    assert "| mse-lr3e-5-steps320 | 1: 1.0000, 2: 0.5000 | 0.7500 | 0.3536 |" in written

    assert study(LISTS="recipe")[0].returncode == 2  # in the folder of the other
    _, made = study(LISTS="recipe", OUT_DIR=str(tmp_path / "own"), TEACHER=str(teacher_run),
                    LRS="1e-4", SEEDS="1")
    cells = [train.parse(call[1:]) for call in made["train"]]
    assert {(a.lists, a.negatives) for a in cells} == {(str(teacher_run), "recipe")}
    assert {a.loss: (a.batch_size, a.list_size) for a in cells} == {
        "bce": (16, 2), "hinge": (16, 2), "marginmse": (16, 2), "infonce": (4, 8), "mse": (4, 8),
        "ranknet": (3, 50), "adrmse": (3, 50), "kl": (3, 50)}

    done, made = study(OUT_DIR=str(tmp_path / "peer"), TEACHER=str(teacher_run), SEEDS="1",
                       TRAIN="results/peer.py", LOSSES="bce lambda", LRS="1e-4")
    assert (done.returncode, done.stderr) == (0, "") and not made["train"]
    assert [call[call.index("--loss") + 1] for call in made["results/peer"]] == ["bce", "lambda"]
    assert {Path(model).name for model in rerank_flags(monkeypatch, *made["rerank"]).model} == {
        "bce-lr1e-4-steps320-seed1", "lambda-lr1e-4-steps320-seed1"}


def test_a_teacher_that_saw_more(tmp_path, monkeypatch):
    """results/bi_encoder.py, with vectors of known angles that are not of length one: the cosine of
    each pair; and its mean with the scores of a run, on their mean and deviation."""
    pytest.importorskip("sentence_transformers")
    monkeypatch.syspath_prepend(ROOT / "results")
    import bi_encoder

    collection(tmp_path, {"q": "0", "p": "90"}, {d: ("", d[1:]) for d in ("d60", "d0", "d90")})
    (tmp_path / "first.run").write_text("q Q0 d0 1 5 x\nq Q0 d60 2 3 x\np Q0 d60 1 1 x\n")

    class Angles:
        def __init__(self, name):
            assert name == "minilm"

        def encode(self, texts, **_):
            angles = np.radians([float(text) for text in texts])
            return 3 * np.stack([np.cos(angles), np.sin(angles)], 1)

    def made(*flags):
        flags = ["minilm", tmp_path, tmp_path / "first.run", tmp_path / "out.run", *flags]
        monkeypatch.setattr(sys, "argv", ["bi_encoder.py", *map(str, flags)])
        monkeypatch.setattr(bi_encoder, "SentenceTransformer", Angles)
        bi_encoder.main()
        run = read_run(tmp_path / "out.run")
        return [run["q"]["d0"], run["q"]["d60"], run["p"]["d60"]]

    cosines = [1, 0.5, 3**0.5 / 2]
    assert made() == pytest.approx(cosines)
    mean, deviation = statistics.fmean(cosines), statistics.pstdev(cosines)
    assert made("--mean") == pytest.approx(
        [(score + 3 + (8 / 3) ** 0.5 * (cosine - mean) / deviation) / 2
         for score, cosine in zip((5, 3, 1), cosines, strict=True)])


MAKER = """case $1 in
    results/bi_encoder.py) touch "$5" ;;
    train.py) ;;
    *) while [ "$1" != --out ]; do shift; done
        printf '%s Q0 d 1 1 x\\n' p q r > "$2" ;;
esac
"""
STUDY = """#!/bin/bash
echo "$@ $DATA $CANDIDATES $TEACHER $LOSSES $STEPS" >> "$CALLS"
"""


def test_what_the_study_on_pydocs_learns_from(tmp_path, monkeypatch):
    """results/pydocs.sh: BM25's candidates, as many train queries as asked for, three members and
    their mean with a cosine; then results/study.sh on these. Again: nothing is made anew."""
    python = a_python(tmp_path, MAKER)
    (tmp_path / "bash").write_text(STUDY)
    (tmp_path / "bash").chmod(0o755)
    calls, out = tmp_path / "calls", tmp_path / "out"
    env = {**os.environ, "CALLS": str(calls), "REAL": sys.executable, "OUT_DIR": str(out),
           "PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}",
           "LOSSES": "bce mse", "QUERIES": "2"}

    def started():
        calls.write_text("")
        subprocess.run(["/bin/bash", "results/pydocs.sh", "minilm"], cwd=ROOT, env=env, check=True)
        made = [line.split() for line in calls.read_text().splitlines()]
        return made, made.pop()

    made, study = started()
    assert study == ["results/study.sh", "minilm", "pydocs", str(out / "candidates"),
                     str(out / "teacher.run"), "bce", "mse", "160"]
    first = [rerank_flags(monkeypatch, call) for call in made if call[0] == "rerank.py"]
    assert [(*a.dataset, a.first_stage, a.depth, a.out) for a in first] == [
        (f"pydocs/{split}", "bm25", depth, out / f"candidates.{split}.txt")
        for split, depth in (("train", 20), ("dev", 10), ("test", 10))]
    members = [train.parse(call[1:]) for call in made if call[0] == "train.py"]
    assert [(a.backbone, a.loss, a.seed, a.steps) for a in members] == [
        ("tiny", "infonce", 1, 450), ("tiny", "hinge", 2, 450), ("tiny", "bce", 3, 450)]
    assert len(read_run(out / "part.run")) == 2
    taught = [teacher.parse(call[1:]) for call in made if call[0] == "teacher.py"]
    assert [(a.dataset, a.run, a.out) for a in taught] == [
        ("pydocs/train", out / "part.run", out / "members.train.run"),
        ("pydocs/test", out / "candidates.test.txt", out / "members.test.run")]
    assert [call[1:] for call in made if call[0] == "results/bi_encoder.py"] == [
        ["minilm", f"pydocs/{split}", str(out / f"members.{split}.run"), str(out / to), "--mean"]
        for split, to in (("train", "teacher.run"), ("test", "teacher.test.run"))]
    assert [call[0] for call in started()[0]] == 3 * ["train.py"]  # which know what is finished


WARMER = """case $1 in
    rerank.py) while [ "$1" != --out ]; do shift; done; touch "$2" ;;
    results/bi_encoder.py) printf 'q3 Q0 c-%s 1 %s x\\n' 0 0.5 1 -0.125 > "$5" ;;
esac
"""


def test_a_warm_start_reads_nothing_of_dev_and_test(tmp_path, monkeypatch):
    """results/warm_start.sh: what is left of a collection without the pages and questions that dev
    and test judge, under whatever id; its cosines, twenty times as large, are what is learned."""
    wikiqa, out, calls = tmp_path / "wikiqa", tmp_path / "out", tmp_path / "calls"
    (wikiqa / "runs").mkdir(parents=True)
    for split, line in (("dev", "q1 Q0 a-0 1 1 x\n"), ("test", "q2 Q0 b-0 1 1 x\n")):
        (wikiqa / f"runs/candidates.{split}.txt").write_text(line)
    sentences = {"a-0": "A", "a-1": "A", "b-0": "B", "b9-0": "B", "c-0": "C", "c-1": "C"}
    questions = {"q1": "who", "q2": "Which one?", "q3": "where", "q4": "which one"}
    collection(wikiqa, questions, {d: (page, d) for d, page in sentences.items()})
    python = a_python(tmp_path, WARMER)
    env = {**os.environ, "CALLS": str(calls), "REAL": sys.executable, "WIKIQA": str(wikiqa),
           "PYTHON": str(python)}
    subprocess.run(["bash", "results/warm_start.sh", "minilm", str(out)], cwd=ROOT, env=env,
                   check=True)
    kept = {kind: re.findall(r'"_id": "(.+?)"', (out / f"unlabelled/{kind}.jsonl").read_text())
            for kind in ("corpus", "queries")}
    assert kept == {"corpus": ["c-0", "c-1"], "queries": ["q3"]}
    first, cosine, training = [line.split() for line in calls.read_text().splitlines()]
    ranked = rerank_flags(monkeypatch, first)
    assert (*ranked.dataset, ranked.first_stage, ranked.depth, ranked.out) == (
        str(out / "unlabelled"), "bm25", 24, out / "bm25.run")
    assert cosine[1:] == ["minilm", str(out / "unlabelled"), str(out / "bm25.run"),
                          str(out / "cosine.run")]
    assert read_run(out / "teacher.run") == {"q3": {"c-0": 10, "c-1": -2.5}}
    args = train.parse(training[1:])
    assert (args.backbone, args.loss, args.dataset, args.lists, args.out) == (
        "minilm", "kl", str(out / "unlabelled"), str(out / "teacher.run"), out / "model")
    assert (args.list_size, args.batch_size, args.steps, args.lr) == (16, 4, 640, 1e-4)


ELSEWHERE = """case $1 in rerank.py)
    while [ "$1" != --dataset ]; do shift; done
    for model in bce-lr1e-4-steps320-seed1 kl-lr5e-5-steps320-seed2; do
        touch "$SHARED/students/$model/x-${2##*/}.run.gz"
    done ;;
esac
"""


def test_models_elsewhere(tmp_path, monkeypatch):
    """results/transfer.sh: one call a collection re-ranks what the study chose, each into its
    model's folder, and what is judged are those runs."""
    python = a_python(tmp_path, ELSEWHERE)
    chosen = ("bce-lr1e-4-steps320-seed1", "kl-lr5e-5-steps320-seed2")
    for name in (*chosen, "kl-lr1e-4-steps320-seed1"):
        (tmp_path / "students" / name).mkdir(parents=True)
    for name in chosen:
        (tmp_path / "students" / name / "x-wikiqa-test.run.gz").touch()
    (tmp_path / "scifact/runs").mkdir(parents=True)
    (tmp_path / "scifact/runs/bm25.test.top100.txt").touch()
    calls, folder = tmp_path / "calls", tmp_path / "students"
    env = {**os.environ, "CALLS": str(calls), "SHARED": str(tmp_path),
           "PYTHON": str(python)}
    subprocess.run(["bash", "results/transfer.sh", str(folder)], cwd=ROOT, env=env, check=True,
                   capture_output=True)
    made = [line.split() for line in calls.read_text().splitlines()]
    reranked = [rerank_flags(monkeypatch, call) for call in made if call[0] == "rerank.py"]
    judged = [evaluate.parse_args(call[1:]) for call in made if call[0] == "evaluate.py"]
    firsts = {"trec-dl-2019": ("bm25.top100.txt", 100), "scifact": ("bm25.test.top100.txt", 20)}
    assert [(*a.dataset, *a.run, a.depth, a.out) for a in reranked] == [
        (str(tmp_path / name), tmp_path / name / "runs" / first, depth, folder)
        for name, (first, depth) in firsts.items()]
    assert {tuple(a.model) for a in reranked} == {tuple(str(folder / name) for name in chosen)}
    written = {name: [str(folder / model / f"x-{name}.run.gz") for model in chosen]
               for name in firsts}
    assert [(a.dataset, Path(a.baseline).name, a.runs[1:]) for a in judged] == [
        (str(tmp_path / name), first, written[name]) for name, (first, _) in firsts.items()]


PEER = """all="$*"
case $all in *"peer.py --loss $FAIL "*) echo "no memory"; exit 1 ;; esac
while [ $# -gt 1 ] && [ "$1" != --out ]; do shift; done
mkdir "$2"
row='{"loss": 1, "time": "2026-01-01T00:00:0'
case $all in
    *peer.py*) echo "best AP 0.7000; 80 steps, 2,560 rows: 240.0 s without validations" ;;
    *) printf '%s1+00:00", "step": 2}\\n{"score": 1}\\n%s9+00:00", "step": 6}\\n{"score": 1}' \
        "$row" "$row" > "$2/log.jsonl" ;;
esac
"""


def test_the_peer_beside_us_in_time(tmp_path):
    """results/peer.sh: the same flags for both, in turns; seconds a step, of ours between the
    first and the last row of the log; a failure is shown and ends it."""
    python = a_python(tmp_path, PEER)
    calls = tmp_path / "calls"

    def timed(fail):
        calls.write_text("")
        env = {**os.environ, "CALLS": str(calls), "REAL": sys.executable, "FAIL": fail,
               "TURNS": "2", "PYTHON": str(python)}
        return subprocess.run(["bash", "results/peer.sh", "minilm"], cwd=ROOT, env=env,
                              capture_output=True, text=True)

    done = timed("none")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[2:] == [
        f"| {turn} | {pair} | 2.000 | 3.000 |"
        for turn in (1, 2) for pair in ("bce and bce", "infonce and lambda")]
    made = [line.split() for line in calls.read_text().splitlines()]
    assert [(call[0], call[2]) for call in made[:4]] == [
        ("train.py", "bce"), ("results/peer.py", "bce"), ("train.py", "infonce"),
        ("results/peer.py", "lambda")]
    assert len({tuple(call[3:]) for call in made}) == 1 and len(made) == 8
    given = train.parse(made[0][1:])
    assert (given.steps, given.eval_every, given.negatives) == (80, 80, "shared")
    done = timed("lambda")
    assert done.returncode == 1 and "no memory" in done.stderr


@pytest.mark.slow
def test_the_peer_takes_our_steps(tmp_path, monkeypatch, capsys):
    """results/peer.py, without dropout and with next to no rate (its schedule is one step late):
    sentence-transformers' trainer has the losses of our six batches, in their order, and our
    validation; the model that is kept has its scores."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    monkeypatch.syspath_prepend(ROOT / "results")
    import peer

    toy.corpus(tmp_path / "corpus", queries=40)
    toy.model(tmp_path / "model")
    settings = tmp_path / "model/tokenizer_config.json"  # a BERT's tokenizer gives segments
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | names))
    run = teacher_of(Texts(str(tmp_path / "corpus")))
    write_run(tmp_path / "all.run", run)
    words = ["--backbone", tmp_path / "model", "--dataset", tmp_path / "corpus", "--lists",
             tmp_path / "all.run", "--negatives", "shared", "--list-size", 5, "--batch-size", 3,
             "--lr", 1e-9, "--steps", 6, "--eval-dataset", tmp_path / "corpus/dev",
             "--eval-run", tmp_path / "all.run", "--eval-every", 1, "--eval-measure", "AP",
             "--dtype", "float32", "--device", "cpu", "--no-table"]
    assert run_main(monkeypatch, train, "--loss", "bce", "--out", tmp_path / "ours", *words) == 0
    rows = [json.loads(line) for line in (tmp_path / "ours/log.jsonl").read_text().splitlines()]
    capsys.readouterr()
    peer.main([str(word) for word in ["--loss", "bce", "--out", tmp_path / "peer", *words]])
    printed = capsys.readouterr().out
    assert [float(x) for x in re.findall(r"'loss': '([^']+)'", printed)] == pytest.approx(
        [row["loss"] for row in rows if "loss" in row], rel=1e-3)
    scores = [row["score"] for row in rows if "score" in row]
    rows = [json.loads(line) for line in (tmp_path / "peer/log.jsonl").read_text().splitlines()]
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=5e-4)
    kept = CrossEncoder.from_pretrained(tmp_path / "peer")
    texts = Texts(str(tmp_path / "corpus"), split="dev")
    again = rerank.score_run(kept, texts, {q: run[q] for q in texts.queries})
    assert evaluate.mean(evaluate.evaluate(texts.qrels, again, ["AP"]))["AP"] == pytest.approx(
        max(scores), abs=5e-4)


def test_the_hours_of_the_study_are_those_of_the_formulas(capsys):
    from bench import roofline

    roofline.main(["--study"])
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "results/study.md").read_text()
    # BERT, infonce: 32 pairs of 90 tokens a step, bound by bytes: 12 layers x 2,880 tokens x 2 (18
    # x 768 + 4 x 3072) x 3, and 36 a parameter; 40 validations of 649 x 100 pairs, their bytes or
    # operations in blocks of 1,000 pairs
    body, embeddings = 12 * (4 * 768**2 + 2 * 768 * 3072) + 768**2, 30522 * 768
    token = 12 * 2 * (18 * 768 + 4 * 3072)
    step, block = 2880 * token * 3 + 36 * (body + embeddings), 90_000 * token + 2 * body
    operations = 1000 * (11 * 90 * (8 * 768**2 + 4 * 768 * 3072 + 4 * 768 * 90) + 90 * 4 * 768**2
                         + 4 * 768**2 + 4 * 768 * 3072 + 4 * 768 * 90 + 2 * 768**2)
    scoring = max(block / 3e12, operations / 800e12) / 1000
    hours = (200_000 * step / 3e12 + 40 * 64_900 * scoring) / 3600
    again = 44_430_000 * scoring / 3600
    row = next(line for line in printed.splitlines() if line.startswith("| bert "))
    assert row.split(" | ")[2] == f"{hours:.2f}" and row.split(" | ")[4] == f"{again:.2f}"
    assert row.split(" | ")[6] == f"{16 * (body + embeddings) / 1e9:.1f} |"


# ---------------------------------------------------------------------------- the card and the logs


def small_run(place, out) -> list:
    return ["--backbone", place / "bert", "--dataset", place / "corpus", "--steps", 2, "--out",
            out, "--dtype", "float32", "--device", "cpu"]


def test_model_card(place, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard

    out = tmp_path / "run"
    assert run_main(monkeypatch, train, *small_run(place, out), "--eval-every", 1) == 0
    card = ModelCard.load(out / "README.md")
    data = card.data.to_dict()
    assert data == {"library_name": "sentence-transformers", "pipeline_tag": "text-ranking",
                    "license": "other", "license_name": "see-training-data",
                    "tags": ["cross-encoder", "reranker"]}
    parts = dict(re.findall(r"^## (.+?)\n\n(.*?)(?=^## |\Z)", card.text, re.MULTILINE | re.DOTALL))
    assert list(parts) == ["Training data", "Recipe", "Results", "Use", "Limits"]
    assert "user's own" in parts["Training data"] and "4 lists of 8 documents" in parts["Recipe"]
    rows, _ = read_log(out / "log.jsonl")
    best = max(row["score"] for row in rows if "score" in row)
    assert f"| {place / 'corpus' / 'dev'} | {best:.4f} |" in parts["Results"]
    assert "BM25" in parts["Results"]
    assert re.search(r"\| run +\| +nDCG@10 \| +RR@10 \| +AP \|", parts["Results"])
    assert "32 tokens" in parts["Limits"] and "256" in parts["Limits"]
    trained = CrossEncoder.from_pretrained(out, dtype="float32", device="cpu").eval()
    expected = trained.score(["query"], ["document"])
    ours, theirs = re.findall(r"```python\n(.*?)```", parts["Use"], re.DOTALL)
    scope = {}
    exec(theirs, scope)
    assert scope["scores"].item() == pytest.approx(expected.item(), abs=1e-5)
    pytest.importorskip("sentence_transformers")
    exec(ours.replace("CrossEncoder(\"", "scores = CrossEncoder(\""), scope)
    assert scope["scores"][0] == pytest.approx(expected.item(), abs=1e-5)


def test_card_of_a_cell_names_its_backbone_and_the_terms_of_ms_marco(tmp_path):
    from huggingface_hub import ModelCard

    def card_of(*words, history=()):
        args = train.parse([*words, "--out", str(tmp_path)])
        flags, plan = train.result_flags(args), train.plan(args)
        return ModelCard(model_card(tmp_path, flags, plan, history, ""))

    cell = ["--backbone", "deberta", "--loss", "marginmse"]
    card = card_of(*cell)
    assert card.data.base_model == "microsoft/deberta-v3-base"
    assert card.data.datasets == ["microsoft/ms_marco"]
    assert all(part in card.text for part in ("non-commercial", "ensemble-t2", "Not validated"))
    history = [[5_000, 0.2], [10_000, 0.7], [15_000, 0.7], [20_000, 0.6]]
    with open(tmp_path / "log.jsonl", "w") as log:
        for step, score in history:
            for row in ({"loss": 1.0}, {"score": score, "nano-beir/nq": score + 0.1 + step * 1e-6}):
                print(json.dumps({"step": step, **row}), file=log)
    text = card_of(*cell, history=history).text
    assert "Step 10,000 is kept" in text and "| nano-beir/nq | 0.8100 |\n| mean | 0.7000 |" in text
    assert "do not compare across queries. Candidates" in text
    text = card_of("--backbone", "deberta", "--loss", "mse").text
    assert "across queries further than the teacher's, whose scale they have. Candidates" in text
    card = card_of("--backbone", "tiny")
    assert card.data.base_model is None and "PSF" in card.text and "BSD-3-Clause" in card.text


@pytest.mark.parametrize("log, word", [("jsonl,tensorboard", "pip install tensorboard"),
                                       ("wandb", "pip install wandb"),
                                       ("jsonl,csv", "'csv' is none of")])
def test_a_log_that_cannot_be_written_stops_before_anything_is_made(
        place, tmp_path, monkeypatch, capsys, log, word):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert run_main(monkeypatch, train, *small_run(place, tmp_path / "run"), "--log", log) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --log") and word in error and not (tmp_path / "run").exists()


def test_wandb_gets_the_rows_of_the_log(place, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text("rows = []\ndef init(**how): rows.append(how)\n"
                                       "def log(row, step): rows.append((step, row))\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    words = small_run(place, tmp_path / "run")
    assert run_main(monkeypatch, train, *words, "--log", "jsonl,wandb") == 0
    begun, *rows = sys.modules.pop("wandb").rows
    assert begun["name"] == "run" and begun["config"]["loss"] == "infonce"
    logged, _ = read_log(tmp_path / "run/log.jsonl")
    numbers = [{name: value for name, value in row.items() if name != "time"} for row in logged]
    assert rows == [(row["step"], row) for row in numbers] and len(rows) == 3


def test_tensorboard_gets_the_rows_of_the_log(place, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = small_run(place, tmp_path / "run")
    assert run_main(monkeypatch, train, *words, "--log", "tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    logged, _ = read_log(tmp_path / "run/log.jsonl")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in logged if "loss" in row]
