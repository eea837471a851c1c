#!/usr/bin/env bash
# DAgger for software-engineering agents, from the first demonstration to the trained student.
#
#   ./run_loop.sh                     the whole loop on the embedded tasks and student: a laptop, no GPU, no Docker
#   ITERATIONS=5 ./run_loop.sh        goes on from where a finished run stopped
#   RUN=mine TASKS=mine.jsonl EVAL_TASKS=dev.jsonl TEST_TASKS= TEACHER=openai:MODEL@URL STUDENT=hf:MODEL ./run_loop.sh
#   STUDENT=vllm:MODEL,util=0.3 TEACHER=vllm:LARGE_MODEL,util=0.6 ...   on a GPU, or on several: gpus=0 and gpus=1+2
#
# Every stage is a script that reads and writes files below runs/$RUN. Stop it at any moment and call it again.
set -euo pipefail
cd "$(dirname "$0")"

# The knobs
RUN=${RUN:-laptop}                        # the run lives in runs/$RUN, or in $RUN if that is absolute
ITERATIONS=${ITERATIONS:-3}               # DAgger iterations; the first is SFT on the teacher's own trajectories
TASKS=${TASKS:-toy:train}                 # collected on
EVAL_TASKS=${EVAL_TASKS:-toy:dev}         # chooses the iteration
TEST_TASKS=${TEST_TASKS-toy:test}         # looked at once, at the end; may be empty
STUDENT=${STUDENT:-hf:smollm2-135m}       # the base model, as a policy
TEACHER=${TEACHER:-oracle}                # who labels
MIX=${MIX:-turn}                          # turn (DAgger), teacher (SFT), student (on-policy)
SCHEDULE=${SCHEDULE:-linear:2}            # beta of each iteration
AGGREGATE=${AGGREGATE:-current}           # current (go on from the last adapter, as the paper does) or union (all labels so far)
SAMPLE=${SAMPLE:-96}                      # tasks per iteration
SEED=${SEED:-0}
WORKERS=${WORKERS:-32}                    # trajectories at once
AGENT_FLAGS=${AGENT_FLAGS:---max-turns 9} # more flags for 01 and 04
TRAIN_FLAGS=${TRAIN_FLAGS:---epochs 2 --batch-size 1 --lr 2e-3}  # more flags for 03; many small steps suit a tiny student,
                                          # a large one wants --lr 1e-4 and larger steps

. common/setup.sh

case $RUN in /*) run=$RUN ;; *) run=runs/$RUN ;; esac
base=${STUDENT%%,*} model=${base#*:}
export SWE_DAGGER_KEEPER=$$               # a vllm: server that one stage starts serves the next ones, until we end
iter() { printf '%s/iter_%03d' "$run" "$1"; }
student() { [ "$1" = 0 ] && echo "$STUDENT" || echo "$base,adapter=$(iter "$1")/adapter${STUDENT#"$base"}"; }
collected() {                             # what iteration $1 trains on, and what it starts from
    case $AGGREGATE in
        union) for ((j = 1; j <= $1; j++)); do iter "$j"; echo; done ;;
        current) iter "$1"; [ "$1" = 1 ] || echo " --init-adapter $(iter $(($1 - 1)))/adapter" ;;
        *) echo "AGGREGATE is union or current, not $AGGREGATE" >&2; exit 2 ;;
    esac
}
stage() { echo >&2; echo "== $1" >&2; shift; "$PYTHON" "$@" --seed "$SEED" >/dev/null; }

# Where we start: the untrained student, and the teacher who is to be imitated
stage "the untrained student on $EVAL_TASKS" 04_eval.py --tasks "$EVAL_TASKS" --student "$STUDENT" \
    --out "$(iter 0)/eval" --workers "$WORKERS" $AGENT_FLAGS
stage "the teacher on $EVAL_TASKS" 04_eval.py --tasks "$EVAL_TASKS" --student "$TEACHER" \
    --out "$run/teacher/eval" --workers "$WORKERS" $AGENT_FLAGS

for ((i = 1; i <= ITERATIONS; i++)); do
    dir=$(iter "$i")

    # 1. Teacher and student take turns on fresh tasks: b_t ~ Bernoulli(beta_i)
    stage "iteration $i: collect" 01_collect.py --tasks "$TASKS" --exclude-tasks "$EVAL_TASKS" $TEST_TASKS \
        --sample "$SAMPLE" --iteration "$i" --mix "$MIX" --schedule "$SCHEDULE" \
        --teacher "$TEACHER" --student "$(student $((i - 1)))" \
        --out "$dir/trajectories.jsonl" --workers "$WORKERS" $AGENT_FLAGS

    # 2. The teacher's action at every state that was visited
    stage "iteration $i: relabel" 02_relabel.py --trajectories "$dir/trajectories.jsonl" --teacher "$TEACHER" \
        --out "$dir/labels.jsonl" --workers "$WORKERS"

    # 3. Train the student on all labels so far, with the GPU to itself
    "$PYTHON" -m common.serve stop "$STUDENT" "$TEACHER" >&2
    stage "iteration $i: train" 03_train.py --data $(collected "$i") --model "$model" --out "$dir/adapter" $TRAIN_FLAGS

    # 4. What can it do now?
    stage "iteration $i: evaluate" 04_eval.py --tasks "$EVAL_TASKS" --student "$(student "$i")" --iteration "$i" \
        --out "$dir/eval" --workers "$WORKERS" $AGENT_FLAGS
done

# The iteration that was best on $EVAL_TASKS meets the locked test split, once
best=$("$PYTHON" -m common.table "$run" --iterations "$ITERATIONS" --best)
if [ -n "$TEST_TASKS" ]; then
    stage "iteration $best on $TEST_TASKS" 04_eval.py --tasks "$TEST_TASKS" --student "$(student "$best")" \
        --iteration "$best" --out "$run/test/iter_$(printf %03d "$best")" --workers "$WORKERS" $AGENT_FLAGS
fi
"$PYTHON" -m common.table "$run" --iterations "$ITERATIONS"
