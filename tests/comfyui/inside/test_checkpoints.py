"""Sampling that is stopped, failed or killed goes on where it stood, and nothing else ever takes its checkpoint."""

import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import folder_paths
import pytest
import torch
import tqdm.auto
from apple_silicon_video.memory import comfy_checkpoints, comfy_runs
from apple_silicon_video.memory.checkpoints import Checkpoint, CheckpointStore
from apple_silicon_video.memory.comfy_checkpoints import default_store, with_checkpoints
from apple_silicon_video.memory.tensor_files import save_value
from apple_silicon_video.nodes.long_runs import CheckpointSampling, ancestors
from small_models import wan_lora

from .wan import apply_lora, pair

STEPS = 6
EXACT = ["euler", "heun", "dpm_2", "ddim"]
ANEW = ["dpmpp_2m", "heunpp2", "euler_ancestral", "lcm", "dpmpp_sde"]


class Stop(Exception):
    """Ends a sampling from inside the model, as a crash would."""


@pytest.fixture(scope="module", autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("wan"))[0]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.fixture
def calls(model):
    """Counts the model's evaluations, two for each with cfg; ``calls.stop`` ends the one of that number."""
    counter = SimpleNamespace(count=0, stop=None)
    inner = model.model.diffusion_model
    whole = inner.forward

    def forward(*arguments, **options):
        counter.count += 1
        if counter.count == counter.stop:
            raise Stop
        return whole(*arguments, **options)

    inner.forward = forward
    yield counter
    inner.forward = whole


def conditioning(seed=1):
    return [[torch.randn(1, 12, 4096, generator=torch.Generator().manual_seed(seed)), {}]]


def sample(model, sampler="euler", seed=3, positive=1, mask=None, callback=None, steps=STEPS, cfg=2.0, fill=0.0,
           **options):  # fmt: skip
    latent = torch.full((1, 16, 2, 8, 8), fill)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    conditions = conditioning(positive), conditioning(2)
    arguments = [model, noise, steps, cfg, sampler, "simple", *conditions, latent]
    return comfy.sample.sample(*arguments, noise_mask=mask, seed=seed, callback=callback, **options)


def stop_at(calls, number):
    calls.count, calls.stop = 0, number


