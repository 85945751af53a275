"""The errors this library raises about a model folder."""


class CheckpointError(ValueError):
    """A model folder that cannot be used: the file, what was wanted, what came, what to change."""


class WritingError(CheckpointError):
    """Writing a model failed on the way, as on a full disk; what is there is kept."""
