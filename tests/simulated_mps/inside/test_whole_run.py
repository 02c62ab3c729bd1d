"""The whole 16 GB workflow, 14B in Q3_K_M, from its graph to its video: one peak, below 9.5 GiB (see whole_run.py).

GiB live at 81 frames, of the whole run and in each stage, and held by the driver with its cache; op table of torch
2.13. Decoding begins with the low-noise expert on the device; by itself it takes 2.8.

| workflow | peak | text | picture | high noise | low noise | decoding | saving | driver |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
| t2v, 20 steps | 8.32 | 4.24 | | 8.32 | 8.32 | 6.92 | 0.24 | 9.18 |
| i2v, 20 steps | 8.36 | 4.24 | 2.06 | 8.36 | 8.36 | 6.92 | 0.24 | 9.25 |
| t2v, 4-step LoRAs | 8.89 | 4.24 | | 8.89 | 8.89 | 7.49 | 0.24 | 9.67 |
| i2v, 4-step LoRAs | 8.93 | 4.24 | 2.06 | 8.92 | 8.93 | 7.50 | 0.24 | 9.74 |
"""

import av
import pytest
import simulated_mps as sim
from workflow_plans import planned
from workflow_table import TABLE as WORKFLOWS

TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))
GIB = 1 << 30
MOST = 9.5 * GIB
T2V, I2V = "wan2.2_t2v_a14b_16gb", "wan2.2_i2v_a14b_16gb"
FAST_T2V, FAST_I2V = "wan2.2_t2v_a14b_fast_16gb", "wan2.2_i2v_a14b_fast_16gb"
STAGES = ("text encoding", "image encoding", "sampling high", "sampling low", "decoding", "saving")
CASES = {(2, 10): (FAST_T2V,), (2, 13): (T2V, I2V, FAST_I2V)}


def test_none_is_left_out():
    rows = {name for name, row in WORKFLOWS.items() if row.memory == 16 and "A14B" in row.title}
    assert rows == {T2V, I2V, FAST_T2V, FAST_I2V}


if TABLE in CASES:
    import whole_run
    from apple_silicon_video.memory import comfy_runs
    from apple_silicon_video.memory.governor import POLICIES
    from whole_run import graph_of, with_other_prompt, with_steps

    def check(name, result, videos=1):
        """The bound, what the planner says, that the governor shrank nothing, and that it was the whole workflow."""
        print(f"{name}: {result.table()}")
        row = WORKFLOWS[name]
        wanted = [stage for stage in STAGES if stage != "image encoding" or "i2v" in name]
        assert [stage for stage in STAGES if stage in result.stages] == wanted
        assert len(result.videos) == videos
        with av.open(str(result.videos[-1])) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height) == (row.width, row.height)
            assert sum(1 for _ in container.decode(stream)) == row.frames
        assert result.peak < MOST
        assert result.driver < POLICIES["careful"].shrink * whole_run.RECOMMENDED
        assert max(result.stages, key=result.stages.get).startswith("sampling")
        assert planned(row).peak.live == pytest.approx(result.peak, rel=0.05)

    @pytest.mark.parametrize("name", CASES[TABLE])
    def test_a_workflow(tmp_path, monkeypatch, name):
        with whole_run.mac_with_16_gb(monkeypatch, tmp_path):
            check(name, whole_run.run(tmp_path, graph_of(name)))


if TABLE == (2, 13):

    def test_queued_again_with_another_prompt(tmp_path, monkeypatch):
        """The second run begins with what the first one left on the device."""
        graph = graph_of(FAST_T2V)
        with whole_run.mac_with_16_gb(monkeypatch, tmp_path):
            check(FAST_T2V, whole_run.run(tmp_path, graph, with_other_prompt(graph)), videos=2)

    def test_without_the_hand_over_it_does_not_fit(tmp_path, monkeypatch):
        """The second expert comes while the first is still there."""
        monkeypatch.setattr(comfy_runs, "have_device_to_itself", lambda *_: None)
        with (
            whole_run.mac_with_16_gb(monkeypatch, tmp_path),
            pytest.raises(RuntimeError, match=r"sampling low: .*out of memory"),
        ):
            whole_run.run(tmp_path, with_steps(graph_of(FAST_T2V), 1))
