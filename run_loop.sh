#!/usr/bin/env bash
# DAgger for software-engineering agents, from the first demonstration to the trained student.
#
#   ./run_loop.sh                     the whole loop on the embedded tasks and student: a laptop, no GPU, no Docker
#   ITERATIONS=5 ./run_loop.sh        goes on from where a finished run stopped
#   PRESET=paper ./run_loop.sh        SWE-Gym at the paper's scale (README, "Presets": what it needs)
#   DRY_RUN=1 ./run_loop.sh           prints every command instead of running it
#   PRESET=api-teacher TEACHER=openai:MODEL@URL RUN=mine TASKS=mine.jsonl EVAL_TASKS=dev.jsonl TEST_TASKS= ./run_loop.sh
#   PRESET=paper STUDENT=vllm:MODEL,util=0.3 TEACHER=vllm:LARGE_MODEL,util=0.6 ...   on a GPU, or on several: gpus=0 and gpus=1+2
#
# Every stage is a script that reads and writes files below runs/$RUN. Stop it at any moment and call it again.
set -euo pipefail
cd "$(dirname "$0")"
trap 'exit 130' INT                       # Ctrl-C ends the loop, whichever command it hits
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || { echo "bash 4.4 or newer is needed" >&2; exit 2; }

# The knobs
PRESET=${PRESET:-laptop}                  # laptop, or what changes the defaults below: paper, paper-8b, api-teacher
. common/presets.sh
RUN=${RUN:-$PRESET}                       # the run lives in runs/$RUN, or in $RUN if that is absolute
ITERATIONS=${ITERATIONS:-3}               # DAgger iterations; the first is SFT on the teacher's own trajectories
TASKS=${TASKS:-toy:train}                 # collected on
EVAL_TASKS=${EVAL_TASKS:-toy:dev}         # chooses the iteration
TEST_TASKS=${TEST_TASKS-toy:test}         # looked at once, at the end; may be empty
STUDENT=${STUDENT:-hf:smollm2-135m}       # the base model, as a policy
STUDENT_EXTRA=${STUDENT_EXTRA:-}          # JSON of more fields for the student's requests
TEACHER=${TEACHER:-oracle}                # who labels
TEACHER_EXTRA=${TEACHER_EXTRA:-}          # the same for the teacher's
TEACHER_KEY_ENV=${TEACHER_KEY_ENV:-}      # environment variable with the teacher's key, if not OPENAI_API_KEY
PRICE=${PRICE:-}                          # of the teacher, IN,CACHED,OUT in dollars per million tokens
MAX_COST=${MAX_COST:-}                    # dollars for the teacher after which a stage stops
INLINE=${INLINE:-0}                       # 1: the label of a student's turn is asked for during the rollout
MIX=${MIX:-turn}                          # turn (DAgger), prefix (AggreVaTe), teacher (SFT), student (on-policy)
SCHEDULE=${SCHEDULE:-linear:2}            # beta of each iteration, with MIX=turn
PREFIX_TURNS=${PREFIX_TURNS:-0:3}         # START:GROWTH, with MIX=prefix: the student's first turns, at most
KEEP=${KEEP:-all}                         # resolved: grade what was collected, train on what resolved its task
LABEL_STATES=${LABEL_STATES:-all}         # states that get a label: all, student, uncertain:P
MAX_LABELS=${MAX_LABELS:-}                # at most so many labels in each iteration: N, or N1,N2,... one by one
AGGREGATE=${AGGREGATE:-current}           # current (go on from the last adapter, as the paper), union (all labels),
                                          # window:K (those of the last K iterations)
SAMPLE=${SAMPLE:-96}                      # tasks per iteration
SEED=${SEED:-0}
WORKERS=${WORKERS:-32}                    # trajectories at once
CONTEXT=${CONTEXT:-2048}                  # tokens of the longest conversation
AGENT_FLAGS=${AGENT_FLAGS:---max-turns 9} # other flags for 01 and 04; yours replace all of these
KEEP_REASONING=${KEEP_REASONING:-0}       # 1: what a server gives apart as reasoning goes into turns and labels
LR=${LR:-2e-3}                            # a large student wants less, and larger steps
TRAIN_FLAGS=${TRAIN_FLAGS:---epochs 2 --batch-size 1}  # the same for 03; many small steps suit a tiny student
TRAIN_GPUS=${TRAIN_GPUS:-1}               # GPUs that train, each with the whole model
STAGES=${STAGES:-baseline,collect,relabel,train,eval,report,test}  # what is run; the rest is taken as it lies there
DRY_RUN=${DRY_RUN:-0}                     # 1: print the commands, touch nothing

