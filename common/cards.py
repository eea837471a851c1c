"""The cards (README.md) of what common/export.py writes: how a student was made, how it scored, what is not known.

Every fact is read from the manifests of the run; what they do not hold is said not to be recorded. The head of a card
is the YAML that model hubs read.
"""

import json
import shlex
from pathlib import Path

from common import embedded, jsonl, models, prompts, table
from common.agent import AgentFlags

PAPER = "*Revisiting DAgger in the Era of LLM-Agents* (arXiv 2605.12913)"
METHODS = {
    "turn": "DAgger: before every turn a coin with probability beta says whether the teacher or the student acts",
    "prefix": "AggreVaTe: the student acts up to a random turn, the teacher from there on",
    "teacher": "supervised fine-tuning: the teacher alone acts",
    "student": "on-policy: the student alone acts",
}
TAGS = ["swe-dagger", "dagger", "imitation-learning", "software-engineering", "agent"]
UNKNOWN = "not recorded"


def title(student) -> str:
    return f"{student.model}, trained in {student.home.resolve().name}, iteration {student.number}"


def command(student, form: str, out: Path) -> str:
    """What to type to use an export, with the limits under which the student was evaluated."""
    if form == "trl":
        return f"trl sft --model_name_or_path MODEL --dataset_name {shlex.quote(str(out))} --max_length {_context(student)}"
    evaluated = student.stages[student.number].get("eval", {})
    collected = student.stages[student.number].get("collect", {})
    tasks = (evaluated or collected).get("settings", {}).get("tasks", "TASKS")
    words = [".venv/bin/python", "04_eval.py", "--tasks", tasks if _has_count(tasks) else f"{tasks}:4", "--student",
             policy(student, form, out), "--out", "try"]  # fmt: skip
    for name, value in (evaluated or collected).get("same", {}).get("limits", {}).items():
        if value != getattr(AgentFlags, name, value):
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [f"{value:g}" if isinstance(value, float) else str(value)])
    if extra := (evaluated.get("same", {}).get("student") or {}).get("extra"):
        words += ["--student-extra", json.dumps(extra)]
    return shlex.join(words)


def policy(student, form: str, out: Path) -> str:
    if form == "merged":
        return f"hf:{out}"
    return f"hf:{student.model},adapter={out}" + (",quant=nf4" if student.summary["quant"] == "nf4" else "")


def _has_count(tasks: str) -> bool:
    return tasks.rpartition(":")[2].isdigit()


def _context(student) -> int:
    return student.settings["max_context"]


# ---------------------------------------------------------------- the model card


def model_card(student, form: str, found: dict, out: Path) -> str:
    from huggingface_hub import ModelCardData

    head = ModelCardData(base_model=_hub_name(student.model), license=_license(student.model), pipeline_tag="text-generation",
                         library_name="peft" if form == "peft" else "transformers",
                         tags=TAGS + (["lora"] if form == "peft" else []))  # fmt: skip
    what = (f"A LoRA adapter for {_base(student.model)}" if form == "peft" else
            f"{_base(student.model)} with a LoRA adapter merged into it ({found['dtype']})")  # fmt: skip
    best = table.best_iteration(student.stages) if _scored(student) else None
    parts = [
        f"---\n{head.to_yaml()}\n---\n\n# {title(student)}",
        f"{what}, trained with swe-dagger, an implementation of {PAPER}, to repair software by one bash command per turn.",
        "## How it was made",
        made(student),
        iterations(student),
        "Beta: the teacher's share as asked for; teacher turns: the share that it really had; agree: the share of the "
        "student's turns with the teacher's command; loss: mean per label token in the last epoch; resolved: with the "
        "95 % Wilson interval.",
        "## How it scored",
        scores(student, best),
        "## What is not known",
        limits(student, form, best),
        "## How to use it",
        use(student, form, out),
    ]
    return "\n\n".join(parts) + "\n"


