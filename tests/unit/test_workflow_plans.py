"""Every workflow fits the Mac it is made for, by the memory planner and the published files' tables."""

import pytest
from apple_silicon_video.memory.plan import Machine
from workflow_files import FILES
from workflow_plans import model_files, planned
from workflow_table import TABLE


@pytest.mark.parametrize("name", TABLE)
def test_planned_peak_is_within_the_working_set(name):
    row = TABLE[name]
    made = planned(row)
    assert made.machine == Machine.with_ram(row.memory)
    assert made.verdict == "fits", made.sentence()
    assert made.peak.device <= made.machine.recommended
    names = [stage.name for stage in made.stages]
    assert names[0] == "text encoding" and names[-2:] == ["decoding", "saving"]
    assert ("sampling low" in names) == ("a14b" in name)


@pytest.mark.parametrize("name", TABLE)
def test_every_file_of_the_graph_is_known(name):
    files = model_files(TABLE[name])
    assert len(files) == len(set(files)) >= 3 and set(files) <= set(FILES)
