#!/usr/bin/env bash
# sentence-transformers' CrossEncoderTrainer beside train.py on WikiQA: the same lists, steps, rates
# to choose from and seeds as results/study.sh; then the time of both, in turns on all cores.
#
#     bash results/peer.sh MODEL runs/wikiqa-shared        after results/study.sh
#
# STUDY/peer.md gets the tables. Start it again to go on.
set -eEu
trap 'wait; echo "error: a command failed; the newest log in $out says why" >&2' ERR
MODEL=${1:?the folder of the encoder\'s weights} STUDY=${2:?the folder of results/study.sh}
DATA=${DATA:-../shared/data/wikiqa}
LRS=${LRS:-1e-4 5e-5}     # the better one on dev for each loss, seed 1
SEEDS=${SEEDS:-1 2 3}
TURNS=${TURNS:-3}         # of the timing
PYTHON=${PYTHON:-python}
out=$STUDY/peer
mkdir -p "$out"

flags() { # LR STEPS SEED OUT
    printf '%s\n' --backbone "$MODEL" --dataset "$DATA/train" --lists "$STUDY/teacher.run" \
        --negatives shared --list-size 8 --batch-size 4 --lr "$1" --steps "$2" --seed "$3" \
        --eval-dataset "$DATA/dev" --eval-run "$DATA/runs/candidates.dev.txt" \
        --eval-measure AP --eval-every $((($2 + 3) / 4)) --dtype bfloat16 --out "$4"
}
cell() { # LOSS LR SEED: one training, and test re-ranked by it
    local name=$1-lr$2-seed$3
    [ -e "$out/$name/test.run.gz" ] && return
    mapfile -t words < <(flags "$2" 320 "$3" "$out/$name")
    "$PYTHON" results/peer.py "$1" "${words[@]}" > "$out/$name.log" 2>&1
    "$PYTHON" rerank.py --model "$out/$name" --dataset "$DATA/test" --dtype float32 \
        --run "$DATA/runs/candidates.test.txt" --out "$out/$name/test.run.gz" \
        >> "$out/$name.log" 2>&1
}
both() { # LR SEED LR SEED: bce and lambda, a core each
    OMP_NUM_THREADS=1 cell bce "$1" "$2" &
    local bce=$!
    OMP_NUM_THREADS=1 cell lambda "$3" "$4"
    wait $bce # with its status: a failure of either ends the script
}
better() { # LOSS: its rate
    for lr in $LRS; do
        echo "$(sed -nE 's/^best AP ([0-9.]+);.*/\1/p' "$out/$1-lr$lr-seed1.log") $lr"
    done | sort -r | sed -nE '1s/.* //p'
}
seconds() { # LOG.jsonl: of a step, from the times of its rows
    "$PYTHON" -c 'import datetime, json, sys
rows = [json.loads(line) for line in open(sys.argv[1]) if "loss" in line]
first, last = (datetime.datetime.fromisoformat(rows[i]["time"]) for i in (0, -1))
print((last - first).total_seconds() / (rows[-1]["step"] - rows[0]["step"]))' "$1"
}

for lr in $LRS; do both "$lr" 1 "$lr" 1; done
for seed in $SEEDS; do both "$(better bce)" "$seed" "$(better lambda)" "$seed"; done

for turn in $(seq "$TURNS"); do
    for loss in bce lambda; do
        [ -e "$out/time-$loss-$turn.log" ] && continue
        mapfile -t words < <(flags 1e-4 160 1 "$out/time") # validated behind the last step alone
        ours=$([ $loss = bce ] && echo bce || echo infonce)
        "$PYTHON" train.py --loss "$ours" "${words[@]}" --eval-every 160 --no-table --overwrite \
            > "$out/time-ours-$ours-$turn.log" 2>&1
        seconds "$out/time/log.jsonl" > "$out/time-ours-$ours-$turn.seconds"
        "$PYTHON" results/peer.py "$loss" "${words[@]}" --eval-every 160 \
            > "$out/time-$loss-$turn.log" 2>&1
        rm -r "$out/time"
    done
done

of() { # LOSS LR: its runs
    ls "$out/$1-lr$2"-seed*/test.run.gz
}
{
    printf '# sentence-transformers beside train.py, test\n\n'
    mapfile -t runs < <(ls "$STUDY"/students/{bce,infonce}-*/*-test.run.gz
                        of bce "$(better bce)"; of lambda "$(better lambda)")
    "$PYTHON" evaluate.py --dataset "$DATA/test" --baseline "${runs[0]}" "${runs[@]}" \
        --measures AP RR P@1
    printf '\nAP on dev of the step that was kept:\n\n'
    grep -oE "^best AP [0-9.]+" "$out"/*-seed*.log | sed "s|$out/||"
    printf '\nSeconds a step, all cores, in turns: ours, then theirs\n\n'
    grep -H . "$out"/time-ours-*.seconds | sed "s|$out/||"
    grep -oE "^best.*" "$out"/time-{bce,lambda}-*.log | sed "s|$out/||"
} > "$STUDY/peer.md"
echo "$STUDY/peer.md"