@pytest.mark.parametrize("sampler", EXACT)
@pytest.mark.parametrize("every", [1, 2])
def test_exact_samplers_give_the_undisturbed_result(model, store, calls, sampler, every):
    reference = sample(model, sampler)
    whole = calls.count
    assert reference.std() > 0.01
    for stop in {2, whole // 3, whole // 2, whole - 1, whole}:
        told = []
        resumable = with_checkpoints(model, store, "model", every, told.append)
        stop_at(calls, stop)
        with pytest.raises(Stop):
            sample(resumable, sampler)
        stop_at(calls, None)
        result = sample(resumable, sampler, callback=lambda step, *_, seen=(steps := []): seen.append(step))
        assert torch.equal(result, reference)
        assert not told or (told[0].startswith("Going on after step ") and "anew" not in told[0])
        assert steps == list(range(STEPS - len(steps), STEPS))
        if every == 1 and sampler in ("euler", "ddim"):
            lost = calls.count + stop - 1 - whole
            assert 0 <= lost < whole // STEPS  # evaluations of the stopped step alone
        (entry,) = store.folder.iterdir()
        entry.unlink()


@pytest.mark.parametrize("sampler", ANEW)
def test_other_samplers_go_on_and_say_so(model, store, calls, sampler):
    told = []
    resumable = with_checkpoints(model, store, "model", 1, told.append)
    reference = sample(model, sampler)
    whole = calls.count
    stop_at(calls, whole - 2)
    with pytest.raises(Stop):
        sample(resumable, sampler)
    stop_at(calls, None)
    result = sample(resumable, sampler)
    assert calls.count < whole / 2 + 2
    assert len(told) == 1 and told[0].endswith("this sampler's history starts anew.")
    assert torch.isfinite(result).all() and 0.2 < result.std() / reference.std() < 5


@pytest.mark.parametrize("sampler", ["uni_pc", "dpm_adaptive"])
def test_samplers_that_cannot_are_left_alone(model, store, sampler):
    told = []
    result = sample(with_checkpoints(model, store, "model", 1, told.append), sampler)
    assert torch.equal(result, sample(model, sampler))
    assert told == ["This sampler cannot be resumed; choose euler to have its steps saved."]
    assert not store.folder.exists()


def test_masked_sampling_goes_on(model, store, calls):
    mask = torch.zeros(1, 1, 2, 8, 8)
    mask[..., :4] = 1
    reference = sample(model, mask=mask)
    resumable = with_checkpoints(model, store, "model", 1)
    stop_at(calls, 5)
    with pytest.raises(Stop):
        sample(resumable, mask=mask)
    stop_at(calls, None)
    assert torch.equal(sample(resumable, mask=mask), reference)


CHANGES = {
    "seed": {"seed": 4},
    "prompt": {"positive": 5},
    "steps": {"steps": STEPS + 1},
    "mask": {"mask": torch.ones(1, 1, 2, 8, 8)},
    "sampler": {"sampler": "heun"},
    "cfg": {"cfg": 2.5},
    "latent": {"fill": 0.1},
}


@pytest.mark.parametrize("change", [*CHANGES, "identity", "lora", "lora strength", "shift"])
def test_another_sampling_does_not_take_the_checkpoint(model, store, calls, tmp_path, change):
    def made(identity="model", strength=0.5, lora=1):
        patched = apply_lora(model, wan_lora("wan2.1-t2v-1.3b", "lora", seed=lora), strength)
        return with_checkpoints(patched, store, identity, 1, told.append)

    told = []
    stop_at(calls, 6)
    with pytest.raises(Stop):
        sample(made())
    stop_at(calls, None)
    variants = {
        "identity": lambda: made(identity="other"),
        "lora": lambda: made(lora=2),
        "lora strength": lambda: made(strength=0.25),
    }
    if change == "shift":
        shifted = made()
        shifted.add_object_patch("model_sampling", shifted_sampling(model))
        sample(shifted)
    else:
        sample(variants.get(change, made)(), **CHANGES.get(change, {}))
    assert told == []
    sample(made())
    assert len(told) == 1 and "Going on" in told[0]


def shifted_sampling(model):
    class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    sampling = Sampling(model.model.model_config)
    sampling.set_parameters(shift=3.0, multiplier=1000)
    return sampling


def test_finished_sampling_is_not_repeated_until_its_run_succeeds(model, store, calls, monkeypatch):
    told, succeeded = [], set()
    monkeypatch.setattr(comfy_checkpoints, "run_succeeded", succeeded.__contains__)
    monkeypatch.setattr(comfy_checkpoints, "current_run", lambda: "run 1")
    resumable = with_checkpoints(model, store, "model", 1, told.append)
    reference = sample(resumable)
    calls.count = 0
    assert torch.equal(sample(resumable), reference)
    assert calls.count == 0 and told == ["This sampling was finished before; its result is used."]
    succeeded.add("run 1")
    assert torch.equal(sample(resumable), reference)
    assert calls.count > 0 and len(told) == 1


def test_what_a_killed_run_finished_goes_with_the_run_that_used_it(model, store, calls, monkeypatch):
    monkeypatch.setattr(comfy_checkpoints, "run_succeeded", {"run 2"}.__contains__)
    resumable = with_checkpoints(model, store, "model", 1)
    for run, evaluations in (("run 1", True), ("run 2", False), ("run 3", True)):
        monkeypatch.setattr(comfy_checkpoints, "current_run", lambda run=run: run)
        calls.count = 0
        sample(resumable)
        assert bool(calls.count) == evaluations, run


def test_damaged_checkpoint_starts_from_the_beginning(model, store, calls, caplog):
    resumable = with_checkpoints(model, store, "model", 1)
    reference = sample(resumable)
    (entry,) = store.folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:-7])
    assert torch.equal(sample(resumable), reference)
    assert "starts from the beginning" in caplog.text


def test_full_disk_does_not_stop_the_run(model, tmp_path, caplog):
    (tmp_path / "file").touch()
    store = CheckpointStore(tmp_path / "file" / "folder")
    assert torch.equal(sample(with_checkpoints(model, store, "model", 1)), sample(model))
    assert "is not saved" in caplog.text


def test_time_left_is_reported_and_steps_are_counted_on(model, store, calls, monkeypatch):
    shown, awake = [], []
    monkeypatch.setattr(comfy_runs, "show_at_running_node", shown.append)
    monkeypatch.setattr(comfy_runs, "awake", lambda: _Recorder(awake))
    watched = comfy_runs.watch_runs(comfy_runs.watch_runs(model.clone()))
    resumable = with_checkpoints(watched, store, "model", 1)
    stop_at(calls, 5)
    with pytest.raises(Stop):
        sample(resumable, callback=lambda *_: None)
    assert awake == ["begin", "end"]
    stop_at(calls, None)
    shown.clear()
    sample(resumable, callback=lambda *_: None)
    assert [text.split(",")[0] for text in shown][-1] == f"step {STEPS} of {STEPS}"
    assert len(shown) < STEPS and all("left" in text for text in shown)
    assert awake == ["begin", "end"] * 2


