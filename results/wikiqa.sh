#!/usr/bin/env bash
# Does the paper's order of objectives (relative ones beat pointwise ones on equal lists) show with
# a pretrained encoder on real questions? all-MiniLM-L6-v2 on WikiQA, eight losses.
#
#     bash results/wikiqa.sh MODEL                 MODEL: the folder of its weights; from train.py's
#     LISTS=recipe bash results/wikiqa.sh MODEL    each loss on lists of its own kind
#
# OUT_DIR/study.md gets the tables, OUT_DIR/logs what each command says. Start it again to go on:
# what is finished stays as it is, a teacher too. Ctrl-C: trainings end their step and save first.
# Disk: 0.1 GB a training of about 50, 0.3 GB more for each that is under way.
set -u
MODEL=${1:-${MODEL:?the folder of the weights of all-MiniLM-L6-v2}}
WIKIQA=${WIKIQA:-../shared/data/wikiqa} # in BEIR layout, with runs/candidates.SPLIT.txt
LISTS=${LISTS:-shared}                  # shared: 8 lists of 8 documents a step for every loss
TEACHER=${TEACHER:-}                    # a run over the train candidates; none: it is made here
LRS=${LRS:-1e-4 3e-5 3e-4}              # chosen from by AP on dev; the likeliest first
STEPS=${STEPS:-320}                     # chosen from likewise, where there are several
SEEDS=${SEEDS:-1 2 3}                   # seed 1 chooses, all are judged
JOBS=${JOBS:-$(nproc)}                  # trainings at a time; 12 share a card well
UNTIL=${UNTIL:-9999999999}              # no training starts after this second of the epoch
PYTHON=${PYTHON:-python}
OUT_DIR=${OUT_DIR:-runs/wikiqa$([ "$LISTS" = shared ] || echo "-$LISTS")}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MODEL WIKIQA LISTS UNTIL PYTHON OUT_DIR
labels="bce hinge infonce" losses="$labels marginmse ranknet adrmse kl mse"
candidates=$WIKIQA/runs/candidates teacher=${TEACHER:-$OUT_DIR/teacher.run}
trap 'exit 130' INT

mkdir -p "$OUT_DIR/logs" || exit
rm -f "$OUT_DIR/failed" "$OUT_DIR/left"
settings="MODEL=$MODEL WIKIQA=$WIKIQA LISTS=$LISTS TEACHER=$TEACHER"
[ -e "$OUT_DIR/settings" ] || echo "$settings" > "$OUT_DIR/settings"
if [ "$(< "$OUT_DIR/settings")" != "$settings" ]; then
    echo "error: $OUT_DIR was begun with $(< "$OUT_DIR/settings"); name another OUT_DIR" >&2
    exit 2
fi

