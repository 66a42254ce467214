"""Which settings a rule reads, and whether the ones given make sense together."""

from dataclasses import fields

from opd.config.masks import MaskRule, RuleConfig

WATCHED = (
    MaskRule.early_delta,
    MaskRule.adam_saliency,
    MaskRule.fisher,
    MaskRule.first_gradient,
)
"""Rules whose scores a run of training leaves behind."""
COMPETE = {"density", "budget", "structure", "exclude"}
READS: dict[MaskRule, set[str]] = {
    MaskRule.delta: COMPETE | {"threshold", "trained"},
    MaskRule.near_zero: COMPETE,
    MaskRule.safe: COMPETE | {"rank_share"},
    MaskRule.random: COMPETE | {"like"},
    MaskRule.magnitude_matched: {"like"},
    MaskRule.scores: COMPETE | {"threshold", "scores"},
    **{rule: COMPETE | {"threshold", "scores", "steps"} for rule in WATCHED},
}
"""Settings that each rule reads, beside rule and seed."""
NEEDS = {
    MaskRule.delta: "trained",
    MaskRule.magnitude_matched: "like",
    MaskRule.scores: "scores",
    **dict.fromkeys(WATCHED, "scores"),
}


def require_sound(rule: RuleConfig) -> None:
    """ValueError for settings that are missing, contradict each other or have no effect."""
    plain = RuleConfig(rule=rule.rule)
    for field in fields(RuleConfig):
        if field.name in {"rule", "seed", *READS[rule.rule]}:
            continue
        if getattr(rule, field.name) != getattr(plain, field.name):
            raise ValueError(
                f"{field.name}={_typed(getattr(rule, field.name))} has no effect with rule={rule.rule}, "
                f"which reads {', '.join(sorted(READS[rule.rule]))} and seed: leave it out"
            )
    needed = NEEDS.get(rule.rule)
    if needed is not None and getattr(rule, needed) is None:
        raise ValueError(f"rule={rule.rule} needs {needed}=..., found none")
    if rule.like is not None:
        for name in sorted(COMPETE):
            if getattr(rule, name) != getattr(plain, name):
                raise ValueError(
                    f"{name}={_typed(getattr(rule, name))} has no effect beside like={rule.like}, whose "
                    "counts are copied: leave one of them out"
                )
        return
    if (rule.density is None) == (rule.threshold is None):
        found = "none" if rule.density is None else "both"
        needs = "density=... or threshold=..." if "threshold" in READS[rule.rule] else "density=..."
        needs += " or like=..." if "like" in READS[rule.rule] else ""
        raise ValueError(f"rule={rule.rule} needs {needs}, found {found}")
    if rule.threshold is not None:
        for name in ("budget", "structure"):
            if getattr(rule, name) != getattr(plain, name):
                raise ValueError(
                    f"{name}={getattr(rule, name)} needs density=..., found threshold={rule.threshold}"
                )


def _typed(value: object) -> str:
    return str(getattr(value, "value", value))
