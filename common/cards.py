"""The cards (README.md) of what common/export.py writes: how a student was made, how it scored, what is not known.

Every fact is read from the manifests of the run; what they do not hold is said not to be recorded. The head of a card
is the YAML that model hubs read.
"""

import json
import shlex
from pathlib import Path

from common import embedded, jsonl, prompts, table
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
    return f"{student.model}, trained in {_name(student)}"


def _name(student) -> str:
    return f"{student.home.resolve().name}, iteration {student.number}"


def command(student, form: str, out: Path) -> str:
    """What to type to use an export, with the limits under which the student was evaluated."""
    if form == "trl":
        model = _hub_name(student.model) or student.model
        return shlex.join(["trl", "sft", "--model_name_or_path", model, "--dataset_name", str(out), "--max_length",
                           str(student.settings["max_context"]), "--output_dir", "sft"])  # fmt: skip
    shown = student.of("eval") or student.of("collect") or {"settings": {"tasks": "TASKS"}, "same": {}}
    tasks = shown["settings"]["tasks"]
    words = [".venv/bin/python", "04_eval.py", "--tasks", tasks if tasks.rpartition(":")[2].isdigit() else f"{tasks}:4",
             "--student", policy(student, form, out), "--out", "try"]  # fmt: skip
    for name, value in shown["same"].get("limits", {}).items():
        if value != getattr(AgentFlags, name, value):
            words.append(f"--{name.replace('_', '-')}")
            if not isinstance(value, bool):
                words.append(f"{value:g}" if isinstance(value, float) else str(value))
    if kwargs := _template_kwargs(student):
        words += ["--student-extra", json.dumps({"chat_template_kwargs": kwargs})]
    return shlex.join(words)


def policy(student, form: str, out: Path) -> str:
    if form == "merged":
        return f"hf:{out}"
    return f"hf:{student.model},adapter={out}" + (",quant=nf4" if student.summary["quant"] == "nf4" else "")


# ---------------------------------------------------------------- the model card


def model_card(student, form: str, found: dict, out: Path) -> str:
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        base_model=_hub_name(student.model), license=_license(student.model), pipeline_tag="text-generation",
        library_name="peft" if form == "peft" else "transformers", tags=TAGS + (["lora"] if form == "peft" else []),
    )  # fmt: skip
    what = f"A LoRA adapter for {_base(student.model)}"
    if form == "merged":
        what = f"{_base(student.model)} with a LoRA adapter merged into it ({found['dtype']})"
    scored = any("eval" in of for number, of in student.stages.items() if number > 0)
    parts = [
        f"---\n{head.to_yaml()}\n---\n\n# {title(student)}",
        f"{what}, trained with swe-dagger, an implementation of {PAPER}, to repair software with one bash command in "
        "each turn.",
        "## How it was made",
        made(student),
        iterations(student),
        "beta: the teacher's share of turns as asked for; teacher turns: the share that it had; agree: the share of "
        "the student's turns with the teacher's command; loss: mean per label token in the last epoch; resolved: with "
        "the 95 % Wilson interval.",
        "## How it scored",
        "A task is resolved if the student, acting alone, leaves a patch with which all its tests pass.",
        scores(student, table.best_iteration(student.stages) if scored else None),
        "## Limits",
        limits(student, form),
        "## How to use it",
        use(student, form, out),
    ]
    return "\n\n".join(parts) + "\n"


