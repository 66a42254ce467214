"""Exit statuses of the processes of opd."""

DONE, FAILED, USAGE_ERROR = 0, 1, 2
MESSAGE_MARK = "opd: "
"""Start of the line in a rank's log with the message for the user."""
