"""What a training run reports to its user in one line."""


class TrainingError(Exception):
    """A run cannot start or go on; the message says what was wrong and what would do."""


class DivergedError(TrainingError):
    """The loss became infinite or NaN: the end of a run, and a result."""
