# The presets of run_loop.sh: other defaults for its knobs. What you have set stays as it is.
# README, "Presets", says what each needs and where the numbers come from.

default() { [ -n "${!1:-}" ] || printf -v "$1" %s "$2"; }

case $PRESET in
    laptop) return ;;                     # the defaults in run_loop.sh
    paper)                                # arXiv 2605.12913 with its smaller student, on four GPUs of 80 GB
        default STUDENT vllm:Qwen/Qwen3-4B-Instruct-2507,gpus=0+1
        default CONTEXT 65536 ;;
    paper-8b)                             # with its larger one, which would think if it were not told not to
        default STUDENT vllm:Qwen/Qwen3-8B,gpus=0+1
        default STUDENT_EXTRA '{"chat_template_kwargs": {"enable_thinking": false}}'
        default CONTEXT 40960 ;;          # all that its positions are made for; the paper says 64K
    api-teacher)                          # a teacher on somebody's server, everything else on one GPU of 24 to 80 GB
        if [ -z "${TEACHER:-}" ]; then
            echo "PRESET=api-teacher needs TEACHER=openai:MODEL@URL, and the key in OPENAI_API_KEY or in the" \
                "variable that TEACHER_KEY_ENV names (PRICE=IN,CACHED,OUT counts what it costs)" >&2
            exit 2
        fi
        default STUDENT vllm:Qwen/Qwen3-4B-Instruct-2507
        default CONTEXT 32768
        default ITERATIONS 3
        default SAMPLE 128
        default WORKERS 16
        default TRAIN_GPUS 1
        default INLINE 1 ;;               # the label is asked for at once, while the server still has the conversation
    *)
        echo "PRESET is laptop, paper, paper-8b or api-teacher, not $PRESET" >&2
        exit 2 ;;
esac

default TEACHER vllm:Qwen/Qwen3-Coder-30B-A3B-Instruct,gpus=2+3
default TASKS swe-gym:train
default EVAL_TASKS swe-gym:holdout
TEST_TASKS=${TEST_TASKS-swe-bench-verified}  # may be empty
default ITERATIONS 5
default SAMPLE 512
default SCHEDULE paper
default PREFIX_TURNS 0:10                 # ours; turns of the student at most, 10 more in each iteration
default WORKERS 64
default AGENT_FLAGS "--max-turns 100 --max-tokens $CONTEXT --max-new-tokens 4096 --time-limit 3600 \
--command-timeout 120 --check-images --evict-images"
default LR 5e-5                           # the paper's is 3e-6; LoRA wants 10 to 25 times what all weights do (README)
default TRAIN_FLAGS "--epochs 3 --batch-size 16"
default TRAIN_GPUS 4
