#!/usr/bin/env bash
# Does DAgger beat imitation? The study of the README, on the embedded tasks with the embedded student.
#
#   tests/bench/study.sh                  runs what study.jsonl has no line for, then prints the tables (15 hours of one core)
#   SEEDS="1 2" ARMS="dagger sft" tests/bench/study.sh
#   JOBS=2 tests/bench/study.sh           so many seeds at once, with one thread each
#   RESULTS=try.jsonl HOME_OF_RUNS=runs/try tests/bench/study.sh     a study of your own, beside this one
#
# Every arm: 3 iterations on fresh tasks of toy:train2, in each exactly 300 labels to train on (but for sft-tasks; what else
# the teacher answers is counted, `asked`) and 3 x 30 optimiser steps, going on from the last adapter; three checkpoints are
# scored on toy:dev2:24, the best one (the earliest of equals) on toy:study2, which nothing else reads. Arms differ in who
# acts while tasks are collected:
#
#   sft           the teacher alone, always (beta 1): behaviour cloning on fresh demonstrations
#   dagger        beta 1, 0.5, 0 (linear:2)
#   dagger-paper  beta 1, 0.8, 0.6 (the paper's schedule)
#   aggrevate     the student acts in the first kappa turns, kappa up to 0, 3, 6, then the teacher (prefix 0:3)
#   rft           the teacher alone, who errs at 3 of 10 turns; only trajectories that resolve their task (rejection sampling).
#                 Its teacher is worse than the others': rft - sft is about both, the teacher and the filter. It tries 90
#                 tasks in an iteration, to have 300 labels left; the others collect 64, which begin as its 90 do
#   sft-tasks     as sft, but on as many tasks as dagger had labels from, so with fewer labels: the match by tasks
#                 (where the runs of dagger and sft of that seed are not in HOME_OF_RUNS they are made for it)
#
# The first iteration of sft, dagger, dagger-paper and sft-tasks is the same by definition, and is run once per seed.
# tests/bench/study.py says which comparisons were chosen before any result was seen, and prints them.
set -euo pipefail
cd "$(dirname "$0")/../.."
. common/setup.sh

SEEDS=${SEEDS:-}                          # default: 1 to 5 for the main pair, 1 to 3 for the others
ARMS=${ARMS:-dagger sft sft-tasks dagger-paper aggrevate rft}
JOBS=${JOBS:-1}
export RESULTS=${RESULTS:-} HOME_OF_RUNS=${HOME_OF_RUNS:-runs/study}
export PYTHON
[ "$JOBS" = 1 ] || export OMP_NUM_THREADS=1

unset $(sed -n 's/^\([A-Z_]*\)=\${\1.*/\1/p' run_loop.sh)  # the knobs are those below, whatever the caller has set

