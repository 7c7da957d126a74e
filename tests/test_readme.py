"""The README: short enough to be read, its links lead somewhere, its commands and its Python run on
a small collection. (The study's loops: test_study.py; what can be copied out: test_copies.py.)"""

import json
import math
import re
import shlex

import pytest

import data.cache
import evaluate
import rerank
import teacher
import toy
import train
from kernels.encoder import CrossEncoder
from training import ROOT, run_main, teacher_of

SCRIPTS = {"train.py": train, "teacher.py": teacher, "rerank.py": rerank,
           "evaluate.py": evaluate}
PAGES = ["README.md", "data/README.md", "kernels/README.md", "results/study.md"]


def section(page: str, title: str) -> str:
    return (ROOT / page).read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture
def collection(tmp_path, monkeypatch):
    """What the commands name: my-corpus/, mine.jsonl, ids.tsv, a backbone, two teachers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.cache, "CACHE", tmp_path / "cache")
    toy.corpus(tmp_path / "my-corpus")
    for seed, name in enumerate(("minilm", "BIG-A", "BIG-B", "BIG")):
        toy.model(tmp_path / name, seed=seed)
    row = {"query": "kaba lodor", "pos": ["kaba"], "neg": ["lodor", "mifa"]}
    (tmp_path / "mine.jsonl").write_text(4 * (json.dumps(row) + "\n"))
    (tmp_path / "ids.tsv").write_text("".join(f"q{i}\td{i}\td{i + 20}\n" for i in range(20)))
    rerank.write_run(tmp_path / "dense.dev.run", teacher_of(rerank.Texts("my-corpus/dev")))
    return tmp_path


def run_all(monkeypatch, text: str) -> None:
    """Every command of a block, in its order, a training in two steps."""
    for line in text.splitlines():
        _, script, *words = shlex.split(line, comments=True)
        words = ["./minilm" if word == "minilm" else word for word in words]
        if script == "train.py":
            words += ["--steps", "2", "--device", "cpu", "--overwrite"]
        assert run_main(monkeypatch, SCRIPTS[script], *words) == 0, line


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert page != "README.md" or len(links) > 4
    for link in links:
        assert ((ROOT / page).parent / link).is_file(), link


def test_your_own_data(collection, monkeypatch, capsys):
    files, taught = blocks(section("README.md", "On your own data"))
    run_all(monkeypatch, files)
    assert re.search(r"^\| mine +\|", capsys.readouterr().out, re.M)
    run_all(monkeypatch, taught)
    (code,) = blocks((ROOT / "README.md").read_text(), "python")
    capsys.readouterr()
    exec(code, {})
    ranked, probability = capsys.readouterr().out.splitlines()
    model = CrossEncoder.from_pretrained("runs/mine")
    first, second, whole = model.score(
        ["who pays for the lunch", "who pays for the lunch", "who pays"],
        ["The host does.", "It rained.", "The host does."]).tolist()
    ((index, score),) = eval(ranked)
    assert (index, score) == pytest.approx((int(second > first), max(first, second)))
    assert float(re.search(r"[\d.]+", probability)[0]) == pytest.approx(
        1 / (1 + math.exp(-whole)), abs=1e-4)


def test_lists_of_your_own(collection, monkeypatch):
    run_all(monkeypatch, blocks(section("data/README.md", "Lists of your own"))[0])
    rows = map(json.loads, (collection / "scored.jsonl").read_text().splitlines())
    assert [len(row["neg_scores"]) for row in rows] == [2, 2, 2, 2]
