"""The one error this library raises about a model folder."""


class CheckpointError(ValueError):
    """A model folder that cannot be used: the file, what was wanted, what came, what to change."""