bad() { echo "$1" >&2; exit 2; }
[[ $AGGREGATE =~ ^(current|union|window:[1-9][0-9]*)$ ]] || bad "AGGREGATE is current, union or window:K, not $AGGREGATE"
[[ $KEEP =~ ^(all|resolved)$ ]] || bad "KEEP is all or resolved, not $KEEP"
[[ $LABEL_STATES =~ ^(all|student|uncertain:(1|0?\.[0-9]*[1-9][0-9]*))$ ]] || bad "LABEL_STATES is all, student or uncertain:P, not $LABEL_STATES"
[[ $MAX_LABELS =~ ^([1-9][0-9]*(,[1-9][0-9]*)*)?$ ]] || bad "MAX_LABELS is N, or N1,N2,... for one iteration after the other, not $MAX_LABELS"
[[ $MIX =~ ^(turn|prefix|teacher|student)$ ]] || bad "MIX is turn, prefix, teacher or student, not $MIX"
for name in ITERATIONS SAMPLE WORKERS CONTEXT TRAIN_GPUS; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || bad "$name is a number, 1 or more, not ${!name}"
done
[[ $SEED =~ ^(0|[1-9][0-9]{0,17})$ ]] || bad "SEED is a number, 0 or more, of at most 18 digits, not $SEED"
dollars='[0-9]*\.?[0-9]+'
[[ $PRICE =~ ^($dollars,$dollars,$dollars)?$ ]] || bad "PRICE is IN,CACHED,OUT, dollars per million tokens, not $PRICE"
[[ $MAX_COST =~ ^($dollars)?$ ]] || bad "MAX_COST is a number of dollars, not $MAX_COST"
[ -z "$MAX_COST" ] || [ -n "$PRICE" ] || bad "MAX_COST=$MAX_COST needs the PRICE of the teacher"
[[ $LR =~ ^[0-9]*\.?[0-9]+(e-?[0-9]+)?$ ]] || bad "LR is a number, not $LR"
[[ $MIX != prefix || $PREFIX_TURNS =~ ^[0-9]+:[0-9]+$ ]] || bad "PREFIX_TURNS is START:GROWTH, not $PREFIX_TURNS"
[[ $RUN != *,* ]] || bad "RUN is $RUN: a comma in it would end the name of an adapter"
for name in INLINE KEEP_REASONING DRY_RUN; do [[ ${!name} =~ ^[01]$ ]] || bad "$name is 0 or 1, not ${!name}"; done
[ "$INLINE" = 0 ] || [ "$KEEP$LABEL_STATES$MAX_LABELS" = allall ] ||
    bad "INLINE=1 (in PRESET=api-teacher the default) asks for the label of every turn of the student: it does not go with KEEP, LABEL_STATES or MAX_LABELS; INLINE=0 does"
