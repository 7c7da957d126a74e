#!/usr/bin/env bash
# results/study.sh on pydocs, its candidates and a teacher made first, from train.py's folder:
#
#     LOSSES="bce infonce marginmse mse" SEEDS=1 bash results/pydocs.sh MODEL
#
# MODEL: the folder of the weights of all-MiniLM-L6-v2. The teacher is the mean of three small
# models of different losses and of MODEL's cosine (results/bi_encoder.py). A step's documents are
# four times as long as WikiQA's. Start it again to go on.
set -eu
MODEL=${1:?the folder of the weights of all-MiniLM-L6-v2}
PYTHON=${PYTHON:-python}
OUT_DIR=${OUT_DIR:-runs/pydocs-shared}
QUERIES=${QUERIES:-1000} # of train: 160 steps read 640 of them
export PYTHON OUT_DIR DATA=pydocs CANDIDATES=$OUT_DIR/candidates TEACHER=$OUT_DIR/teacher.run
export LRS=${LRS:-1e-4} STEPS=${STEPS:-160} EVAL_QUERIES=${EVAL_QUERIES:-60}
mkdir -p "$OUT_DIR"

bm25() { # SPLIT DEPTH
    [ -e "$CANDIDATES.$1.txt" ] || "$PYTHON" rerank.py --dataset "pydocs/$1" --first-stage bm25 \
        --depth "$2" --out "$CANDIDATES.$1.txt"
}
part() { # of the train queries some, drawn by seed 1
    [ -e "$OUT_DIR/part.run" ] || "$PYTHON" - "$CANDIDATES.train.txt" "$OUT_DIR/part.run" \
        "$QUERIES" << 'PYTHON'
import random, sys
from data.runs import read_run, write_run

run, number = read_run(sys.argv[1]), int(sys.argv[3])
write_run(sys.argv[2], {qid: run[qid] for qid in random.Random(1).sample(sorted(run), number)})
PYTHON
}
member() { # LOSS SEED
    "$PYTHON" train.py --backbone tiny --loss "$1" --seed "$2" --steps 450 --eval-dataset none \
        --out "$OUT_DIR/member-$1" --resume
}
teach() { # SPLIT RUN OUT
    [ -e "$OUT_DIR/members.$1.run" ] || "$PYTHON" teacher.py cross-encoder --dtype float32 \
        --model "$OUT_DIR"/member-* --dataset "pydocs/$1" --run "$2" --out "$OUT_DIR/members.$1.run"
    [ -e "$3" ] || "$PYTHON" results/bi_encoder.py "$MODEL" "pydocs/$1" "$OUT_DIR/members.$1.run" \
        "$3" --mean
}

bm25 train 20
bm25 dev 10
bm25 test 10
part
member infonce 1
member hinge 2
member bce 3
teach train "$OUT_DIR/part.run" "$TEACHER"
teach test "$CANDIDATES.test.txt" "$OUT_DIR/teacher.test.run" # for the table
bash results/study.sh "$MODEL"