class _Recorder:
    def __init__(self, events):
        self.events = events

    def __enter__(self):
        self.events.append("begin")

    def __exit__(self, *_):
        self.events.append("end")


@pytest.mark.slow
def test_kill_at_any_moment_loses_nothing(model, store, tmp_path):
    """Thirty processes die by SIGKILL at random moments; those after them finish the work, with the same result."""
    reference = sample(model)
    chance = random.Random(5)
    result = tmp_path / "result.pt"
    begin = time.monotonic()
    sample(model)
    length = time.monotonic() - begin
    kills = finished = 0
    while kills < 30:
        process = os.fork()
        if process == 0:
            try:
                for bar in (tqdm.std.tqdm, tqdm.auto.tqdm):  # their lock is shared with the parent, which would wait
                    bar.set_lock(threading.RLock())  # for ever if this process were killed while it holds it
                torch.save(sample(with_checkpoints(model, store, "model", 1)), result)
                os._exit(0)
            finally:
                os._exit(1)
        time.sleep(chance.uniform(0, length))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            kills += 1
        elif os.WEXITSTATUS(status) == 0:
            finished += 1
            assert torch.equal(torch.load(result), reference)
            for entry in store.folder.iterdir():
                entry.unlink()
    told = []
    assert torch.equal(sample(with_checkpoints(model, store, "model", 1, told.append)), reference)
    assert told or finished
    names = [entry.name for entry in store.folder.iterdir()]
    assert len(names) == 1 and not names[0].startswith(".")


def test_node_switches_checkpoints_on(model, tmp_path, monkeypatch, calls):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    prompt = {
        "1": {"class_type": "MPSLoadDiffusionModel", "inputs": {"unet_name": "a"}},
        "2": {"class_type": "MPSCheckpointSampling", "inputs": {"model": ["1", 0], "every": 1}},
        "3": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "seed": 1}},
    }
    monkeypatch.setattr(CheckpointSampling, "hidden", SimpleNamespace(unique_id="2", prompt=prompt))
    assert set(ancestors(prompt, "2")) == {"1", "2"}
    (resumable,) = CheckpointSampling.execute(model, 1).result
    stop_at(calls, 5)
    with pytest.raises(Stop):
        sample(resumable)
    (entry,) = default_store().folder.iterdir()
    assert entry.parent == tmp_path / "apple-silicon-video" / "checkpoints"
    prompt["3"]["inputs"]["seed"] = 2
    stop_at(calls, None)
    (again,) = CheckpointSampling.execute(model, 1).result
    reference = sample(model)
    calls.count = 0
    assert torch.equal(sample(again), reference)
    prompt["1"]["inputs"]["unet_name"] = "b"
    (other,) = CheckpointSampling.execute(model, 3).result
    stop_at(calls, 6)
    with pytest.raises(Stop):
        sample(other)
    (new,) = set(default_store().folder.iterdir()) - {entry}
    assert default_store().get(new.stem).step == 3  # of the four that were reported


def test_checkpoints_of_another_layout_are_removed(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    save_value(store.path("old"), {"step": 1})
    assert store.get("old") is None and not store.path("old").exists()
    assert "starts from the beginning" in caplog.text


def test_added_noise_is_not_exact():
    options = [{}, {"s_churn": 0.5}, {"eta": 1.0}]
    made = [comfy.samplers.ksampler("euler", option) for option in options]
    assert [comfy_checkpoints.is_exact(sampler) for sampler in made] == [True, False, False]


def test_store_keeps_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, entries=3)
    for number in range(5):
        store.put(str(number), Checkpoint(1, 2, torch.zeros(100), None, "sample_euler", ""))
        os.utime(store.path(str(number)), (1000 + number, 1000 + number))
    (tmp_path / ".x.safetensors.123.partial").touch()
    store.put("5", Checkpoint(1, 2, torch.zeros(100), None, "sample_euler", ""))
    assert {path.stem for path in tmp_path.iterdir()} == {"3", "4", "5"}
    store.size = 2 * store.path("5").stat().st_size
    store.put("5", Checkpoint(2, 2, torch.zeros(100), None, "sample_euler", ""))
    assert {path.stem for path in tmp_path.iterdir()} == {"4", "5"}
    assert store.get("5").finished and not store.get("4").finished and store.get("0") is None
