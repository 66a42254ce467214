"""``method``: a named choice of what generates, what scores, and the loss."""

from enum import StrEnum


class Method(StrEnum):
    opd = "opd"
    opd_pg = "opd_pg"
    self_distill = "self_distill"
    offline = "offline"
    sft = "sft"
    grpo = "grpo"
