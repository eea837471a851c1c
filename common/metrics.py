"""Rates and their intervals."""


def rate(resolved: int, tasks: int) -> dict[str, float | None]:
    """Share of tasks with its 95 % Wilson score interval: rate, rate_low, rate_high; None without tasks."""
    if tasks == 0:
        return {"rate": None, "rate_low": None, "rate_high": None}
    from scipy.stats import binomtest

    interval = binomtest(resolved, tasks).proportion_ci(confidence_level=0.95, method="wilson")
    return {"rate": resolved / tasks, "rate_low": float(interval.low), "rate_high": float(interval.high)}
