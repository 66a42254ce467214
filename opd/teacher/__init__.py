"""Scores every token that a student wrote: from a server (`ServerTeacher`) or in this process."""
