"""Stage 1 of DAgger: roll out the agent on repair tasks while teacher and student take turns.

Before every turn t a coin b_t ~ Bernoulli(beta_i) is drawn: the teacher acts if it shows 1, the student otherwise
(arXiv 2605.12913, turn-level mixing). Every state visited this way gets a teacher label in 02_relabel.py. With
--mix prefix there is one draw per trajectory instead: the student acts in the first kappa turns, kappa ~ Uniform{0..T_max(i)},
and the teacher from there on (AggreVaTe).

reads   --tasks: repair tasks (toy:SPLIT, a data set, or a .jsonl/.json/.parquet file of SWE-bench rows)
writes  --out FILE: one trajectory a line; FILE.manifest.json, FILE.log, FILE.infra.jsonl beside it

    python 01_collect.py --tasks toy:train:1 --teacher oracle --student hf:smollm2-135m --beta 0.5 --out t.jsonl --show
    python 01_collect.py --tasks toy:train --sample 32 --teacher oracle --mix teacher --out demos.jsonl
    python 01_collect.py --tasks mine.jsonl --teacher openai:MODEL@http://localhost:8000/v1 --student hf:MODEL \\
        --schedule paper --iteration 2 --out runs/mine/iter_002/trajectories.jsonl

policies: hf:MODEL[,adapter=DIR][,quant=nf4|none]   openai:MODEL@URL   replay:FILE
          oracle (toy tasks; oracle,noise=0.3 errs at that share of its turns)
          vllm:MODEL[,adapter=DIR][,gpus=0+1][,util=0.4][,args=...] starts `vllm serve`: python -m common.serve
Stop it at any moment: the same command goes on. Another setting for the same file is refused and named.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from common import mixing, run, schema
from common.agent import AgentFlags
from common.policies import PolicyFlags, StudentFlags, TeacherFlags


# in the summary -> in a record's usage
USAGE = {"turns": "turns", "tokens_in": "in", "tokens_cached": "cached", "tokens_out": "out", "seconds": "seconds"}


@dataclass(kw_only=True)
class Args(AgentFlags, TeacherFlags, StudentFlags, PolicyFlags):
    tasks: str
    """toy:train|dev|test|study (or train2|dev2|study2), swe-bench-verified, swe-bench-lite, swe-gym:train|holdout, swe-gym-lite,
    dataset:NAME:SPLIT, or a .jsonl, .json or .parquet file; each may end in :N"""
    out: str
    """the trajectories file to write"""
    teacher: str | None = None
    """policy of the teacher; may be left out with --mix student"""
    student: str | None = None
    """policy of the student; may be left out with --mix teacher"""
    mix: Literal["turn", "prefix", "teacher", "student"] = "turn"
    """who acts: a coin before every turn; the student first and then the teacher; the teacher alone (beta 1); or the
    student alone (beta 0)"""
    schedule: str | None = None
    """beta by iteration, as linear:2; `beta_at` in common/mixing.py has all of them (default: paper)"""
    beta: float | None = None
    """beta itself, the same as --schedule constant:B"""
    prefix_turns: str | None = None
    """START:GROWTH, for --mix prefix: the student acts in the first kappa ~ Uniform{0..T_max} turns, where T_max is START
    in iteration 1 and GROWTH more in each further one"""
    iteration: int = 1
    """DAgger iteration i = 1, 2, ..., for the schedule, the sample and the seeds"""
    sample: int | None = None
    """collect on this many tasks, other ones in each iteration (default: all)"""
    attempts: int = 1
    """trajectories per task"""
    limit: int | None = None
    """take the first N tasks"""
    exclude_tasks: list[str] | None = None
    """task specs that are never collected on (evaluation tasks)"""
    temperature: float = 0.7
    """sampling temperature of both policies; 0 is greedy"""
    top_p: float = 0.9
    """nucleus sampling of both policies"""
    inline: bool = False
    """ask for the labels of the student's turns while its commands run; 02_relabel.py finds them in the --cache"""
    cache: str | None = None
    """directory of the answers of --inline"""
    workers: int = 8
    """trajectories at once"""
    seed: int = 0
    """seed of tasks, coins and sampling"""
    infra_retries: int = 2
    """further rounds for trajectories that the machine failed"""
    max_infra: float = 0.05
    """share of trajectories that may stay undone for the machine's sake"""
    overwrite: bool = False
    """start again, whatever is there"""
    show: bool = False
    """print transcripts while they happen, one trajectory at a time"""


