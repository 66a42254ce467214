"""On-policy distillation: a student writes, a teacher scores every token, the student learns."""

__version__ = "0.1.0"
