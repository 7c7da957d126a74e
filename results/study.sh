#!/usr/bin/env bash
# Does the paper's order of objectives (relative ones beat pointwise ones on equal lists) show with
# a pretrained encoder? Eight losses on WikiQA or another collection, from train.py's folder:
#
#     bash results/study.sh MODEL                 MODEL: the folder of the encoder's weights
#     LISTS=recipe bash results/study.sh MODEL    each loss on lists of its own kind
#     DATA=pydocs CANDIDATES=runs/bm25 bash results/study.sh MODEL
#
# OUT_DIR/study.md gets the tables, OUT_DIR/logs what each command says. Start it again to go on:
# what is finished stays as it is, a teacher too. Ctrl-C: trainings end their step and save first.
# Disk: 0.1 GB a training of about 50, 0.3 GB more for each that is under way.
set -u
MODEL=${1:-${MODEL:?the folder of the weights of all-MiniLM-L6-v2}}
DATA=${DATA:-../shared/data/wikiqa}     # splits train, dev and test
CANDIDATES=${CANDIDATES:-$DATA/runs/candidates} # what is learned from and re-ranked: .SPLIT.txt
LISTS=${LISTS:-shared}                  # shared: 4 lists of 8 documents a step for every loss
TEACHER=${TEACHER:-}                    # a run over the train candidates; none: it is made here
LOSSES=${LOSSES:-bce hinge infonce marginmse ranknet adrmse kl mse}
TRAIN=${TRAIN:-train.py}                # results/peer.py: sentence-transformers, LOSSES="bce lambda"
LRS=${LRS:-1e-4 5e-5}                   # chosen from by AP on dev; the teacher's members: the first
EVAL_QUERIES=${EVAL_QUERIES:-}          # of dev, for the choice; none: all
STEPS=${STEPS:-320}                     # chosen from likewise, where there are several
SEEDS=${SEEDS:-1 2 3}                   # seed 1 chooses, all are judged
JOBS=${JOBS:-$(nproc)}                  # trainings at a time; 12 share a card well
UNTIL=${UNTIL:-9999999999}              # no training starts after this second of the epoch
PYTHON=${PYTHON:-python}
OUT_DIR=${OUT_DIR:-runs/${DATA##*/}-$LISTS}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MODEL DATA CANDIDATES LISTS EVAL_QUERIES UNTIL PYTHON
export TRAIN OUT_DIR
labels="bce hinge infonce" # the teacher's members
teacher=${TEACHER:-$OUT_DIR/teacher.run}
trap 'exit 130' INT

mkdir -p "$OUT_DIR/logs" || exit
rm -f "$OUT_DIR/failed" "$OUT_DIR/left"
settings="MODEL=$MODEL DATA=$DATA CANDIDATES=$CANDIDATES LISTS=$LISTS TEACHER=$TEACHER \
TRAIN=$TRAIN"
[ -e "$OUT_DIR/settings" ] || echo "$settings" > "$OUT_DIR/settings"
if [ "$(< "$OUT_DIR/settings")" != "$settings" ]; then
    echo "error: $OUT_DIR was begun with $(< "$OUT_DIR/settings"); name another OUT_DIR" >&2
    exit 2
fi

logged() { # NAME command...: its output goes to a file of its own; a failure is noted
    "${@:2}" >> "$OUT_DIR/logs/$1.log" 2>&1 || { echo "$1" >> "$OUT_DIR/failed"; return 1; }
}
cell() { # FOLDER LISTS-FILE LR STEPS SEED LOSS: one training
    local name=$6-lr$3-steps$4-seed$5 size=8 batch=4 # 32 documents a step
    local out=$OUT_DIR/$1/$name
    [ -e "$out/README.md" ] && return # the card is written last
    if [ "$(date +%s)" -ge "$UNTIL" ]; then echo "$1/$name" >> "$OUT_DIR/left"; return; fi
    case $LISTS-$6 in
        recipe-bce|recipe-hinge|recipe-marginmse) size=2 batch=16 ;;
        recipe-ranknet|recipe-adrmse|recipe-kl) size=50 batch=3 ;; # all candidates, 10 on average
    esac
    logged "$1-$name" "$PYTHON" "$TRAIN" --backbone "$MODEL" --loss "$6" --dataset "$DATA/train" \
        --lists "$2" --negatives "$LISTS" --list-size $size --batch-size $batch --lr "$3" \
        --steps "$4" --seed "$5" --eval-dataset "$DATA/dev" --eval-measure AP \
        --eval-run "$CANDIDATES.dev.txt" --eval-every $((($4 + 3) / 4)) \
        ${EVAL_QUERIES:+--eval-queries "$EVAL_QUERIES"} \
        --save-every "$4" --no-table --dtype bfloat16 --out "$out" --resume && rm -rf "$out/last"
    return 0
}
cells() { # FOLDER LISTS-FILE, and lines of LR STEPS SEED LOSS: all of them, JOBS at a time
    xargs -r -P "$JOBS" -L 1 bash -c 'cell "$@"' cell "$1" "$2"
}
grid() { # RATES losses...: each at every rate and number of steps, seed 1
    for n in $STEPS; do for lr in $1; do printf "$lr $n 1 %s\n" "${@:2}"; done; done
}
choose() { # FOLDER: LOSS-SETTING that is best on dev, of each loss; all values in FOLDER-dev.md
    "$PYTHON" - "$OUT_DIR/$1" $LOSSES << 'PYTHON'
import json, re, sys
from pathlib import Path

folder, dev = Path(sys.argv[1]), {}
for card in folder.glob("*-seed1/README.md"):
    loss, lr, steps = re.fullmatch(r"(\w+)-lr(.+)-steps(\d+)-seed1", card.parent.name).groups()
    rows = map(json.loads, card.with_name("log.jsonl").read_text().splitlines())
    best = max(row["score"] for row in rows if "score" in row)  # of the step that was kept
    dev.setdefault(loss, {})[int(steps), float(lr), f"lr{lr}-steps{steps}"] = best
lines = ["| loss | chosen | AP on dev of every setting, seed 1 |", "|---|---|---|"]
for loss in filter(dev.get, sys.argv[2:]):
    values = sorted(dev[loss].items())
    chosen = max(values, key=lambda row: row[1])[0][2]  # of equals the lowest rate
    print(f"{loss}-{chosen}")
    every = ", ".join(f"{setting[2]} {value:.4f}" for setting, value in values)
    lines.append(f"| {loss} | {chosen} | {every} |")
Path(f"{folder}-dev.md").write_text("\n".join(lines) + "\n")
PYTHON
}
each_seed() { # run...: for each measure the value of every seed, their mean and deviation
    "$PYTHON" - "$DATA/test" "$@" << 'PYTHON'
import re, statistics, sys
from pathlib import Path
from data.runs import read_run
from data.texts import Texts
from evaluate import evaluate, mean

qrels, values = Texts(sys.argv[1]).qrels, {}
for path in map(Path, sys.argv[2:]):
    name, seed = re.fullmatch(r"(.+)-seed(\d+)", path.parent.name).groups()
    values.setdefault(name, {})[seed] = mean(evaluate(qrels, read_run(path), ["AP", "RR", "P@1"]))
for measure in ("AP", "RR", "P@1"):
    print(f"\n| {measure} | each seed | mean | sd |\n|---|---|---:|---:|")
    for name, of_seed in values.items():
        numbers = [value[measure] for value in of_seed.values()]
        each = ", ".join(f"{seed}: {value[measure]:.4f}" for seed, value in of_seed.items())
        sd = f"{statistics.stdev(numbers):.4f}" if len(numbers) > 1 else ""
        print(f"| {name} | {each} | {statistics.mean(numbers):.4f} | {sd} |")
PYTHON
}
scored() { # NAME script flags...: in one process, with the cores of all jobs
    OMP_NUM_THREADS=$JOBS logged "$1" "$PYTHON" "${@:2}" --dtype float32
}
files() { # PATTERN: of the folders of all seeds of what was chosen, a line each
    for name in "${chosen[@]}"; do ls "$OUT_DIR/$folder/$name"-seed*/$1 2> /dev/null; done
}
judge() { # BASELINE run...: a table
    "$PYTHON" evaluate.py --dataset "$DATA/test" --baseline "$1" "${@:2}" --measures AP RR P@1 ||
        echo judge >> "$OUT_DIR/failed"
}
stage() { echo "stage $1 (after $SECONDS s)"; }
export -f logged cell