def made(student) -> str:
    """The table of settings: of all adapters that followed each other to this one."""
    trained = [student.stages[number]["train"] for number in student.chain]
    collected = [of["collect"] for number in _collected(student) if "collect" in (of := student.stages.get(number, {}))]
    settings, config = student.settings, json.loads((student.adapter / "adapter_config.json").read_text())
    labelled = [of["relabel"] for number in _collected(student) if "relabel" in (of := student.stages.get(number, {}))]
    labels, steps, too_long = (sum(manifest["summary"][name] for manifest in trained)
                               for name in ("labels", "steps", "labels_too_long"))  # fmt: skip
    rows = {
        "base": _base(student.model) + (", in NF4 (QLoRA)" if student.summary["quant"] == "nf4" else ", not quantised"),
        "method": _each(map(_method, collected)),
        "teacher": _each(map(_teacher, labelled or collected)),
        "tasks": _each(_tasks(manifest["settings"]) for manifest in collected),
        "system prompt": _each(", ".join(manifest["same"]["prompts"]) for manifest in collected),
        "labels": f"{labels:,} of {_iterations(_collected(student))}"
        + _selection(student),
        "loss": "cross-entropy on the tokens of each label and the token that ends the turn",
        "training": f"AdamW, {steps:,} steps, {_step(settings)}, epochs: "
        f"{settings['epochs']}, peak learning rate {settings['lr']:g}",
        "adapter": f"LoRA, rank {config['r']}, alpha {config['lora_alpha']}, on "
        + ", ".join(sorted(config["target_modules"])),
        "longest sample": f"{settings['max_context']:,} tokens; longer and left out: {too_long}",
        "seed": settings["seed"],
        "commit of swe-dagger": _each(map(_commit, collected + trained)),
        "packages": ", ".join(f"{name} {version}" for name, version in trained[-1]["packages"].items() if version),
    }
    if len(student.chain) > 1:
        rows["training"] += f"; by turns on {_iterations(student.chain)}, each going on from the adapter before"
    if not student.whole:
        rows["before that"] = "an adapter that is not in the run any more; what it was trained on is not recorded"
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _method(manifest: dict) -> str:
    settings = manifest["settings"]
    words = METHODS.get(settings["mix"], settings["mix"])
    if settings["mix"] == "turn":
        constant = settings["beta"] is not None
        words += f" (beta by iteration: {'constant' if constant else settings['schedule'] or 'paper'}"
        words += f" {settings['beta']:g})" if constant else ")"
    return words + (f" (--prefix-turns {settings['prefix_turns']})" if settings["mix"] == "prefix" else "")


def _selection(student) -> str:
    """Which of the visited states were labelled and trained on, where not all were."""
    stages = [student.stages.get(number, {}) for number in _collected(student)]
    chosen = [of["relabel"]["settings"] for of in stages if "relabel" in of]
    words = []
    if any(settings.get("keep") == "resolved" for settings in [student.settings, *chosen]):
        words.append("those of resolved trajectories alone")
    if states := {settings["label_states"] for settings in chosen if settings.get("label_states", "all") != "all"}:
        words.append(f"--label-states {_each(sorted(states))}")
    if any(settings.get("max_labels") for settings in chosen):
        words.append(f"at most {_each(str(settings.get('max_labels')) for settings in chosen)} in an iteration")
    return "".join(f"; {word}" for word in words)


def _step(settings: dict) -> str:
    if settings.get("steps_per_epoch"):
        return f"{settings['steps_per_epoch']} in each epoch"
    return f"trajectories in a step: {settings['batch_size']}"


def _teacher(manifest: dict) -> str | None:
    name = (manifest["same"]["teacher"] or {}).get("model")
    return f"{name} (the scripted expert of the embedded tasks)" if name and name.startswith("oracle") else name


def _tasks(settings: dict) -> str:
    return f"`{settings['tasks']}`" + (f", {settings['sample']} in each iteration" if settings["sample"] else "")


def _commit(manifest: dict) -> str | None:
    return manifest["commit"] and manifest["commit"] + (" with uncommitted changes" if manifest["diff"] else "")


def iterations(student) -> str:
    names = ("iteration", "beta", "trajectories", "teacher turns", "labels", "agree", "steps", "loss", "resolved")
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
            cells["resolved"] = _rate(stages["eval"]["summary"])
        lines.append([str(cells[name]) for name in names])
    rule = ["---"] * len(names)
    return "\n".join("| " + " | ".join(line) + " |" for line in [list(names), rule, *lines])


