#!/usr/bin/env bash
# Do models trained on WikiQA serve other collections? TREC-DL 2019 and SciFact, BM25's first ones
# re-ranked by every model that results/study.sh chose.
#
#     bash results/transfer.sh runs/wikiqa/students
#
# Prints a table of each collection, losses in the mean of their seeds. Start it again to go on.
set -eu
folder=${1:?the folder of models of results/study.sh}
SHARED=${SHARED:-../shared/data}  # trec-dl-2019/ and scifact/ in BEIR layout, with runs/
DEPTHS=${DEPTHS:-trec-dl-2019=100 scifact=20}
PYTHON=${PYTHON:-python}

models=("$folder"/*/*-test.run.gz) # made by what was chosen alone
models=("${models[@]%/*}")
for collection in $DEPTHS; do
    name=${collection%=*} depth=${collection#*=}
    first=$SHARED/$name/runs/bm25.test.top100.txt
    [ -e "$first" ] || first=$SHARED/$name/runs/bm25.top100.txt
    "$PYTHON" rerank.py --model "${models[@]}" --dataset "$SHARED/$name" --run "$first" \
        --depth "$depth" --out "$folder" # into the model's folder each; what is finished stays
    runs=("$folder"/*/*-"$name.run.gz")
    printf '\n## %s, the first %s of BM25\n\n' "$name" "$depth"
    "$PYTHON" evaluate.py --dataset "$SHARED/$name" "$first" "${runs[@]}" \
        --baseline "$first" --measures nDCG@10 RR@10
done
