"""Scores every token of a rollout: on a server (`ServerTeacher`) or in this process (`LocalTeacher`)."""
