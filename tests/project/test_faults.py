"""The seeded faults (`python tests/project/fault_seeding.py` runs them) still find what they break."""

import pytest
from faults import FAULTS, ROOT, Fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_still_finds_what_it_breaks(fault):
    compile(fault.source, fault.module, "exec")
    assert (ROOT / "tests" / f"{fault.tests}.py").is_file()


def test_a_fault_that_finds_nothing_is_an_error():
    with pytest.raises(ValueError, match="stands 0 times"):
        _ = Fault("none", "", "losses.dpo", "no such text", "", "", "").source


def test_every_fault_has_a_name_of_its_own_and_stands_in_the_table():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    text = (ROOT / "tests" / "project" / "fault_seeding.md").read_text()
    assert [fault.name for fault in FAULTS if f"| {fault.name} |" not in text] == []
