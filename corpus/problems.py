"""The two errors a person meets. Their text is one clear sentence: what was wrong, where, what would be right."""


class UsageProblem(ValueError):
    """Something the person gave is wrong (a recipe key, a file, a row). The command ends with exit code 2."""


class RunProblem(RuntimeError):
    """The run itself could not go on (a NaN loss, a full disk). The command ends with exit code 1."""
