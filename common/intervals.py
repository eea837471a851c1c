"""Rates, and differences of rates, with 95 % intervals: of one run, of two on the same tasks, of several seeds.

An arm's outcomes are a dict instance_id -> resolved. Everything is paired: the same tasks were tried in both arms.
"""

import math

from common.errors import InputError

Outcomes = dict[str, bool]


def rate(resolved: int, tasks: int) -> dict[str, float | None]:
    """Share of tasks with its 95 % Wilson score interval: rate, rate_low, rate_high; None without tasks."""
    if tasks == 0:
        return {"rate": None, "rate_low": None, "rate_high": None}
    from scipy.stats import binomtest

    interval = binomtest(resolved, tasks).proportion_ci(confidence_level=0.95, method="wilson")
    return {"rate": resolved / tasks, "rate_low": float(interval.low), "rate_high": float(interval.high)}


def paired(a: Outcomes, b: Outcomes) -> dict:
    """Two arms on the same tasks. difference is the rate of b minus that of a; low and high its 95 % interval.

    p: McNemar's test, exact (two-sided binomial test of the tasks that only one of them resolved). The interval is
    Newcombe's score interval for paired proportions: method 10 of Newcombe, Statistics in Medicine 17 (1998) 2635-2650,
    which joins the Wilson intervals of both rates and takes their correlation from the table. Both are about other
    tasks of this kind and these very students; what another seed would have given is not in them (combine_seeds).
    Returns tasks, both, only_a, only_b, neither (counts), rate_a, rate_b, difference, low, high, p. Raises InputError
    where the tasks differ or there are none.
    """
    from scipy.stats import binomtest

    _refuse_other_tasks(a, b)
    n = len(a)
    both = sum(a[task] and b[task] for task in a)
    only_a, only_b = sum(a.values()) - both, sum(b.values()) - both
    neither = n - both - only_a - only_b
    of_a, of_b = rate(both + only_a, n), rate(both + only_b, n)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    product = both * neither - only_a * only_b
    if product > 0:  # continuity correction, towards no correlation
        product = max(product - n / 2, 0)
    phi = product / math.sqrt(margins) if margins else 0.0

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    difference = (only_b - only_a) / n
    return {
        "tasks": n, "both": both, "only_a": only_a, "only_b": only_b, "neither": neither,
        "rate_a": of_a["rate"], "rate_b": of_b["rate"], "difference": difference,
        "low": difference - reach(of_b["rate"] - of_b["rate_low"], of_a["rate_high"] - of_a["rate"]),
        "high": difference + reach(of_b["rate_high"] - of_b["rate"], of_a["rate"] - of_a["rate_low"]),
        "p": float(binomtest(only_b, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }  # fmt: skip


def combine_seeds(pairs: list[tuple[Outcomes, Outcomes]], *, draws: int = 10_000, seed: int = 0) -> dict:
    """Two arms in several seeds, one pair (a, b) for each: the mean difference of their rates (b - a), two intervals.

    low, high: hierarchical bootstrap over seeds and tasks, percentiles 2.5 and 97.5 of `draws` means. A draw takes as
    many seeds as there are and as many tasks as there are, both with replacement; the tasks are the same in all seeds
    and both arms, as they were in the experiment (for two crossed samples: Owen, The pigeonhole bootstrap, Annals of
    Applied Statistics 1 (2007) 386-411). It errs on the wide side where chance within a run matters most, and with few
    seeds that differ much on the narrow side. In simulations (300 experiments each; 3 and 5 seeds, a standard deviation
    of 2 and 6 points between them, 100 and 300 tasks) it covered the truth in 93 to 99 %. With one seed it tells of
    tasks alone.
    t_low, t_high: Student's t interval of the mean over the seeds' differences, for which a seed is one observation;
    None with one seed. With three seeds it is wide (t = 4.3), and rightly. It is about other seeds on these tasks: where
    tasks differ much in what they gain, and seeds little, it is too narrow for a claim about all tasks of the kind.
    Claim what both say.

    Returns seeds, tasks, differences (one a seed), difference, low, high, t_low, t_high. Raises InputError where the
    tasks differ, between arms or between seeds.
    """
    import numpy as np

    if not pairs:
        raise InputError("no pair of runs with a common seed")
    for outcomes in (outcomes for pair in pairs for outcomes in pair):
        _refuse_other_tasks(pairs[0][0], outcomes)
    tasks, count = sorted(pairs[0][0]), len(pairs)
    # [seeds, tasks], each 1 (only b resolved it), -1 (only a) or 0
    change = np.array([[int(b[task]) - int(a[task]) for task in tasks] for a, b in pairs])
    random = np.random.default_rng(seed)
    # How often each seed and each task is drawn. [draws, seeds] and, few draws at a time, [draws, tasks]
    of_seeds = random.multinomial(count, np.full(count, 1 / count), size=draws)
    means = np.empty(draws)
    for some in np.array_split(np.arange(draws), 1 + draws * len(tasks) // 10_000_000):
        of_tasks = random.multinomial(len(tasks), np.full(len(tasks), 1 / len(tasks)), size=len(some))
        means[some] = (of_seeds[some] @ change * of_tasks).sum(1) / (count * len(tasks))
    low, high = np.percentile(means, [2.5, 97.5])
    differences = change.mean(1)
    mean, half = differences.mean(), None
    if count > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    return {
        "seeds": count, "tasks": len(tasks), "differences": differences.tolist(), "difference": float(mean),
        "low": float(low), "high": float(high),
        "t_low": None if half is None else float(mean - half), "t_high": None if half is None else float(mean + half),
    }  # fmt: skip


def _refuse_other_tasks(a: Outcomes, b: Outcomes) -> None:
    if not a or not b:
        raise InputError("no task in common: there are no results to compare")
    if differ := sorted(a.keys() ^ b.keys()):
        few = ", ".join(differ[:3]) + (", ..." if len(differ) > 3 else "")
        raise InputError(
            f"not the same tasks: {len(differ)} of {len(a.keys() | b.keys())} have a result on one side alone ({few}); "
            "evaluate both on the same --tasks (a task that the machine failed has no result: run its evaluation again)"
        )