def scores(student, best: int | None) -> str:
    """The chosen iteration on the evaluation tasks and, where it was scored there, on the test split."""
    lines = []
    if evaluated := student.of("eval"):
        several = sum("eval" in of for number, of in student.stages.items() if number > 0) > 1
        rates = [(student.stages[number].get("eval") or evaluated)["summary"]["rate"] for number in (best, student.number)]
        note = "" if not several else f" (iteration {best} scored {'as much' if rates[0] == rates[1] else 'more'})"
        if several and best == student.number:
            note = " (these tasks chose the iteration, which makes this a little too good)"
        lines.append(f"* {_result(evaluated, student.adapter.parent / 'eval')}{note}")
    else:
        lines.append("* This iteration was not evaluated.")
    if before := student.stages.get(0, {}).get("eval"):
        lines.append(f"* before training: {_result(before, student.home / 'iter_000/eval')}")
    if teacher := table.manifest(student.home / "teacher/eval/manifest.json"):
        lines.append(f"* the teacher itself: {_result(teacher, student.home / 'teacher/eval')}")
    if tested := table.tests(student.home).get(student.number):
        home = student.home / "test" / f"iter_{student.number:03d}"
        lines.append(f"* on tasks that chose nothing: {_result(tested, home)}")
        groups = tested["summary"].get("groups", {}).items()
        lines += [f"    * {name}: {_rate(group)}" for name, group in groups if not name.startswith("family ")]
    else:
        lines.append("* It was not scored on a test split.")
    return "\n".join(lines)


def _rate(summary: dict) -> str:
    """Resolved, with the 95 % Wilson interval."""
    if summary["rate"] is None:
        return "none could be run"
    low, high = summary["rate_low"], summary["rate_high"]
    tasks = summary["tasks"] - summary.get("infra_errors", 0)
    return f"{summary['resolved']}/{tasks} = {summary['rate']:.0%} ({low:.0%} to {high:.0%})"


def _result(manifest: dict, home: Path) -> str:
    """One score with all that it hangs on: tasks, grader, sampling, limits."""
    same, summary, results = manifest["same"], manifest["summary"], home / "results.jsonl"
    graders = {result.get("grader") for result in jsonl.read(results)} if results.is_file() else set()
    words = [f"grader `{', '.join(sorted(filter(None, graders))) or manifest['settings']['grader']}`"]
    if sampling := (same.get("student") or {}).get("sampling"):
        drawn = f"temperature {sampling['temperature']:g}, top-p {sampling.get('top_p')}"
        words.append(drawn if sampling["temperature"] else "greedy")
    if limits := same.get("limits"):
        words.append(f"at most {limits['max_turns']} turns and {limits['max_context']:,} tokens of context")
    if summary.get("infra_errors"):
        words.append(f"{summary['infra_errors']} tasks could not be run and are left out of the rate")
    return f"{_rate(summary)} on `{manifest['settings']['tasks']}`; {', '.join(words)}"


def limits(student, form: str) -> str:
    scored = (student.of("eval"), table.tests(student.home).get(student.number))
    measured = {manifest["settings"]["tasks"] for manifest in scored if manifest}
    lines = [
        f"It was measured on {' and '.join(f'`{tasks}`' for tasks in sorted(measured))} as above, and on nothing else"
        if measured else "It was not measured on anything",
        "Not known is how it does in other repositories, with other languages, prompts or forms of action, and what of "
        "its base's abilities it has lost.",
        "The intervals are for the choice of tasks; another seed of the training would be another student.",
        f"It has seen conversations of up to {student.settings['max_context']:,} tokens, and one form of reply: a "
        "thought and one command in a ```` ```bash ```` block; `submit` ends.",
        "Its commands are those of a language model: run them in a sandbox, as swe-dagger does.",
    ]
    lines[0:2] = [f"{lines[0]}. {lines[1]}"]
    if student.summary["quant"] == "nf4":
        where = "`quant=nf4` gives it that, vLLM serves the plain one"
        if form == "merged":
            where = "it is merged into the plain one"
        lines.append(f"It was trained on an NF4 base, and {where}: {gap(student)}.")
    if student.model == embedded.NAME:
        lines.append("Its base is a conversion to plain weights of a 4-bit file (GGUF, Q4_1) of SmolLM2-135M-Instruct; "
                     "with the original weights it was not tried.")  # fmt: skip
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
    load, imports = f'AutoModelForCausalLM.from_pretrained("{out}")', ["from transformers import AutoModelForCausalLM"]
    if form == "peft":
        base = f'"{student.model}"'
        if student.model == embedded.NAME:
            parts.append(f"Its base is made on the first use out of the Python package `{embedded.PACKAGE}` and kept "
                         "in ~/.cache/swe-dagger. Code that wants it runs in a checkout too:")  # fmt: skip
            base = f'model_path("{student.model}")'
            imports.insert(0, "from common.embedded import model_path")
        imports.insert(-1, "from peft import PeftModel")
        load = f'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), "{out}")'
    imports = "\n".join(imports)
    parts.append(f"```python\n{imports}\n\nmodel = {load}\n```")
    if form == "merged":
        parts.append(f"As a server: `vllm serve {shlex.quote(str(out))}`.")
    collected = [of["collect"] for number in _collected(student) if "collect" in (of := student.stages.get(number, {}))]
    used = {version for manifest in collected for version in manifest["same"]["prompts"]}
    for name, (version, text) in prompts.PROMPTS.items():
        if version in used:
            parts.append(f'Its system prompt (`{version}`; in the row of a task `"prompt": "{name}"`); the first user '
                         "message is the issue, later ones are the "
                         f"exit code and the output of its commands:\n\n````\n{text}\n````")  # fmt: skip
    if kwargs := _template_kwargs(student):
        parts.append(f"Its chat template arguments: `{json.dumps(kwargs)}`.")
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the card of the labels


