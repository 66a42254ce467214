"""Exit statuses of opd's processes."""

DONE, FAILED, USAGE_ERROR = 0, 1, 2
USAGE_ERROR_MARK = "opd: "
"""Opens the line of a rank's log that tells the user what to correct."""
