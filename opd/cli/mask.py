"""``opd mask``: discover, show, compare and combine masks; export, apply and undo what training changed."""

from opd.cli import mask_delta, mask_files
from opd.cli.grammar import HELP_FLAGS

HELP = """usage: opd mask VERB [ARGUMENTS] [key=value ...]

Masks of the weights that are trained, and files of the weights that training changed.

  discover   find a mask by a rule
  show       show where a mask is dense
  compare    compare two masks: their overlap beside chance
  combine    union, intersection or difference of two masks
  export     write the difference of base and trained model as one small file
  apply      rebuild the trained model from its base and that file
  undo       rebuild the base from the trained model and that file

`opd mask VERB --help` explains a verb; docs/masks.md explains the rules.

example: opd mask discover base=MODEL rule=delta trained=runs/x density=0.1 out=m.safetensors"""

VERBS = {
    "discover": mask_files.discover,
    "show": mask_files.show,
    "compare": mask_files.compare,
    "combine": mask_files.combine,
    "export": mask_delta.export,
    "apply": mask_delta.apply,
    "undo": mask_delta.undo,
}


def main(argv: list[str]) -> None:
    """Run a verb."""
    if not argv or argv[0] in HELP_FLAGS:
        print(HELP)
        return
    if argv[0] not in VERBS:
        raise ValueError(f"there is no opd mask {argv[0]}: allowed are {', '.join(VERBS)}")
    VERBS[argv[0]](argv[1:])