def beta_of(args: Args) -> float | None:
    """The probability that the teacher acts, from --mix, --beta or --schedule; None with --mix prefix."""
    if args.mix != "turn":
        return {"prefix": None, "teacher": 1.0, "student": 0.0}[args.mix]
    if args.beta is not None:
        return mixing.beta_at(f"constant:{args.beta}", args.iteration)
    return mixing.beta_at(args.schedule or "paper", args.iteration)


def work(args: Args) -> None:
    from common import actions, agent, cache, cost, jsonl, labels, policies, prompts, sandbox, stage_tools, tasks
    from common.chat import harmless
    from common.errors import InputError

    stage_tools.check_numbers(args)
    if args.iteration < 1:
        raise InputError(f"--iteration must be at least 1, not {args.iteration}")
    if args.beta is not None and args.schedule is not None:
        raise InputError("give --beta or --schedule, not both")
    if (args.mix == "prefix") != (args.prefix_turns is not None):
        raise InputError("--mix prefix needs --prefix-turns START:GROWTH, and nothing else takes it")
    if args.mix == "prefix" and (args.beta is not None or args.schedule is not None):
        raise InputError("--mix prefix has no beta: leave --beta and --schedule away")
    beta, longest = beta_of(args), None
    if args.mix in ("teacher", "student") and (args.beta is not None or args.schedule is not None):
        asked = mixing.beta_at(f"constant:{args.beta}" if args.schedule is None else args.schedule, args.iteration)
        if asked != beta:
            raise InputError(f"--mix {args.mix} is beta {beta:g}, and --beta or --schedule say {asked:g} for iteration "
                             f"{args.iteration}: leave one of them away")
    if args.mix == "prefix":
        longest = mixing.longest_prefix(args.prefix_turns, args.iteration)
        turns = f"with a prefix of up to {longest} turns"
        acts = {"teacher": True, "student": longest > 0}
    else:
        turns, acts = f"with beta = {beta:g}", {"teacher": beta > 0, "student": beta < 1}
    for who in acts:
        if acts[who] and getattr(args, who) is None:
            raise InputError(f"--{who} is missing, and {turns} it acts")

    if args.inline and (args.cache is None or args.teacher is None):
        raise InputError("--inline needs a --teacher to ask, and a --cache for its answers that 02_relabel.py is given too")
    meter = cost.Meter(args.out, args.price, args.max_cost)

    rows = tasks.load(args.tasks, args.limit)
    rows, excluded = tasks.exclude(rows, args.exclude_tasks or [])
    rows = tasks.sample(rows, args.sample, args.iteration, args.seed)
    by_id = {row["instance_id"]: row for row in rows}
    sandbox.prepare(rows, args.sandbox, check_images=args.check_images, evict_images=args.evict_images)
    policy = {
        who: policies.open_policy(getattr(args, who), role=who, batch=args.workers, temperature=args.temperature,
                                  top_p=args.top_p, max_new_tokens=args.max_new_tokens, max_context=args.max_context,
                                  **args.options(who))
        for who in schema.ACTORS if getattr(args, who) is not None
    }  # fmt: skip

    same = {
        "tasks": tasks.hash_rows(rows),
        "prompts": sorted({prompts.version(row) for row in rows}),
        "sandbox": args.sandbox,
        "mix": args.mix,
        "beta": beta,
        **({"longest_prefix": longest} if longest is not None else {}),
        "iteration": args.iteration,
        "attempts": args.attempts,
        "seed": args.seed,
        "limits": args.limits(),
        **{who: policy[who].describe() if who in policy else None for who in schema.ACTORS},
    }
    output = jsonl.Output(args.out, "trajectory", key=lambda r: (r["instance_id"], r["attempt"]))
    stage = run.Stage(args.out, args, same, overwrite=args.overwrite, outputs=(output,))
    if stage.done and output.finished:
        return stage.say_done()
    output.open(stage.resumed)
    meter.open(args.overwrite)
    if "teacher" in policy:
        policy["teacher"] = meter.watch(policy["teacher"])

    show = agent.Show() if args.show else None
    count = stage_tools.token_counter(stage, *(policy[who] for who in schema.ACTORS if who in policy))
    if args.inline:
        labeller = labels.Labeller(policy["teacher"], cache.Cache(args.cache), args.seed, count)
        beside = ThreadPoolExecutor(args.workers)

    def collect(job: tuple[str, int]) -> list[dict]:
        """One trajectory."""
        instance_id, attempt = job
        row = by_id[instance_id]
        place = (args.seed, args.iteration, instance_id, attempt)
        episode = "/".join(map(str, place))
        ahead = labels.Ahead(labeller, beside, row, episode, attempt) if args.inline else None
        kappa = None if longest is None else mixing.prefix(longest, *place)

        def ask(turn: int, chat: list[dict]) -> tuple:
            """b_t ~ Bernoulli(beta_i), or whether the prefix is over: who acts at this state, and what it does."""
            if kappa is None:
                who = mixing.actor(beta, *place, turn)
            else:
                who = "student" if turn < kappa else "teacher"
            answer = policy[who].act(
                row, chat, seed=mixing.derive("sample", *place, turn, who, "act"), episode=episode, turn=turn,
                attempt=attempt)  # fmt: skip
            if ahead and (who == "student" or actions.wrong_with(harmless(answer.text), answer.finish_reason)):
                ahead.ask(turn, chat)
            return who, answer

        head = {
            "iteration": args.iteration,
            "attempt": attempt,
            "seed": args.seed,
            "mix": args.mix,
            "beta": beta,
            **({"kappa": kappa} if kappa is not None else {}),
            "student": same["student"],
            "teacher": same["teacher"],
        }
        if show:
            first = f"the student acts in turns 0 to {kappa - 1}" if kappa else "the teacher acts"
            how = f"beta {beta:g}" if kappa is None else first
            show.title(f"{instance_id}   iteration {args.iteration}   {how}")
        try:
            record = agent.trajectory(row, head, ask, args, count, show or (lambda message: None))
        finally:
            if ahead:
                ahead.wait()
            for who in policy:
                policy[who].forget(episode)
        if ahead:
            record["inline"] = ahead.asked
        if show:
            stage_tools.show_result(show, row, record)
        return [record]

    jobs = [(row["instance_id"], attempt) for row in rows for attempt in range(args.attempts)]
    todo = [job for job in jobs if job not in output]
    workers = 1 if args.show else args.workers
    left = stage_tools.run_jobs(args, stage, output, jobs, todo, collect, workers, "collect", _postfix, meter)

    summary = measure(output.records(jobs)) | {"beta": beta, "excluded": excluded, "infra_errors": left}
    if longest is not None:
        summary["longest_prefix"] = longest
    output.finish(jobs)
    stage.finish(summary | meter.summary())


