"""A thousand files broken at random: the reader gives frames or one sentence, and never crashes, hangs or leaks.

The files are read in child processes under a watchdog, because a crash of FFmpeg would take the tests with it; every
mutation follows from its number, so that ``mutated(content, number)`` makes a failing one again.
"""

import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from apple_silicon_video.tests.video_fixtures import mutation
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.tests.video_fixtures.mutation import mutated

MUTATIONS = 1000
SECONDS_FOR_ONE = 60
MEGABYTE = 1 << 20
BASES = (
    "h264.mp4",
    "h264.mkv",
    "hevc.mp4",
    "vp9.webm",
    "av1.mp4",
    "prores.mov",
    "mpeg4.avi",
    "mjpeg.avi",
    "gif.gif",
    "webp.webp",
    "variable_rate.mkv",
    "edit_list_negative.mp4",
    "alpha.webm",
    "alpha.mov",
    "surround.mp4",
)


@dataclass
class Findings:
    """What children told of each mutation, and on which ones they died or stood still."""

    told: list[dict] = field(default_factory=list)
    crashed: list[tuple[int, int]] = field(default_factory=list)
    hung: list[int] = field(default_factory=list)


def fuzz(script, bases, folder, first, last, seconds=SECONDS_FOR_ONE):
    """Read mutations first to last - 1 in children; after a crash or a hang the next one goes on behind it."""
    findings = Findings()
    while first < last:
        command = [sys.executable, str(script), str(folder), str(first), str(last)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        child.stdin.write(json.dumps(list(map(str, bases))))
        child.stdin.close()
        current, stood_still = None, threading.Event()
        while True:
            watchdog = threading.Timer(seconds, lambda child=child, flag=stood_still: (flag.set(), child.kill()))
            watchdog.start()
            line = child.stdout.readline()
            watchdog.cancel()
            if not line:
                break
            told = json.loads(line)
            current = None if "outcome" in told else told["seed"]
            if "outcome" in told:
                findings.told.append(told)
                first = told["seed"] + 1
        status = child.wait()
        child.stdout.close()
        if current is None:
            assert status == 0 or first >= last, f"the child ended with {status} before mutation {first}"
            continue
        (findings.hung if stood_still.is_set() else findings.crashed).append(
            current if stood_still.is_set() else (current, status)
        )
        first = current + 1
    return findings


@pytest.mark.slow
def test_broken_files_give_frames_or_one_sentence(video_files, tmp_path):
    bases = [video_files(name) for name in BASES]
    findings = fuzz(mutation.__file__, bases, tmp_path, 0, MUTATIONS)
    assert (findings.crashed, findings.hung) == ([], [])
    assert [told for told in findings.told if told["outcome"] not in ("frames", "error")] == []
    counts = Counter(told["outcome"] for told in findings.told)
    assert counts.total() == MUTATIONS and min(counts["frames"], counts["error"]) > MUTATIONS // 5
    begin, end = findings.told[MUTATIONS // 10], findings.told[-1]
    assert end["files"] <= begin["files"] and end["threads"] <= begin["threads"] + 2
    assert end["memory"] - begin["memory"] < 100 * MEGABYTE
    assert max(told["memory"] for told in findings.told) - begin["memory"] < 500 * MEGABYTE


def test_mutations_can_be_made_again_and_differ(video_files):
    content = video_files("h264.mp4").read_bytes()
    results = [mutated(content, seed) for seed in range(50)]
    assert results == [mutated(content, seed) for seed in range(50)]
    assert len(set(results)) > 45


FAULTY = """
import json, os, sys, time
folder, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
json.load(sys.stdin)
for seed in range(first, last):
    print(json.dumps({"seed": seed}), flush=True)
    if seed == 2:
        os.abort()
    if seed == 4:
        time.sleep(600)
    print(json.dumps({"seed": seed, "outcome": "frames"}), flush=True)
"""


def test_crashes_and_hangs_are_seen(tmp_path):
    """The watchdog itself, on a child that aborts on one file and sleeps on another."""
    script = Path(tmp_path, "faulty.py")
    script.write_text(FAULTY)
    findings = fuzz(script, [], tmp_path, 0, 7, seconds=2)
    assert [told["seed"] for told in findings.told] == [0, 1, 3, 5, 6]
    assert findings.hung == [4] and findings.crashed == [(2, -6)]