def data_card(student, found: dict, out: Path) -> str:
    from huggingface_hub import DatasetCardData

    head = DatasetCardData(tags=TAGS + ["trl"], configs=[{"config_name": "default", "data_files": "train.jsonl"}])
    kwargs, context = _template_kwargs(student), student.settings["max_context"]
    too_long = student.summary["labels_too_long"]
    columns = "`trajectory_id`, `turn`, `iteration`" + (
        f"; `chat_template_kwargs`: with which the student acted, {json.dumps(kwargs)}" if kwargs else "")  # fmt: skip
    left_out = f" ({too_long} longer labels were left out of its last training and are in here)" if too_long else ""
    parts = [
        f"---\n{head.to_yaml()}\n---\n\n# The labels of {_name(student)}",
        f"{found['labels']:,} labels, made with swe-dagger, an implementation of {PAPER}. A label is what the teacher "
        "does at a state of a repair task that teacher or student came to; no label comes from the student.",
        made(student),
        "`train.jsonl` has a line for each label. `prompt`: the conversation before that turn; `completion`: the "
        f"label; where it was: {columns}. Every line holds its whole history: the file grows "
        "with the square of the turns.",
        "```python\nfrom datasets import load_dataset\n\n"
        f'labels = load_dataset("json", data_files="{out}/train.jsonl", split="train")\n```',
        f"For TRL's SFTTrainer: by default it cuts a sample at 1,024 tokens, which takes the label from a long one. "
        f"The student was trained with up to {context:,}{left_out}: `SFTConfig(max_length={context})`. The loss "
        "is on the completions alone, which is the default for this form of data.",
        f"    {command(student, 'trl', out)}",
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------- small things


def _collected(student) -> list[int]:
    """The iterations whose labels trained this adapter."""
    names = [Path(path).name.removeprefix("iter_") for path, _ in student.data()]
    return [int(name) for name in names if name.isdigit()]


def _iterations(numbers: list[int]) -> str:
    if not numbers:
        return "iterations that are not recorded"
    return f"iteration{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _each(values) -> str:
    """The value that all have, or each once."""
    return "; ".join(dict.fromkeys(str(value) if value else UNKNOWN for value in values)) or UNKNOWN


def _template_kwargs(student) -> dict:
    for number in _collected(student):
        collect = student.stages.get(number, {}).get("collect", {})
        if kwargs := ((collect.get("same", {}).get("student") or {}).get("extra") or {}).get("chat_template_kwargs"):
            return kwargs
    return {}


def _base(model: str) -> str:
    return f"`{model}`" + (" (SmolLM2-135M-Instruct as swe-dagger converts it)" if model == embedded.NAME else "")


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