def made(student) -> str:
    """The table of settings: of all adapters that followed each other to this one."""
    trained = [student.stages[number]["train"] for number in student.chain]
    of = [student.stages[number]["collect"] for number in _collected(student) if "collect" in student.stages.get(number, {})]
    first, settings, summary = (of or [{}])[0], student.settings, student.summary
    collect = first.get("settings", {})
    labels, steps = (sum(manifest["summary"][name] for manifest in trained) for name in ("labels", "steps"))
    followed = " and ".join(str(number) for number in student.chain)
    rows = {
        "base": _base(student.model),
        "method": METHODS.get(collect.get("mix"), collect.get("mix") or UNKNOWN) + _schedule(collect),
        "teacher": _each(manifest["same"]["teacher"] and manifest["same"]["teacher"]["model"] for manifest in of),
        "tasks": _each(manifest["settings"]["tasks"] + (f", {manifest['settings']['sample']} in each iteration"
                       if manifest["settings"].get("sample") else "") for manifest in of),
        "labels": f"{labels:,} of iteration {_list(_collected(student))}" + (f"; only of trajectories that were resolved"
                  if settings.get("keep") == "resolved" else ""),
        "loss": "cross-entropy on the tokens of each label and the token that ends the turn",
        "optimiser": f"AdamW, {steps:,} steps" + (f" over the adapters of iterations {followed}, each going on from the last"
                     if len(student.chain) > 1 else "") + f", {settings['epochs']} epochs of an iteration's data, "
                     f"{settings['batch_size']} trajectories a step, peak learning rate {settings['lr']:g}",
        "LoRA": f"rank {_adapter(student)['r']}, alpha {_adapter(student)['lora_alpha']}, on "
                f"{', '.join(sorted(_adapter(student)['target_modules']))}",
        "base while training": "NF4 (QLoRA)" if summary["quant"] == "nf4" else "not quantised",
        "longest sample": f"{_context(student):,} tokens; {summary['labels_too_long']} longer labels were left out",
        "prompt": _each(", ".join(manifest["same"]["prompts"]) for manifest in of),
        "seed": settings["seed"],
        "swe-dagger": _each(manifest["commit"] and manifest["commit"] + (", with uncommitted changes" if manifest["diff"] else "")
                            for manifest in of + trained),
        "packages": ", ".join(f"{name} {version}" for name, version in student.stages[student.number]["train"]["packages"].items()
                              if version and name in ("torch", "transformers", "peft", "bitsandbytes")),
    }  # fmt: skip
    if not student.whole:
        rows["before that"] = ("it went on from an adapter that is not in the run any more; what that was trained on is "
                               "not recorded here")  # fmt: skip
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def iterations(student) -> str:
    names = ("iteration", "beta", "trajectories", "teacher turns", "labels", "agree", "steps", "loss", "resolved", "95 %")
    lines = []
    for number, stages in student.stages.items():
        cells = dict.fromkeys(names, "-") | {"iteration": f"**{number}**" if number == student.number else str(number)}
        if collect := stages.get("collect", {}).get("summary"):
            cells |= {"trajectories": collect["trajectories"], "teacher turns": f"{collect['teacher_turn_share']:.2f}"}
            if collect.get("beta") is not None:
                cells["beta"] = f"{collect['beta']:.2f}"
        if stages.get("relabel", {}).get("summary", {}).get("agree") is not None:
            cells["agree"] = f"{stages['relabel']['summary']['agree']:.2f}"
        if train := stages.get("train", {}).get("summary"):
            cells |= {"labels": f"{train['labels']:,}", "steps": train["steps"], "loss": f"{train['loss']:.3f}"}
        if "eval" in stages:
            cells["resolved"], cells["95 %"] = table._score(stages["eval"]["summary"])
        lines.append([str(cells[name]) for name in names])
    rule = ["---"] * len(names)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(names), rule, *lines])


def scores(student, best: int | None) -> str:
    """The chosen iteration on the evaluation tasks and, where it was scored there, on the test split."""
    lines = ["A task is resolved if all its tests pass, in a clean checkout with the student's patch; the student acts alone."]
    if evaluated := student.stages[student.number].get("eval"):
        several = sum("eval" in of for number, of in student.stages.items() if number > 0) > 1
        lines.append(_result(evaluated, student.home / f"iter_{student.number:03d}" / "eval")
                     + ("" if not several else " (these tasks chose the iteration, so this is a little too good)"
                        if best == student.number else f" (iteration {best} scored more)"))  # fmt: skip
    else:
        lines.append("This iteration was not evaluated.")
    if before := student.stages.get(0, {}).get("eval"):
        lines.append("before training: " + _result(before, student.home / "iter_000" / "eval"))
    if teacher := table.manifest(student.home / "teacher/eval/manifest.json"):
        lines.append("the teacher itself: " + _result(teacher, student.home / "teacher/eval"))
    home = student.home / "test" / f"iter_{student.number:03d}"
    if tested := table.manifest(home / "manifest.json"):
        lines.append("on tasks that chose nothing: " + _result(tested, home))
        for name, group in tested["summary"].get("groups", {}).items():
            if not name.startswith("family "):
                lines.append("    %s: %s (%s)" % (name, *table._score(group)))
    else:
        lines.append("It was not scored on a test split.")
    return lines[0] + "\n\n" + "\n".join(line if line.startswith("    ") else f"* {line}" for line in lines[1:]).replace("    ", "    * ")


