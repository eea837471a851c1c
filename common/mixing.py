"""Who acts: the schedules of beta, the draw that decides between teacher and student, and where a prefix ends.

    python -m common.mixing linear:2         beta of the first ten iterations

Sources: DAgger (Ross, Gordon, Bagnell 2011), turn-level mixing as in arXiv 2605.12913; prefixes as in AggreVaTe (Ross,
Bagnell 2014). Every draw depends on (seed, iteration, instance, attempt, turn) alone, so that neither the number of
workers nor another task changes it.
"""

import hashlib
import sys

from common.errors import InputError

SCHEDULES = "paper, linear:K, exponential:P, constant:B"


def derive(*parts: object) -> int:
    """A 63-bit integer that depends on `parts` alone, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw(seed: int, iteration: int, instance_id: str, attempt: int, turn: int) -> float:
    """Uniform in [0, 1): the number behind b_t ~ Bernoulli(beta_i)."""
    return derive("turn", seed, iteration, instance_id, attempt, turn) / 2**63


def actor(beta: float, seed: int, iteration: int, instance_id: str, attempt: int, turn: int) -> str:
    """'teacher' with probability beta, else 'student'. The draw is made whatever beta is."""
    return "teacher" if draw(seed, iteration, instance_id, attempt, turn) < beta else "student"


def longest_prefix(prefix_turns: str, iteration: int) -> int:
    """T_max(i) = START + GROWTH (i-1) turns for iteration i = 1, 2, ..., from the text START:GROWTH.

    Raises InputError unless both are whole numbers of at least 0.
    """
    parts = prefix_turns.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise InputError(f"--prefix-turns {prefix_turns!r} is not START:GROWTH, two whole numbers as 0:3 (the student "
                         "acts in at most START turns in iteration 1, and in GROWTH more in each further one)")
    return int(parts[0]) + int(parts[1]) * (iteration - 1)


def prefix(longest: int, seed: int, iteration: int, instance_id: str, attempt: int) -> int:
    """kappa ~ Uniform{0, ..., longest}: the student acts at turns 0 .. kappa-1, the teacher from turn kappa on."""
    return derive("prefix", seed, iteration, instance_id, attempt) % (longest + 1)


def beta_at(schedule: str, iteration: int) -> float:
    """beta_i for iteration i = 1, 2, ... Raises InputError for an unknown schedule or a number out of range.

    paper: max(0.6, 1 - 0.2 (i-1));  linear:K: max(0, 1 - (i-1)/K);  exponential:P: P^(i-1);  constant:B: B.
    """
    name, _, text = schedule.partition(":")
    try:
        number = float(text) if text else None
    except ValueError:
        number = None
    if name == "paper" and not text:
        return max(0.6, 1 - 0.2 * (iteration - 1))
    if name == "linear" and number is not None and number > 0:
        return max(0.0, 1 - (iteration - 1) / number)
    if name == "exponential" and number is not None and 0 <= number <= 1:
        return number ** (iteration - 1)
    if name == "constant" and number is not None and 0 <= number <= 1:
        return number
    raise InputError(f"schedule {schedule!r} is none of {SCHEDULES} (K > 0, 0 <= P, B <= 1)")


if __name__ == "__main__":
    try:
        print(*(f"{beta_at(sys.argv[1], iteration):g}" for iteration in range(1, 11)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
