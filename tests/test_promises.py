"""docs/promises.md names tests that exist; the deliberate faults have a place in the code."""

import ast
import re
from pathlib import Path

import pytest
from mutations import FAULTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")


def functions_in(path):
    """Their names."""
    tree = ast.parse((ROOT / path).read_bytes())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 50
    assert [one for one in named if one[1] not in functions_in(one[0])] == []


def test_every_group_of_cases_has_a_promise():
    assert re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE) == [str(n) for n in range(1, 23)]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_deliberate_fault_has_one_place_and_a_test(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.right) == 1
    file, _, name = fault.test.partition("::")
    assert name in functions_in(file)
