"""The table of a run, from manifests made by hand."""

import json

from common import table

COLLECT = {"beta": 0.5, "teacher_turn_share": 0.5, "teacher_token_share": 0.4, "tokens_out": 500_000, "cost": 1.25,
           "student_tokens_in": 4_000_000, "student_tokens_cached": 3_000_000, "student_tokens_out": 300_000,
           "teacher_tokens_in": 2_000_000, "teacher_tokens_cached": 1_000_000, "teacher_tokens_out": 200_000,
           "inline_labels": 10, "inline_in": 1_000_000, "inline_cached": 1_000_000, "inline_out": 50_000}  # fmt: skip
RELABEL = {"agree": 0.75, "tokens_in": 1_000_000, "tokens_cached": 500_000, "tokens_out": 50_000, "cost": 0.75}
EVAL = {"rate": 0.5, "resolved": 1, "tasks": 2, "rate_low": 0.1, "rate_high": 0.9, "tokens_in": 2_000_000,
        "tokens_cached": 500_000, "tokens_out": 400_000}  # fmt: skip


def write(home, path, summary):
    (home / path).parent.mkdir(parents=True, exist_ok=True)
    content = {"finished": 1.0, "seconds": 60.0, "summary": summary, "settings": {"tasks": "toy:dev", "student": "hf:m"}}
    (home / path).write_text(json.dumps(content))


def test_tokens_and_cost_of_an_iteration(tmp_path, capsys):
    """By hand: 4 + 2 + 1 + 1 + 2 = 10M tokens in, 3 + 1 + 1 + .5 + .5 = 6M of them cached, .5 + .05 + .05 + .4 = 1M out."""
    write(tmp_path, "iter_001/trajectories.jsonl.manifest.json", COLLECT)
    write(tmp_path, "iter_001/labels.jsonl.manifest.json", RELABEL)
    write(tmp_path, "iter_001/eval/manifest.json", EVAL)
    table.show(tmp_path, None)
    heads, _, cells = capsys.readouterr().out.splitlines()[:3]
    assert cells.split()[-9:] == ["10M", "60%", "1M", "$2.00", "1.0", "+", "1.0", "+", "1.0"]
    assert heads.index("cost") < heads.index("minutes")


def test_tasks_that_could_not_be_run_are_in_no_denominator():
    assert table._score(EVAL | {"resolved": 38, "tasks": 40, "infra_errors": 2, "rate": 1.0})[0] == "38/38 = 100% (2 not run)"


def test_without_a_price_there_is_no_column_for_it(tmp_path, capsys):
    write(tmp_path, "iter_000/eval/manifest.json", EVAL)
    write(tmp_path, "iter_001/eval/manifest.json", EVAL)
    table.show(tmp_path, None)
    assert "cost" not in capsys.readouterr().out


def test_a_run_without_an_evaluated_iteration_has_a_table(tmp_path, capsys):
    """STAGES=collect,relabel: what is there is shown, and nothing is called the best."""
    write(tmp_path, "iter_001/labels.jsonl.manifest.json", RELABEL)
    table.show(tmp_path, None)
    said = capsys.readouterr().out
    assert "no iteration is evaluated yet" in said and "best on" not in said and "use this student" not in said
