"""The errors of a run that cannot go on."""


class RunError(RuntimeError):
    """A run cannot go on: the message is one sentence for its user, and the exit status is 1.

    What the user can correct before a run starts is a ValueError, with exit status 2.
    """


class Interrupted(RunError):
    """A run was asked to end and has saved what it did."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"stopped after step {step}, whose checkpoint is saved; the same command goes on from there"
        )