logged() { # NAME command...: its output goes to a file of its own; a failure is noted
    "${@:2}" >> "$OUT_DIR/logs/$1.log" 2>&1 || { echo "$1" >> "$OUT_DIR/failed"; return 1; }
}
cell() { # FOLDER LISTS-FILE LR STEPS SEED LOSS: one training
    local name=$6-lr$3-steps$4-seed$5 size=8 batch=8 # 64 documents a step
    local out=$OUT_DIR/$1/$name
    [ -e "$out/README.md" ] && return # the card is written last
    if [ "$(date +%s)" -ge "$UNTIL" ]; then echo "$1/$name" >> "$OUT_DIR/left"; return; fi
    case $LISTS-$6 in
        recipe-bce|recipe-hinge|recipe-marginmse) size=2 batch=32 ;;
        recipe-ranknet|recipe-adrmse|recipe-kl) size=50 batch=6 ;; # all candidates, 10 on average
    esac
    logged "$1-$name" "$PYTHON" train.py --backbone "$MODEL" --loss "$6" --dataset "$WIKIQA/train" \
        --lists "$2" --negatives "$LISTS" --list-size $size --batch-size $batch --lr "$3" \
        --steps "$4" --seed "$5" --eval-dataset "$WIKIQA/dev" --eval-measure AP \
        --eval-run "$WIKIQA/runs/candidates.dev.txt" --eval-every $((($4 + 3) / 4)) \
        --save-every "$4" --no-table --dtype bfloat16 --out "$out" --resume && rm -rf "$out/last"
    return 0
}
cells() { # FOLDER LISTS-FILE, and lines of LR STEPS SEED LOSS: all of them, JOBS at a time
    xargs -r -P "$JOBS" -L 1 bash -c 'cell "$@"' cell "$1" "$2"
}
grid() { # losses...: each at every rate and number of steps, seed 1
    for n in $STEPS; do for lr in $LRS; do printf "$lr $n 1 %s\n" "$@"; done; done
}
choose() { # FOLDER: LOSS-SETTING that is best on dev, of each loss; all values in FOLDER-dev.md
    "$PYTHON" - "$OUT_DIR/$1" $losses << 'PYTHON'
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
each_seed() { # SPLIT run...: for each measure the value of every seed, their mean and deviation
    "$PYTHON" - "$WIKIQA/qrels/$1.tsv" "${@:2}" << 'PYTHON'
import re, statistics, sys
from pathlib import Path
from data.runs import read_qrels, read_run
from evaluate import evaluate, mean

qrels, values = read_qrels(sys.argv[1]), {}
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
judge() { # SPLIT BASELINE runs and flags...: a table; tested against the baseline, if one is given
    "$PYTHON" evaluate.py --dataset "$WIKIQA/$1" ${2:+--baseline "$2"} "${@:3}" \
        --measures AP RR P@1 || echo "judge-$1" >> "$OUT_DIR/failed"
}
stage() { echo "stage $1 (after $SECONDS s)"; }
export -f logged cell

stage "1: members of the teacher: losses on labels, seed 1"
[ "$TEACHER" ] || grid $labels | cells members "$candidates.train.txt"

stage "2: the teacher: the mean of the members, which saw the labels of what it scores"
mapfile -t chosen < <(choose members)
members=("${chosen[@]/#/$OUT_DIR/members/}")
teach() { # SPLIT OUT
    [ -e "$2" ] || scored "teacher-$1" teacher.py cross-encoder --model "${members[@]/%/-seed1}" \
        --dataset "$WIKIQA/$1" --run "$candidates.$1.txt" --out "$2"
}
if [ -z "$TEACHER" ] && [ ${#members[@]} = 3 ] && [ ! -e "$OUT_DIR/left" ]; then
    teach test "$OUT_DIR/ensemble.run" & # for the table
    teach train "$teacher"
    wait
fi

stage "3: every loss on the teacher's lists, seed 1"
# those on labels too: lists are drawn in the order of their file, so one file makes them the same
[ -e "$teacher" ] && grid $losses | cells students "$teacher"

stage "4: the other seeds at the chosen rate"
folder=students
mapfile -t chosen < <(choose students)
for s in $SEEDS; do
    printf '%s\n' "${chosen[@]}" | sed -nE "s/(.+)-lr(.+)-steps(.+)/\2 \3 $s \1/p"
done | cells students "$teacher"
if [ ${#chosen[@]} = 0 ]; then # time ran out before
    folder=members chosen=("${members[@]##*/}")
fi

stage "5: re-ranking test and dev"
mapfile -t cards < <(files README.md)
if [ ${#cards[@]} = 0 ]; then echo "error: nothing is trained, see $OUT_DIR/logs" >&2; exit 1; fi
scored rerank rerank.py --model "${cards[@]%/README.md}" \
    --dataset "$WIKIQA/test" "$WIKIQA/dev" --run "$candidates.test.txt" "$candidates.dev.txt" \
    --out "$OUT_DIR/$folder"

stage "6: judging"
mapfile -t test < <(files "*-test.run.gz")
mapfile -t dev < <(files "*-dev.run.gz")
mapfile -t taught < <(printf '%s\n' "${test[@]}" | grep -E "/(marginmse|ranknet|adrmse|kl|mse)-")
first() { printf '%s\n' "${test[@]}" | grep -m 1 "/$1-lr"; }
{
    echo "# WikiQA, $LISTS lists, $(basename "$MODEL"), $folder"
    printf '\n## Learning rates\n\n'
    cat "$OUT_DIR/$folder-dev.md"
    printf '\n## Test\n\n'
    ensemble=$(ls "$OUT_DIR/ensemble.run" 2> /dev/null)
    judge test "$(first bce)" "$candidates.test.txt" ${ensemble:+"$ensemble"} "${test[@]}"
    if [ ${#taught[@]} -gt 0 ]; then
        printf '\nThe losses on a teacher, against the pointwise one of them:\n\n'
        judge test "$(first mse)" "${taught[@]}"
    fi
    each_seed test "${test[@]}"
    printf '\n## Dev, by which rate and step were chosen\n\n'
    judge dev "" --test none "$candidates.dev.txt" "${dev[@]}"
} > "$OUT_DIR/study.md"
echo "done after $SECONDS s: $OUT_DIR/study.md"
for what in failed left; do # left: not begun, for UNTIL
    [ ! -e "$OUT_DIR/$what" ] || printf '\n%s: %s\n' $what "$(paste -sd ' ' "$OUT_DIR/$what")"
done | tee -a "$OUT_DIR/study.md" >&2
[ ! -e "$OUT_DIR/failed" ]
