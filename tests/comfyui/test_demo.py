"""scripts/demo.sh as people run it: a playable video at the end, or one sentence and a status."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import apple_silicon_video.tests.scripts_path  # noqa: F401
import av
import pytest

import demo as demo_script  # isort: skip

ROOT = Path(__file__).resolve().parents[2]
RESULT = re.compile(
    r"Video:    (?P<path>/.*\.mp4)\n"
    r"Size:     (?P<bytes>[\d,]+) bytes, (?P<width>\d+)x(?P<height>\d+) pixels\n"
    r"Frames:   (?P<frames>\d+) at 16 per second\n"
    r"Duration: (?P<seconds>[\d.]+) s\n"
)


def demo(*arguments, **environment):
    """Start the demo in a session of its own, without a terminal."""
    clean = {name: value for name, value in os.environ.items() if name != "COMFYUI_DIR"}
    return subprocess.Popen(
        [ROOT / "scripts" / "demo.sh", *arguments],
        env=clean | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def refused(*arguments, **environment):
    """Return the one sentence of a run that must fail."""
    process = demo(*arguments, **environment)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 1 and output == ""
    (sentence,) = errors.splitlines()
    return sentence


@pytest.mark.slow
@pytest.mark.parametrize("workflow", [demo_script.DEFAULT_WORKFLOW, "wan2.2_i2v_a14b_64gb"])
def test_demo_ends_with_a_playable_video(workflow):
    process = demo("--workflow", workflow)
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    found = RESULT.fullmatch(output)
    assert found, output
    path = Path(found["path"])
    assert path.stat().st_size == int(found["bytes"].replace(",", ""))
    with av.open(str(path)) as video:
        frames = [frame.to_ndarray(format="gray") for frame in video.decode(video=0)]
    assert len(frames) == int(found["frames"]) == 17
    assert frames[0].shape == (int(found["height"]), int(found["width"])) == (112, 192)
    assert abs(float(found["seconds"]) - 17 / 16) < 0.1
    assert frames[0].std() > 1.0
    assert re.search(r"^\[\d+/\d+\] KSampler\w* \d/[24]$", errors, re.MULTILINE)


@pytest.mark.slow
def test_models_of_the_user_run_under_their_own_names(tmp_path):
    """Small models under the published names stand for the user's; the workflow keeps its size and steps."""
    prompt, _ = demo_script.find_workflow(demo_script.DEFAULT_WORKFLOW)
    names = demo_script.make_small_models()
    for _, _, file, kind in demo_script.model_inputs(prompt):
        folder = kind.folders[-1]
        (tmp_path / folder).mkdir(exist_ok=True)
        source = demo_script.SMALL_MODELS / kind.folders[0] / names[demo_script.role_of(file, kind)]
        (tmp_path / folder / file).symlink_to(source)
    for node in prompt.values():
        node["inputs"].update({"width": 64, "height": 64, "length": 5} if "length" in node["inputs"] else {})
        node["inputs"].update({"steps": 3} if "steps" in node["inputs"] else {})
    workflow = tmp_path / "mine.json"
    workflow.write_text(json.dumps(prompt))
    process = demo("--workflow", str(workflow), "--models", str(tmp_path))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    found = RESULT.fullmatch(output)
    assert found and (found["width"], found["height"], found["frames"]) == ("64", "64", "5")
    assert "KSampler 3/3" in errors


@pytest.mark.slow
def test_missing_models_are_listed(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "wan_2.1_vae.safetensors").touch()
    assert refused("--models", str(tmp_path)) == (
        f"{tmp_path} lacks diffusion_models/Wan2.1-T2V-1.3B-Q5_K_M.gguf, "
        "text_encoders/umt5-xxl-encoder-Q5_K_M.gguf: put the files there under these names."
    )


@pytest.mark.slow
def test_failures_are_one_sentence(tmp_path):
    assert refused(COMFYUI_DIR=str(tmp_path)).startswith(f"COMFYUI_DIR is {tmp_path}, which holds no ComfyUI")
    assert refused("--workflow", "nonsense").startswith("There is no workflow nonsense: use one of ")


@pytest.mark.slow
def test_interruption_leaves_no_process():
    process = demo()
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("["):
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "") and errors.endswith("Stopped.\n")
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    base = str(ROOT / ".cache" / "demo")
    assert not [line for line in listed.splitlines() if "main.py" in line and f"--base-directory {base} " in line]
