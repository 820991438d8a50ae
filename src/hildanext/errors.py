"""Exceptions with a message for the user: one line that says what is wrong, where, and what to do."""

from __future__ import annotations


class HildaError(Exception):
    """A command failed (exit code 1)."""


class UsageError(HildaError):
    """The request is wrong: its configuration, its arguments or a missing input (exit code 2)."""


class ContextError(UsageError):
    """The prompt and its answer together exceed the model's context."""


class ConfigError(UsageError):
    """A configuration key is unknown or has an invalid value. The message names the key."""


class DataError(HildaError):
    """Input text or tokens are unusable. The message names the file and, in text files, the line."""


class UnreachableError(HildaError):
    """A URL cannot be read. The message gives the URL, the reason and, after a partial read, the byte."""


class ModelError(HildaError):
    """A model or checkpoint cannot be used. The message gives its name and the reason."""


class NonFiniteLogitsError(ModelError):
    """Logits became NaN or infinite. The message names the model or the part that computed them."""

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: logits are NaN or infinite; the weights are damaged, or the values overflow in float16: restore "
            "the checkpoint, or set model.dtype to 'float32'"
        )


class CheckpointError(HildaError):
    """A checkpoint is damaged, incomplete or does not belong to this run."""


class WriteError(HildaError):
    """A file or folder cannot be written. The message gives its path and the reason."""


class NonFiniteLossError(HildaError):
    """The loss or a gradient became NaN or infinite. The message names the step and the rows of the batch."""
