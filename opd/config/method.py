"""``method``: a named choice of who writes, who scores and which loss."""

from enum import StrEnum


class Method(StrEnum):
    opd = "opd"
    opd_pg = "opd_pg"
    self_distill = "self_distill"
    offline = "offline"
    sft = "sft"
    grpo = "grpo"
