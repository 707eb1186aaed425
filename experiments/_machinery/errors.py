"""Errors that a user can act on: the runner prints them as one sentence, without a traceback."""


class ExperimentError(Exception):
    """Base of all errors below."""


class DataError(ExperimentError, ValueError):
    """A data set is unknown, not prepared, or does not fit the request."""


class WorkdirError(ExperimentError):
    """The folder of a run cannot be used: not writable, full, or it belongs to another configuration."""


class CheckpointError(ExperimentError):
    """A checkpoint cannot be read back."""


class NonFiniteLossError(ExperimentError):
    """Training produced a loss that is NaN or infinite."""