def _result(manifest: dict, home: Path) -> str:
    """One score with all that it hangs on: tasks, grader, sampling, limits."""
    same, summary = manifest["same"], manifest["summary"]
    graders = {result.get("grader") for result in jsonl.read(home / "results.jsonl")} if (home / "results.jsonl").is_file() else set()
    grader = ", ".join(sorted(filter(None, graders))) or manifest["settings"]["grader"]
    sampling = (same.get("student") or {}).get("sampling") or {}
    words = [f"grader `{grader}`"]
    if "temperature" in sampling:
        words.append("greedy" if not sampling["temperature"] else f"temperature {sampling['temperature']}, top-p {sampling['top_p']}")
    if limits := same.get("limits"):
        words.append(f"at most {limits['max_turns']} turns and {limits['max_context']:,} tokens of context")
    if summary.get("infra_errors"):
        words.append(f"{summary['infra_errors']} tasks could not be run and are left out of the rate")
    return "%s on `%s`, 95 %% %s; %s" % (table._score(summary)[0], manifest["settings"]["tasks"], table._score(summary)[1],
                                         ", ".join(words))  # fmt: skip


def limits(student, form: str, best: int | None) -> str:
    measured = sorted({f"`{of['eval']['settings']['tasks']}`" for of in student.stages.values() if "eval" in of}
                      | {f"`{tested['settings']['tasks']}`" for path in student.home.glob("test/iter_*/manifest.json")
                         if (tested := table.manifest(path))})  # fmt: skip
    lines = [
        (f"Nothing was measured but what stands above, on {' and '.join(measured)}" if measured else "Nothing was measured")
        + ": no other repositories, languages, prompts or forms of action, and not what it has unlearnt of the base model.",
        "The intervals are for the choice of tasks. Another seed of the training is another student, and is not in them.",
        f"It has seen conversations of up to {_context(student):,} tokens. It knows one form of reply, a thought and one "
        "command in a ```` ```bash ```` block, `submit` to end, under the system prompt below; anything else is untried.",
        "Its commands are those of a language model: run them in a sandbox.",
    ]
    if student.summary["quant"] == "nf4":
        place = "It is merged into the plain base" if form == "merged" else "`quant=nf4` gives it that base; vLLM serves the plain one"
        lines.append(f"It was trained on an NF4 base. {place}: {gap(student)}.")
    if student.model == embedded.NAME:
        lines.append("The base is a conversion of 4-bit weights (GGUF, Q4_1) of SmolLM2-135M-Instruct to plain ones, and the "
                     "adapter was trained on that; on the original weights it is untried.")  # fmt: skip
    return "\n".join(f"* {line}" for line in lines)


def gap(student) -> str:
    """What 03_train.py measured of the change from the NF4 base to the plain one."""
    loss = [student.summary.get(name) for name in ("loss_nf4", "loss_plain")]
    if None in loss:
        return "what the change of base costs was not measured"
    return (f"the mean loss per label token is {loss[0]:.4f} on NF4 and {loss[1]:.4f} on the plain base "
            f"({student.summary['gap_label_tokens']:,} label tokens)")  # fmt: skip


def use(student, form: str, out: Path) -> str:
    parts = ["In a checkout of swe-dagger:", f"    {command(student, form, out)}"]
    if student.model == embedded.NAME and form == "peft":
        parts.append("The base, `smollm2-135m`, is made on its first use out of the Python package "
                     f"`{embedded.PACKAGE}` and kept in ~/.cache/swe-dagger; this prints where:\n\n"
                     "    .venv/bin/python -c \"from common.embedded import model_path; print(model_path('smollm2-135m'))\"")  # fmt: skip
    base = "what the line above prints" if student.model == embedded.NAME else student.model
    load = (f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{out}")' if form == "peft"
            else f'model = AutoModelForCausalLM.from_pretrained("{out}")')  # fmt: skip
    parts.append("With transformers" + (" and PEFT" if form == "peft" else "") + ":\n\n```python\n"
                 + ("from peft import PeftModel\n" if form == "peft" else "")
                 + f"from transformers import AutoModelForCausalLM\n\n{load}\n```")  # fmt: skip
    if form == "merged":
        parts.append(f"As a server: `vllm serve {shlex.quote(str(out))}`.")
    texts = {version: text for version, text in prompts.PROMPTS.values()}
    collected = [student.stages[n]["collect"]["same"]["prompts"] for n in _collected(student) if "collect" in student.stages.get(n, {})]
    for version in sorted({version for versions in collected for version in versions}):
        if version in texts:
            parts.append(f"Its system prompt (`{version}`); the first user message is the issue, later ones are the exit "
                         f"code and output of its commands:\n\n````\n{texts[version]}\n````")  # fmt: skip
    if kwargs := _template_kwargs(student):
        parts.append(f"Its chat template arguments: `{json.dumps(kwargs)}`.")
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the card of the labels


