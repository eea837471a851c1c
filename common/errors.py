"""The three ways in which a script can fail, and the exit code of each."""


class InputError(Exception):
    """Bad usage or bad input: names the file, line or field and the way out. Exit code 2."""


class StageError(Exception):
    """The machine's fault, or a stage that could not be finished: disk full, too many infra errors. Exit code 1."""


class InfraError(Exception):
    """One trajectory could not be run or graded for reasons that are not the agent's (engine down, teacher unreachable).

    Caught at the per-task boundary; the task is tried again and never counted as the agent's failure.
    """
