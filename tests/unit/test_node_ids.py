"""Node ids are stable: a workflow that somebody saved must find its nodes in every later version.

Ids may be added here, never taken out or renamed. A node that is given up stays, deprecated, under its id.
"""

import json
from pathlib import Path

LOCALE = Path(__file__).resolve().parents[2] / "locales" / "en" / "nodeDefs.json"

NODE_IDS = [
    "MPSCheckpointSampling",
    "MPSConcatenateVideos",
    "MPSDoctor",
    "MPSEncodePrompts",
    "MPSExtendVideo",
    "MPSFreeMemory",
    "MPSGetFrame",
    "MPSLastFrames",
    "MPSLoadDiffusionModel",
    "MPSLoadImageSequence",
    "MPSLoadTextEncoder",
    "MPSLoadVAE",
    "MPSLoadVideo",
    "MPSLoadVideoPath",
    "MPSMemoryGovernor",
    "MPSMemoryReport",
    "MPSPatchModel",
    "MPSPatchVAE",
    "MPSPlanMemory",
    "MPSQuantizeModel",
    "MPSReduceMemory",
    "MPSSaveVideo",
    "MPSTrimVideo",
    "MPSVAEDecode",
    "MPSVAEDecodeToVideo",
    "MPSVAEEncode",
    "MPSVideoInfo",
    "MPSWatchOutput",
]


def test_every_id_is_there_and_none_is_missing_here():
    """tests/comfyui holds the locales against the nodes themselves."""
    assert sorted(json.loads(LOCALE.read_text(encoding="utf-8"))) == NODE_IDS


def test_ids_are_of_one_form():
    assert all(name.startswith("MPS") and name.isidentifier() for name in NODE_IDS) and sorted(NODE_IDS) == NODE_IDS