[[ $STUDENT =~ ^(hf|vllm):. ]] || bad "STUDENT is trained here, so it is hf:MODEL or vllm:MODEL, not $STUDENT"
[[ $TEACHER =~ ^(oracle$|oracle,|(openai|vllm|hf|replay):.) ]] || bad "TEACHER is oracle or a model behind openai:, vllm: or hf:, not $TEACHER"
[[ $STUDENT != *,adapter=* ]] || bad "STUDENT is the base that every iteration's adapter is for, without an adapter= of its own"
[[ $STAGES =~ [a-z] ]] || bad "STAGES names no stage"
for name in ${STAGES//,/ }; do
    [[ $name =~ ^(baseline|collect|relabel|train|eval|report|test)$ ]] ||
        bad "STAGES is some of baseline,collect,relabel,train,eval,report,test, and $name is none of them"
done
if [ "$DRY_RUN" = 1 ]; then PYTHON=.venv/bin/python; else . common/setup.sh; fi
if [ "$DRY_RUN $MIX" = "0 turn" ]; then "$PYTHON" -m common.mixing "$SCHEDULE" >/dev/null; fi  # before any work, too

case $RUN in /*) run=$RUN ;; *) run=runs/$RUN ;; esac
base=${STUDENT%%,*} model=${base#*:}
export SWE_DAGGER_KEEPER=$$               # a vllm: server that one stage starts serves the next ones, until we end
reasoning=(); [ "$KEEP_REASONING" = 0 ] || reasoning=(--keep-reasoning)
agent=(--workers "$WORKERS" --max-context "$CONTEXT" $AGENT_FLAGS "${reasoning[@]}")
of_student=(${STUDENT_EXTRA:+--student-extra "$STUDENT_EXTRA"})
key=(${TEACHER_KEY_ENV:+--teacher-key-env "$TEACHER_KEY_ENV"})
cost=(${PRICE:+--price "$PRICE"} ${MAX_COST:+--max-cost "$MAX_COST"})
of_teacher=("${key[@]}" ${TEACHER_EXTRA:+--teacher-extra "$TEACHER_EXTRA"} "${cost[@]}")
inline=(); [ "$INLINE" = 0 ] || inline=(--inline --cache "$run/cache")
mix=(--mix "$MIX"); case $MIX in turn) mix+=(--schedule "$SCHEDULE") ;; prefix) mix+=(--prefix-turns "$PREFIX_TURNS") ;; esac
select=()
[ "$KEEP" = all ] || select+=(--keep "$KEEP")
[ "$LABEL_STATES" = all ] || select+=(--label-states "$LABEL_STATES")
IFS=, read -ra max_labels <<<"$MAX_LABELS"
quant=(); [[ ! $STUDENT =~ ,quant=([a-z0-9]+) ]] || quant=(--quant "${BASH_REMATCH[1]}")
torchrun=(); [ "$TRAIN_GPUS" = 1 ] || torchrun=(-m torch.distributed.run --standalone --nproc-per-node "$TRAIN_GPUS")

number() { if [ "$1" = N ]; then echo N; else printf %03d "$1"; fi; }
iter() { echo "$run/iter_$(number "$1")"; }
student() {                               # as a policy after iteration $1; options stay behind the adapter
    if [ "$1" = 0 ]; then echo "$STUDENT"; else
        echo "$base,adapter=$(iter "$1")/adapter${STUDENT#"$base"}"; fi
}
collected() {                             # into data: what iteration $1 trains on, and what it starts from
    local first=1 j
    case $AGGREGATE in current) first=$1 ;; window:*) first=$(($1 - ${AGGREGATE#window:} + 1)) ;; esac
    data=()
    for ((j = first > 1 ? first : 1; j <= $1; j++)); do data+=("$(iter "$j")"); done
    [ "$AGGREGATE" != current ] || [ "$1" = 1 ] || data+=(--init-adapter "$(iter $(($1 - 1)))/adapter")
}
at_most() {                               # labels of iteration $1: its own number, or the last one given
    [ -z "$MAX_LABELS" ] || echo "--max-labels ${max_labels[$1 - 1]:-${max_labels[-1]}}"
}
quoted() {                                # the words as a line for a shell
    local word line=
    for word; do [[ $word =~ ^[-[:alnum:]_./:,=@+]+$ ]] || word=${word@Q}; line+=" $word"; done
    echo "${line# }"
}
say() { if [ "$DRY_RUN" = 1 ]; then printf '\n# %s\n' "$1"; else printf '\n== %s\n' "$1" >&2; fi; }
call() { if [ "$DRY_RUN" = 1 ]; then quoted "$PYTHON" "$@"; else "$PYTHON" "$@" >/dev/null; fi; }
wanted() { [[ ,$STAGES, == *[,\ ]$1[,\ ]* ]]; }
stage() { ! wanted "$1" || { say "$2"; call "${@:3}" --seed "$SEED"; }; }
report() { ! wanted report || { say "$1"; call -m common.report "$run" || echo "the report could not be written; the loop goes on" >&2; }; }

# Where we start: the untrained student, and the teacher who is to be imitated
stage baseline "the untrained student on $EVAL_TASKS" 04_eval.py --tasks "$EVAL_TASKS" --student "$STUDENT" \
    --out "$(iter 0)/eval" "${of_student[@]}" "${agent[@]}"
stage baseline "the teacher on $EVAL_TASKS" 04_eval.py --tasks "$EVAL_TASKS" --student "$TEACHER" \
    --out "$run/teacher/eval" "${key[@]}" ${TEACHER_EXTRA:+--student-extra "$TEACHER_EXTRA"} "${cost[@]}" "${agent[@]}"

for ((i = 1; i <= ITERATIONS; i++)); do
    dir=$(iter "$i")

    # 1. Teacher and student take turns on fresh tasks: b_t ~ Bernoulli(beta_i)
    stage collect "iteration $i: collect" 01_collect.py --tasks "$TASKS" --exclude-tasks "$EVAL_TASKS" ${TEST_TASKS:+"$TEST_TASKS"} \
        --sample "$SAMPLE" --iteration "$i" "${mix[@]}" \
        --teacher "$TEACHER" --student "$(student $((i - 1)))" --out "$dir/trajectories.jsonl" \
        "${of_teacher[@]}" "${of_student[@]}" "${inline[@]}" "${agent[@]}"

    # With KEEP=resolved: which of these trajectories resolved their task?
    [ "$KEEP" = all ] || stage relabel "iteration $i: grade" 04_eval.py --tasks "$TASKS" \
        --trajectories "$dir/trajectories.jsonl" --iteration "$i" --out "$dir/grades" --workers "$WORKERS" \
        $([[ $AGENT_FLAGS != *--evict-images* ]] || echo --evict-images)

    # 2. The teacher's action at every state that was visited
    stage relabel "iteration $i: relabel" 02_relabel.py --trajectories "$dir/trajectories.jsonl" --teacher "$TEACHER" \
        --out "$dir/labels.jsonl" --workers "$WORKERS" --cache "$run/cache" "${select[@]}" $(at_most "$i") "${of_teacher[@]}" "${reasoning[@]}"

    # 3. Train the student on the labels that AGGREGATE takes, with the GPUs to itself
    case "$(wanted train && echo "$STUDENT $TEACHER")" in *vllm:*) call -m common.serve stop "$STUDENT" "$TEACHER" ;; esac
    collected "$i"
    stage train "iteration $i: train" "${torchrun[@]}" 03_train.py --data "${data[@]}" --model "$model" \
        --out "$dir/adapter" --max-context "$CONTEXT" --tokens-per-batch "$CONTEXT" --lr "$LR" "${quant[@]}" $TRAIN_FLAGS

    # 4. What can it do now?
    stage eval "iteration $i: evaluate" 04_eval.py --tasks "$EVAL_TASKS" --student "$(student "$i")" --iteration "$i" \
        --out "$dir/eval" "${of_student[@]}" "${agent[@]}"

    # All that there is so far, to look at in a browser: numbers, and every trajectory
    report "iteration $i: report"
done

# The iteration that was best on $EVAL_TASKS meets the locked test split, once
table=(-m common.table "$run" --iterations "$ITERATIONS")
if [ -n "$TEST_TASKS" ] && wanted test; then
    best=N
    if [ "$DRY_RUN" = 1 ]; then
        say "N is the iteration that this prints, the best on $EVAL_TASKS"
        call "${table[@]}" --best
    else
        best=$("$PYTHON" "${table[@]}" --best)
    fi
    stage test "iteration $best on $TEST_TASKS" 04_eval.py --tasks "$TEST_TASKS" --student "$(student "$best")" \
        --iteration "$best" --out "$run/test/iter_$(number "$best")" "${of_student[@]}" "${agent[@]}"
    report "the report, with $TEST_TASKS"
fi
if [ "$DRY_RUN" = 1 ]; then say "the table"; call "${table[@]}"; else "$PYTHON" "${table[@]}"; fi