def _postfix(record: dict) -> dict:
    turns = [m for m in record["messages"] if m["role"] == "assistant"]
    return {
        "submitted": record["exit_status"] == "submitted",
        "teacher turns": sum(m["actor"] == "teacher" for m in turns),
        "turns": len(turns),
        "tokens": sum(m["tokens"]["out"] for m in turns),
    }


def measure(records) -> dict:
    """What really happened: the realised share of teacher turns and tokens differs from beta."""
    from common import agent

    trajectories = turns = 0
    ends: dict[str, int] = {}
    sums: dict[str, float] = {f"{who}_{what}": 0 for who in schema.ACTORS for what in USAGE}
    inline: dict[str, float] = {}
    for record in records:
        trajectories += 1
        ends[record["exit_status"]] = ends.get(record["exit_status"], 0) + 1
        for who, used in agent.usage(record["messages"]).items():
            turns += used["turns"]
            for what, kind in USAGE.items():
                sums[f"{who}_{what}"] += used[kind]
        for kind, number in record.get("inline", {}).items():
            inline[f"inline_{kind}"] = inline.get(f"inline_{kind}", 0) + number
    tokens = sums["student_tokens_out"] + sums["teacher_tokens_out"]
    return {
        "trajectories": trajectories,
        "turns": turns,
        "teacher_turn_share": sums["teacher_turns"] / max(turns, 1),
        "teacher_token_share": sums["teacher_tokens_out"] / max(tokens, 1),
        "tokens_out": tokens,
        **sums,
        **inline,
        **{f"exit_{name}": number for name, number in sorted(ends.items())},
    }


if __name__ == "__main__":
    run.main(Args, work)
