"""Named errors for bad input: each message says what was got, what was expected and what to do.

`assert` is kept for invariants of our own code. Everything that a user, a file or the network can get wrong raises
one of these, so that a command line can print one clear line and tests can tell a refusal from a crash.
"""


class GolfError(Exception):
    """Base of every error that bad input can cause. Command lines print its message and exit with status 2."""


class ConfigError(GolfError):
    """An option, preset or environment variable is unknown, malformed or contradicts another."""


class ShardError(GolfError):
    """A token shard is missing, truncated, oversized, of another format, or holds a token outside the vocabulary."""


class TokenizerError(GolfError):
    """A tokenizer is missing, unreadable, or not the one that the data or the model was made with."""


class DataError(GolfError):
    """A text source or a manifest is missing, damaged or empty."""


class ArtifactError(GolfError):
    """A model artifact is truncated, extended, damaged, hostile, over budget or of an unknown version."""


class CheckpointError(GolfError):
    """A checkpoint or run folder is damaged or belongs to another configuration."""


class StorageError(GolfError, OSError):
    """A file cannot be written: the disk is full or read-only, or a write did not read back as it was."""


class TrainingError(GolfError):
    """Training cannot go on: too many steps without a finite gradient, or another process of the run was lost."""
