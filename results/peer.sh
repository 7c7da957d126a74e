#!/usr/bin/env bash
# Seconds of a training: sentence-transformers' CrossEncoderTrainer beside train.py, the same batches
# in turns, alone on the machine. (What they learn: TRAIN=results/peer.py bash results/study.sh.)
#
#     bash results/peer.sh MODEL
set -eu
MODEL=${1:?the folder of the encoder\'s weights}
DATA=${DATA:-../shared/data/wikiqa}
STEPS=${STEPS:-80}
TURNS=${TURNS:-3}
PYTHON=${PYTHON:-python}
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT

flags=(--backbone "$MODEL" --dataset "$DATA/train" --lists "$DATA/runs/candidates.train.txt"
    --negatives shared --list-size 8 --batch-size 4 --lr 1e-4 --steps "$STEPS" --dtype bfloat16
    --eval-dataset "$DATA/dev" --eval-run "$DATA/runs/candidates.dev.txt" --eval-every "$STEPS")
timed() { # SCRIPT LOSS
    "$PYTHON" "$1" --loss "$2" "${flags[@]}" --out "$out/run" > "$out/log" 2>&1 ||
        { cat "$out/log" >&2; exit 1; }
}
ours() { # LOSS
    timed train.py "$1"
    "$PYTHON" - "$out/run/log.jsonl" << 'PYTHON'
import datetime, json, sys

rows = [json.loads(line) for line in open(sys.argv[1])]
first, *_, last = (row for row in rows if "loss" in row)
start, end = (datetime.datetime.fromisoformat(row["time"]) for row in (first, last))
print((end - start).total_seconds() / (last["step"] - first["step"]))
PYTHON
    rm -r "$out/run"
}
theirs() { # LOSS
    timed results/peer.py "$1"
    sed -nE 's/^best .*; ([0-9]+) steps, .*: ([0-9.]+) s without validations/\2 \1/p' "$out/log" |
        awk '{ print $1 / $2 }'
    rm -r "$out/run"
}

printf '| turn | losses | train.py, s a step | sentence-transformers, s a step |\n|---|---|---:|---:|\n'
for turn in $(seq "$TURNS"); do
    for pair in "bce bce" "infonce lambda"; do
        a=$(ours "${pair% *}")
        b=$(theirs "${pair#* }")
        printf '| %s | %s | %.3f | %.3f |\n' "$turn" "${pair/ / and }" "$a" "$b"
    done
done
