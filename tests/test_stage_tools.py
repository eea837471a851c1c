"""What stands beside the progress bar."""

from common import stage_tools


def test_rates_are_of_the_whole_run_and_the_rest_is_counted():
    sums = {"submitted": 12, "teacher turns": 30, "turns": 120, "tokens": 7200, "cost": 1.234, "infra errors": 1}
    assert stage_tools.beside_bar(sums, 20.0) == (
        "submitted 12, teacher 25%, 6.0 turns/s, 360 tokens/s, $1.23, infra errors 1")


def test_a_resumed_run_starts_with_nothing():
    assert stage_tools.beside_bar({"teacher turns": 0, "turns": 0, "tokens": 0}, 0.0) == (
        "teacher 0%, 0.0 turns/s, 0.0 tokens/s")
