"""The list of planted faults fits the code and the tests as they are."""

import re
from pathlib import Path

import pytest

from scripts.planted_faults import FAULTS, place_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_stands_in_one_place_and_its_test_is_there(name):
    fault = FAULTS[name]
    assert fault.old != fault.new and place_of(fault, ROOT)
    path, _, node = fault.test.partition("::")
    function = re.match(r"\w*", node)[0]
    assert not function or f"\ndef {function}(" in (ROOT / path).read_text()
