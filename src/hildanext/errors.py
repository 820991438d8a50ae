"""The exceptions that reach a user. Each message is one line: what is wrong, where, and what to do."""


class HildaError(Exception):
    """A run could not be done (exit code 1)."""


class UsageError(HildaError):
    """The request itself is wrong: configuration, arguments, a missing input (exit code 2)."""


class ContextError(UsageError):
    """A prompt and its answer do not fit the model's context together."""


class ConfigError(UsageError):
    """A configuration key is unknown, of the wrong type or impossible. The message names the key."""


class DataError(HildaError):
    """Input text or tokens are unusable. The message names the file (and line where there is one)."""


class UnreachableError(HildaError):
    """A URL cannot be read. The message names it, the reason and, in the middle of a file, the byte."""


class ModelError(HildaError):
    """A model or checkpoint cannot be used. The message names it and the reason."""


class CheckpointError(HildaError):
    """A checkpoint is damaged, incomplete or does not belong to this run."""


class WriteError(HildaError):
    """A file or folder cannot be written. The message names it and the reason."""


class NonFiniteLossError(HildaError):
    """The loss became NaN or infinite. The message names the step and the rows of the batch that did it."""
