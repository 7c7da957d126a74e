#!/usr/bin/env bash
# A cross-encoder that begins where the bi-encoder of its weights stands: before it sees a label, it
# learns the cosine of its own sentence vectors. From train.py's folder:
#
#     bash results/warm_start.sh MODEL runs/warm
#     bash results/study.sh runs/warm/model
#
# MODEL, all-MiniLM-L6-v2, learned with the mean of its tokens: as a cross-encoder it starts with a
# head drawn afresh and a [CLS] that was never used. It reads WikiQA's questions of train and those
# that no split judges, each with BM25's first 24 sentences, nothing of the pages or questions of
# dev and test; dev's AP chooses among four steps. A third of an hour on a core. Start it again to
# go on.
set -eu
MODEL=${1:?the folder of the weights of all-MiniLM-L6-v2}
OUT=${2:?the folder to make}
WIKIQA=${WIKIQA:-../shared/data/wikiqa}
PYTHON=${PYTHON:-python}
data=$OUT/unlabelled
mkdir -p "$data"

[ -e "$data/queries.jsonl" ] || "$PYTHON" - "$WIKIQA" "$data" << 'PYTHON'
import json, sys
from pathlib import Path
from data.runs import read_run

wikiqa, out = map(Path, sys.argv[1:])
rows = {kind: [json.loads(line) for line in open(wikiqa / f"{kind}.jsonl")]
        for kind in ("corpus", "queries")}
judged = {}
for split in ("dev", "test"):
    judged |= read_run(wikiqa / f"runs/candidates.{split}.txt")

def plain(row):
    return row["text"].lower().strip(" ?")

documents = {docid for ranked in judged.values() for docid in ranked}
pages = {row["title"] for row in rows["corpus"] if row["_id"] in documents}
questions = {plain(row) for row in rows["queries"] if row["_id"] in judged}
kept = {"corpus": [row for row in rows["corpus"] if row["title"] not in pages],
        "queries": [row for row in rows["queries"] if plain(row) not in questions]}
for kind, some in kept.items():
    (out / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
print(f"{len(kept['queries']):,} questions, {len(kept['corpus']):,} sentences")
PYTHON
[ -e "$OUT/bm25.run" ] || "$PYTHON" rerank.py --dataset "$data" --first-stage bm25 --depth 24 \
    --out "$OUT/bm25.run"
[ -e "$OUT/cosine.run" ] || "$PYTHON" results/bi_encoder.py "$MODEL" "$data" "$OUT/bm25.run" \
    "$OUT/cosine.run"
awk '{ $5 *= 20; print }' "$OUT/cosine.run" > "$OUT/teacher.run" # as sharp as it was trained
"$PYTHON" train.py --backbone "$MODEL" --loss kl --dataset "$data" --lists "$OUT/teacher.run" \
    --list-size 16 --batch-size 4 --lr 1e-4 --steps 640 --dtype bfloat16 --out "$OUT/model" \
    --eval-dataset "$WIKIQA/dev" --eval-run "$WIKIQA/runs/candidates.dev.txt" --eval-measure AP \
    --eval-every 160 --save-every 640 --no-table --resume
rm -rf "$OUT/model/last"
