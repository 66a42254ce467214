"""The error of a run that cannot go on."""


class RunError(RuntimeError):
    """A run cannot go on: the message is one sentence for its user, and the exit status is 1.

    What the user can correct before a run starts is a ValueError, with exit status 2.
    """