def data_card(student, found: dict, out: Path) -> str:
    from huggingface_hub import DatasetCardData

    head = DatasetCardData(tags=TAGS + ["trl"], configs=[{"config_name": "default", "data_files": "train.jsonl"}])
    kwargs = _template_kwargs(student)
    parts = [
        f"---\n{head.to_yaml()}\n---\n\n# The labels that trained {title(student)}",
        f"{found['labels']:,} labels of iteration {_list(_collected(student))}, made with swe-dagger, an implementation of {PAPER}. "
        "A label is what the teacher does at a state that teacher or student came to; none comes from the student.",
        made(student),
        "`train.jsonl` has a line for each label: `prompt` (the conversation before that turn), `completion` (the label), "
        "and where it is from: `trajectory_id`, `turn`, `iteration`"
        + (f", `chat_template_kwargs` ({json.dumps(kwargs)}, with which the student acted)" if kwargs else "") + ". "
        "A line holds its whole history, so that the file grows with the square of the number of turns.",
        "```python\nfrom datasets import load_dataset\n\n"
        f'labels = load_dataset("json", data_files="{out}/train.jsonl", split="train")\n```',
        f"For TRL's SFTTrainer: it cuts samples at 1,024 tokens unless told otherwise, which takes away the labels of long "
        f"ones. `SFTConfig(max_length={_context(student)})` is what the student was trained with"
        + (f"; {student.summary['labels_too_long']} labels of the last training are longer and were left out there"
           if student.summary["labels_too_long"] else "")
        + ". The loss is on the completions alone (`completion_only_loss`, the default for this form).",
        f"    {command(student, 'trl', out)}",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- small things


def _collected(student) -> list[int]:
    """The iterations whose labels trained this adapter."""
    names = [Path(path).name.removeprefix("iter_") for path, _ in student.data()]
    return [int(name) for name in names if name.isdigit()]


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or UNKNOWN


def _each(values) -> str:
    """The value that all have, or each once."""
    return "; ".join(dict.fromkeys(str(value) if value else UNKNOWN for value in values)) or UNKNOWN


def _schedule(collect: dict) -> str:
    if collect.get("mix") == "turn":
        return f"; beta by iteration: constant:{collect['beta']:g}" if collect.get("beta") is not None else \
            f"; beta by iteration: {collect.get('schedule') or 'paper'}"  # fmt: skip
    return f"; --prefix-turns {collect['prefix_turns']}" if collect.get("prefix_turns") else ""


def _template_kwargs(student) -> dict:
    for number in _collected(student):
        of = student.stages.get(number, {}).get("collect", {}).get("same", {}).get("student") or {}
        if kwargs := (of.get("extra") or {}).get("chat_template_kwargs"):
            return kwargs
    return {}


def _scored(student) -> bool:
    return any("eval" in of for number, of in student.stages.items() if number > 0)


def _adapter(student) -> dict:
    return json.loads((student.adapter / "adapter_config.json").read_text())


def _base(model: str) -> str:
    if model == embedded.NAME:
        return "`smollm2-135m` (SmolLM2-135M-Instruct as swe-dagger converts it)"
    return f"`{model}`"


def _hub_name(model: str) -> str | None:
    """What a hub may link to; a directory of this machine means nothing there."""
    if model == embedded.NAME:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    return model if model.count("/") == 1 and not Path(model).exists() and model[0] not in "./~" else None


def _license(model: str) -> str | None:
    """The license that the base's own card names, where that card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if model == embedded.NAME:
        return "apache-2.0"
    path = Path(model) / "README.md"
    cached = None if path.is_file() or _hub_name(model) is None else try_to_load_from_cache(model, "README.md")
    if isinstance(cached, str):
        path = Path(cached)
    try:
        return ModelCard.load(path).data.license if path.is_file() else None
    except ValueError:
        return None
