"""The two ways a run can be refused, and the exit status of each."""


class GlobeError(Exception):
    """Data that cannot be used: a checkpoint, an output directory, a tensor (exit status 1)."""

    exit_status = 1


class UsageError(GlobeError):
    """Arguments or settings that cannot be used (exit status 2)."""

    exit_status = 2
