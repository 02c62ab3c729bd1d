"""Long use of the real server: twenty runs of a shipped workflow in flat memory, and kills that lose nothing."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
from small_models import (
    ENCODERS,
    encoder_weights,
    published_lora,
    wan_weights,
    write_encoder_gguf,
    write_safetensors,
    write_vae,
    write_wan_gguf,
)

from .graphs import nodes, rewire, with_tensor, workflow
from .server import ServerError, server
from .trees import VERSIONS

COMFYUI = max(VERSIONS, key=lambda version: tuple(map(int, version.split("."))))
HERE = Path(__file__).parent
SIMULATED = HERE.parent / "simulated_mps"
FAST = "wan2.2_t2v_a14b_fast_16gb"
RUNS, WARM, FRAMES = 20, 3, 5
MIB = 1 << 20


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of small models under the names that the workflow has."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("diffusion_models", "text_encoders", "vae", "loras"):
        (folder / name).mkdir()
    api, _ = workflow(FAST)
    for node in api.values():
        inputs = node["inputs"]
        for name, write in WRITERS.items():
            if name in inputs:
                write(folder, inputs[name])
    return folder


def expert(name):
    return f"wan2.2-t2v-a14b-{'high' if 'high' in name.lower() else 'low'}"


def write_expert(folder, name):
    write_wan_gguf(folder / "diffusion_models" / name, wan_weights(expert(name), "Q5_K_M"), "Q5_K_M")


def write_lora(folder, name):
    write_safetensors(folder / "loras" / name, published_lora(expert(name)))


def write_encoder(folder, name):
    shape = ENCODERS["umt5"]
    write_encoder_gguf(folder / "text_encoders" / name, shape, encoder_weights(shape, "Q5_K_M"), "Q5_K_M")


WRITERS = {
    "unet_name": write_expert,
    "lora_name": write_lora,
    "clip_name": write_encoder,
    "vae_name": lambda folder, name: write_vae(folder / "vae" / name),
}


def graph(steps):
    """The workflow at 64x64, 5 frames, with Checkpoint Sampling between the governor and each sampler."""
    made, _ = workflow(FAST)
    (latent,) = nodes(made, "EmptyHunyuanLatentVideo")
    made[latent]["inputs"] |= {"width": 64, "height": 64, "length": FRAMES}
    for key in nodes(made, "MPSMemoryGovernor"):
        rewire(made, key, 0, f"checkpoints{key}")
        made[f"checkpoints{key}"] = {"class_type": "MPSCheckpointSampling", "inputs": {"model": [key, 0], "every": 1}}
    for key in nodes(made, "KSamplerAdvanced"):
        inputs = made[key]["inputs"]
        first = inputs["add_noise"] == "enable"
        inputs["steps"] = steps
        inputs["start_at_step"], inputs["end_at_step"] = (0, steps // 2) if first else (steps // 2, 10000)
    return made


def start(base, models, **options):
    (base / "custom_nodes").mkdir(exist_ok=True)
    for source in (HERE / "witness_nodes.py", SIMULATED / "stats_node.py"):
        shutil.copy(source, base / "custom_nodes")
    packs = ["apple-silicon-video", "witness_nodes.py", *(["stats_node.py"] if "launcher" in options else [])]
    arguments = [*options.pop("arguments", []), "--whitelist-custom-nodes", *packs]
    return server(COMFYUI, base, models=models, arguments=arguments, **options)


def numbered(made, number):
    """The graph of a run that computes everything anew: other words, other noise; counters once all is saved."""
    made = json.loads(json.dumps(made))
    (text,) = nodes(made, "MPSEncodePrompts")
    made[text]["inputs"] |= {"positive": f"A red fox, take {number}.", "negative": f"blurry {number}"}
    for key in nodes(made, "KSamplerAdvanced"):
        made[key]["inputs"]["noise_seed"] = number
    (save,) = nodes(made, "MPSSaveVideo")
    made["stats"] = {"class_type": "SimulatedStats", "inputs": {"value": [save, 0], "name": "counters"}}
    return made


def nodes_that_were_cached(comfy, caches):
    """Run Free Memory behind another node; which nodes ComfyUI had results of."""
    image = {"width": 64, "height": 64, "batch_size": 1, "color": 255}
    free = {"anything": ["image", 0], "unload_models": True, "empty_cache": True, "drop_caches": caches}
    prompt = {
        "image": {"class_type": "EmptyImage", "inputs": image},
        "free": {"class_type": "MPSFreeMemory", "inputs": free},
    }
    found = []
    comfy.run(prompt, listener=lambda kind, data: found.extend(data["nodes"] if kind == "execution_cached" else []))
    return found


@pytest.mark.slow
def test_twenty_runs_are_flat(models, tmp_path):
    """On the simulated device: resident memory of the server, bytes of tensors and of the allocator after each run."""
    options = {
        "launcher": [str(SIMULATED / "launch_comfyui.py")],
        "environ": {"SIMULATED_TORCH": "2.13", "SIMULATED_RAM_GB": "64", "OMP_NUM_THREADS": "1"},
    }
    levels = []
    made = graph(steps=2)
    with start(tmp_path, models, **options) as comfy:
        process = psutil.Process(comfy.process.pid)
        for number in range(RUNS):
            outputs = comfy.run(numbered(made, number))
            (path,) = comfy.files(outputs, ".mp4")
            with av.open(str(path)) as container:
                assert sum(1 for _ in container.decode(video=0)) == FRAMES
            counters = json.loads((comfy.base / "output" / "counters.json").read_text())
            levels.append((process.memory_info().rss, counters["live"], counters["driver"]))
        log = comfy.log_text()
        seconds = sum(process.cpu_times()[:2])
        print(f"{seconds:.0f} CPU-seconds", *[f"{rss / MIB:.0f}/{live}/{driver}" for rss, live, driver in levels])
        cached = [nodes_that_were_cached(comfy, caches) for caches in ("files", "files", "everything", "keep")]
        checkpoints = list((comfy.base / "user" / "apple-silicon-video" / "checkpoints").iterdir())
    assert log.count("Unloaded to make room for WAN21: WAN21.") == RUNS
    rss, live, driver = zip(*levels[WARM:], strict=True)
    assert len(set(live)) == 1
    assert max(driver) - driver[0] < MIB
    half = len(rss) // 2
    assert min(rss[-half:]) - min(rss[:half]) < 16 * MIB  # it goes up and down by 60
    assert cached == [[], ["image"], ["image"], []]
    assert len(checkpoints) <= 2  # of the last run alone


def progress_of(comfy, made, stop_at=None):
    """(Outputs or None, [(node, step)]) of a run; ``stop_at``: the node and the step at which the server is killed."""
    steps = []

    def listen(kind, data):
        if kind == "progress":
            steps.append((str(data["node"]), data["value"]))
            if stop_at is not None and steps[-1][0] == stop_at[0] and steps[-1][1] >= stop_at[1]:
                os.killpg(comfy.process.pid, signal.SIGKILL)

    try:
        return comfy.run(made, listener=listen), steps
    except ServerError:
        if stop_at is None:
            raise
        return None, steps


@pytest.mark.slow
def test_killed_server_goes_on(models, tmp_path):
    """kill -9 in either expert; the same prompt again goes on, and its frames are those of an undisturbed run."""
    made = with_tensor(graph(steps=16), "frames")
    plain = json.loads(json.dumps(made))
    for key, node in list(plain.items()):
        if node["class_type"] in ("MPSMemoryGovernor", "MPSCheckpointSampling"):
            rewire(plain, key, 0, node["inputs"]["model"][0])
            del plain[key]
    high, low = nodes(made, "KSamplerAdvanced")
    kills = [(high, 2), (high, 4), (low, 2)]
    seen = []
    for stop_at in (*kills, None):
        with start(tmp_path, models, arguments=["--cpu"], environ={"OMP_NUM_THREADS": "1"}) as comfy:
            outputs, steps = progress_of(comfy, made, stop_at)
            seen.append(steps)
            if stop_at is None:
                frames = np.load(comfy.files(outputs, ".npy")[0])
                (file,) = comfy.files(comfy.run(plain), ".npy")
                expected = np.load(file)
    print(seen)
    assert np.array_equal(frames, expected) and frames.std() > 0.02
    for before, after in itertools.pairwise(seen):
        assert after[0][0] == before[-1][0] and after[0][1] >= before[-1][1]  # no step that was seen is repeated
    assert [steps[-1][0] for steps in seen[:-1]] == [node for node, _ in kills]
    assert not any(node == high for node, _ in seen[-1])
