"""A command line is positionals, key=value settings and flags, in any order."""

from dataclasses import dataclass, field

import pytest

from opd.cli.grammar import INDENT, WIDTH, HelpShown, describe_keys, parse_command_line

HELP = "usage: opd try ONE [key=value ...]\n\nexample: opd try it"


def test_a_command_line_is_taken_apart_in_any_order() -> None:
    line = parse_command_line(
        ["a=1", "--json", "it", "~b", "+c=x=y"], HELP, positionals=("ONE",), flags=("--json",)
    )
    assert line.positionals == ["it"]
    assert line.settings == ["a=1", "~b", "+c=x=y"]
    assert line.flags == {"--json"}


def test_help_wins_over_everything_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(HelpShown) as shown:
        parse_command_line(["--nonsense", "a", "b", "-h"], HELP)
    assert shown.value.code == 0
    assert capsys.readouterr().out == f"{HELP}\n"


def test_an_unknown_flag_names_the_flags_there_are() -> None:
    with pytest.raises(ValueError, match=r"as only_correct=.*flags here are --json, --help"):
        parse_command_line(["it", "--only-correct"], HELP, positionals=("ONE",), flags=("--json",))


@dataclass(kw_only=True)
class Keys:
    short: int = field(default=1, metadata={"least": 1})
    """What it is."""
    a_name_with_a_default_that_needs_room: str = "somewhere/far/away"
    """Its sentence stands below it."""
    long: str = "x"
    """A sentence of more than one line, which is wrapped and never shortened, so that each of its words can be read."""  # noqa: E501


def test_a_sentence_is_wrapped_beside_its_key_and_never_shortened() -> None:
    lines = describe_keys(Keys).splitlines()
    assert lines[1] == f"{'  short=1':{INDENT}}What it is (≥ 1)"
    assert lines[2].strip() == "a_name_with_a_default_that_needs_room=somewhere/far/away"
    assert lines[3] == f"{'':{INDENT}}Its sentence stands below it"
    rest = " ".join(line.strip() for line in lines[4:])
    assert rest.endswith("so that each of its words can be read")
    assert "..." not in rest
    assert all(len(line) <= WIDTH for line in lines)
