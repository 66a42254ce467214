"""The page of models is what the last checks have found, of the families that are checked."""

import json

import pytest

from tests.families.models import DEFAULT, FAMILIES
from tests.families.page import FIGURES, PAGE, generated

FOUND = json.loads(FIGURES.read_text())


def test_the_page_is_generated_from_the_figures_of_every_family() -> None:
    assert list(FOUND) == list(FAMILIES)
    assert PAGE.read_text() == generated(FOUND)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_listed_as_it_was_found(name: str) -> None:
    family, found = FAMILIES[name], FOUND[name]
    assert found["status"] == ("refused" if family.refused else "green")
    assert family.error in found.get("error", "")


def test_the_default_run_has_every_kind() -> None:
    assert set(DEFAULT) < set(FAMILIES)
    assert sum(not family.refused for family in FAMILIES.values()) >= 20