case $HOME_OF_RUNS in /*) ;; *) HOME_OF_RUNS=$PWD/$HOME_OF_RUNS ;; esac

loop() { # RUN SEED, knobs as NAME=VALUE...
    env RUN="$HOME_OF_RUNS/$1" SEED="$2" ITERATIONS=3 SAMPLE=64 MAX_LABELS=300 AGGREGATE=current WORKERS=50 \
        TASKS=toy:train2 EVAL_TASKS=toy:dev2:24 TEST_TASKS=toy:study2 STAGES=collect,relabel,train,eval,test \
        AGENT_FLAGS="--max-turns 10" TRAIN_FLAGS="--epochs 3 --steps-per-epoch 30 --measure 0" "${@:3}" \
        ./run_loop.sh >/dev/null
}

begin() { # RUN SEED: the first iteration, which runs of a seed have in common
    local first=$HOME_OF_RUNS/first-$2
    [ -e "$first/done" ] || { loop "first-$2" "$2" SCHEDULE=constant:1 ITERATIONS=1 TEST_TASKS=; touch "$first/done"; }
    [ -e "$HOME_OF_RUNS/$1/iter_001" ] || {
        rm -rf "$HOME_OF_RUNS/$1"
        mkdir -p "$HOME_OF_RUNS/$1"
        cp -a "$first/iter_001" "$HOME_OF_RUNS/$1/half"
        mv "$HOME_OF_RUNS/$1/half" "$HOME_OF_RUNS/$1/iter_001"
    }
}

one() { # ARM SEED; no && and || here: they would switch off set -e
    case $("$PYTHON" tests/bench/study.py has "$1" "$2") in yes) return ;; no) ;; *) exit 1 ;; esac
    make_run "$1" "$2"
    for i in 1 2 3; do shift_of "$HOME_OF_RUNS/$1-$2" "$i"; done
    "$PYTHON" tests/bench/study.py line "$HOME_OF_RUNS/$1-$2" "$1" "$2"
}

make_run() { # ARM SEED
    local run=$1-$2 knobs
    echo "== $run" >&2
    if [ "$1" = sft-tasks ]; then
        for arm in dagger sft; do
            if [ ! -e "$HOME_OF_RUNS/$arm-$2/iter_003/eval/manifest.json" ]; then make_run "$arm" "$2"; fi
        done
    fi
    case $1 in
        sft) knobs=(SCHEDULE=constant:1) ;;
        dagger) knobs=(SCHEDULE=linear:2) ;;
        dagger-paper) knobs=(SCHEDULE=paper) ;;
        aggrevate) knobs=(MIX=prefix PREFIX_TURNS=0:3) ;;
        rft) knobs=(MIX=teacher TEACHER=oracle,noise=0.3 KEEP=resolved SAMPLE=90) ;;
        sft-tasks) knobs=(SCHEDULE=constant:1 MAX_LABELS="$("$PYTHON" tests/bench/study.py match-tasks "$HOME_OF_RUNS" "$2")") ;;
        *) echo "no arm $1" >&2; return 2 ;;
    esac
    case $1 in rft | aggrevate) ;; *) begin "$run" "$2" ;; esac
    loop "$run" "$2" "${knobs[@]}"
}

shift_of() { # RUN ITERATION: -log p of the expert's actions at the states that the student and the expert meet on toy:dev2:24
    local who from to
    for who in student teacher; do
        to=$1/iter_00$2/at_states_of_$who
        from=$1/iter_00$2/eval
        if [ $who = teacher ]; then from=$HOME_OF_RUNS/teacher; fi
        if [ -e "$to/label_nll.jsonl" ]; then continue; fi
        mkdir -p "$to"
        cp "$from/trajectories.jsonl" "$to/trajectories.jsonl"
        "$PYTHON" 02_relabel.py --trajectories "$to/trajectories.jsonl" --teacher oracle --out "$to/labels.jsonl" >/dev/null
        "$PYTHON" 03_train.py --data "$to" --init-adapter "$1/iter_00$2/adapter" --dry-run --out "$to/none" \
            --label-nll "$to/label_nll.jsonl" >/dev/null
    done
}

seed() { # SEED ARM...
    for arm in "${@:2}"; do one "$arm" "$1"; done
}
export -f loop begin one make_run shift_of seed

"$PYTHON" 04_eval.py --tasks toy:dev2:24 --student oracle --out "$HOME_OF_RUNS/teacher" --workers 4 --max-turns 10 >/dev/null

main=" dagger sft "
first=() others=()
for arm in $ARMS; do if [[ $main == *" $arm "* ]]; then first+=("$arm"); else others+=("$arm"); fi; done
[ ${#first[@]} = 0 ] || printf '%s\n' ${SEEDS:-1 2 3 4 5} | xargs -P "$JOBS" -I {} bash -euc "seed {} ${first[*]}"
[ ${#others[@]} = 0 ] || printf '%s\n' ${SEEDS:-1 2 3} | xargs -P "$JOBS" -I {} bash -euc "seed {} ${others[*]}"
"$PYTHON" tests/bench/study.py tables