stage "1: members of the teacher: losses on labels, seed 1"
[ "$TEACHER" ] || grid "${LRS%% *}" $labels | cells members "$CANDIDATES.train.txt"

stage "2: the teacher: the mean of the members, which saw the labels of what it scores"
mapfile -t chosen < <(choose members)
members=("${chosen[@]/#/$OUT_DIR/members/}")
teach() { # SPLIT OUT
    [ -e "$2" ] || scored "teacher-$1" teacher.py cross-encoder --model "${members[@]/%/-seed1}" \
        --dataset "$DATA/$1" --run "$CANDIDATES.$1.txt" --out "$2"
}
if [ -z "$TEACHER" ] && [ ${#members[@]} = 3 ] && [ ! -e "$OUT_DIR/left" ]; then
    teach test "$OUT_DIR/ensemble.run" & # for the table
    teach train "$teacher"
    wait
fi

stage "3: every loss on the teacher's lists, seed 1"
# those on labels too: lists are drawn in the order of their file, so one file makes them the same
[ -e "$teacher" ] && grid "$LRS" $LOSSES | cells students "$teacher"

stage "4: the other seeds at the chosen rate"
folder=students
mapfile -t chosen < <(choose students)
for s in $SEEDS; do
    printf '%s\n' "${chosen[@]}" | sed -nE "s/(.+)-lr(.+)-steps(.+)/\2 \3 $s \1/p"
done | cells students "$teacher"
if [ ${#chosen[@]} = 0 ]; then # time ran out before
    folder=members chosen=("${members[@]##*/}")
fi

stage "5: re-ranking test"
mapfile -t cards < <(files README.md)
if [ ${#cards[@]} = 0 ]; then echo "error: nothing is trained, see $OUT_DIR/logs" >&2; exit 1; fi
scored rerank rerank.py --model "${cards[@]%/README.md}" \
    --dataset "$DATA/test" --run "$CANDIDATES.test.txt" --out "$OUT_DIR/$folder"

stage "6: judging"
mapfile -t test < <(files "*-test.run.gz")
mapfile -t taught < <(printf '%s\n' "${test[@]}" | grep -E "/(marginmse|ranknet|adrmse|kl|mse)-")
first() { printf '%s\n' "${test[@]}" | grep -m 1 "/$1-lr"; }
{
    echo "# ${DATA##*/}, $LISTS lists, $(basename "$MODEL"), $folder"
    printf '\n## Learning rates\n\n'
    cat "$OUT_DIR/$folder-dev.md"
    printf '\n## Test\n\n'
    ensemble=$(ls "$OUT_DIR/ensemble.run" 2> /dev/null)
    judge "$(first bce)" "$CANDIDATES.test.txt" ${ensemble:+"$ensemble"} "${test[@]}"
    if [ ${#taught[@]} -gt 0 ]; then
        printf '\nThe losses on a teacher, against the pointwise one of them:\n\n'
        judge "$(first mse)" "${taught[@]}"
    fi
    each_seed "${test[@]}"
} > "$OUT_DIR/study.md"
echo "done after $SECONDS s: $OUT_DIR/study.md"
for what in failed left; do # left: not begun, for UNTIL
    [ ! -e "$OUT_DIR/$what" ] || printf '\n%s: %s\n' $what "$(paste -sd ' ' "$OUT_DIR/$what")"
done | tee -a "$OUT_DIR/study.md" >&2
[ ! -e "$OUT_DIR/failed" ]
