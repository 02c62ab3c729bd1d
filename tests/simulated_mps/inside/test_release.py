"""Every stage of the workflows, and Free Memory behind it: live bytes are then what the plan says, to the byte.

What remains is nothing but the tables that decode quantised weights, which the decoders keep for each device.
"""

import gc
import sys
from types import SimpleNamespace

import core_tree
import pytest
import simulated_mps as sim
import torch

sys.path.insert(0, core_tree.folder())

import comfy.sd
import folder_paths
import full_size_sampling as full
from apple_silicon_video.memory.comfy_models import free_memory, loaded_models
from apple_silicon_video.nodes.folders import register_gguf_folders
from apple_silicon_video.nodes.memory import FreeMemory
from apple_silicon_video.nodes.prompts import EncodePrompts
from apple_silicon_video.nodes.video import SaveVideo
from apple_silicon_video.quantization import block_ops, comfy_loader, iq_quants, mapped_pages, scaled_formats
from full_size_sampling import blank, load_small, management, sample
from small_models import ENCODERS, encoder_weights, wan_lora, write_encoder_gguf, write_vae

import nodes

HIGH, LOW = "wan2.2-t2v-a14b-high", "wan2.2-t2v-a14b-low"
SIZE = (64, 64, 9)
TABLES = (
    block_ops.constant,
    iq_quants._grid,
    iq_quants._signs,
    iq_quants._even_signs,
    scaled_formats._table,
    scaled_formats._powers_of_two,
)
KIB, MIB = 1 << 10, 1 << 20
TABLE = tuple(map(int, sim.installed()["torch"].split(".")[:2]))


@pytest.fixture(autouse=True)
def nothing_before(monkeypatch):
    """No tables, no models; memory without end, so that core unloads nothing by itself."""
    forget_tables()
    monkeypatch.setattr(management, "get_free_memory", full.free_memory(lambda: 1 << 50))
    monkeypatch.setattr(FreeMemory, "hidden", SimpleNamespace(unique_id=None))  # what the executor sets
    monkeypatch.setattr(EncodePrompts, "hidden", SimpleNamespace(unique_id=None))
    monkeypatch.setattr(SaveVideo, "hidden", SimpleNamespace(unique_id="1", prompt=None, extra_pnginfo=None))
    with torch.inference_mode():
        yield
    full.leave_nothing()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Private folders of ComfyUI with a text encoder in them."""
    register_gguf_folders()
    for name in ("output", "temp", "user"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name), raising=False)
        monkeypatch.setattr(folder_paths, f"get_{name}_directory", lambda path=str(tmp_path / name): path)
    shape = ENCODERS["umt5"]
    write_encoder_gguf(tmp_path / "umt5.gguf", shape, encoder_weights(shape, "Q5_K_M"), "Q5_K_M")
    write_vae(tmp_path / "vae.safetensors")
    entry = folder_paths.folder_names_and_paths["text_encoders"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], entry[1]))
    folder_paths.filename_list_cache.clear()
    return tmp_path


def live():
    gc.collect()
    return sim.stats().live


def forget_tables():
    for table in TABLES:
        table.cache_clear()
    gc.collect()


def bytes_on_mps(patcher):
    """What the plan says of a loaded model: each of its tensors, once."""
    storages = {}
    for module in patcher.model.modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            held = getattr(tensor, "blocks", tensor)
            if held.device.type == "mps":
                storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(storages.values())


class Stages:
    """The stages in their order; each returns what the next one takes. Nothing of them is kept on the device."""

    def __init__(self, folder):
        self.folder = folder
        self.clip = comfy_loader.load_text_encoder(folder / "umt5.gguf")
        self.experts = {name: load_small(folder, name) for name in (HIGH, LOW)}
        self.with_lora = comfy.sd.load_lora_for_models(self.experts[LOW], None, wan_lora(LOW, "lora", seed=1), 1.0, 0)[
            0
        ]
        self.vae = comfy_loader.load_vae(folder / "vae.safetensors")
        self.latent = blank(HIGH, *SIZE)
        self.images = None

    def encode_prompts(self):
        EncodePrompts.execute("umt5.gguf", "wan", "A red fox.", "blurry", keep_on_disk=False)

    def text_encoder(self):
        nodes.CLIPTextEncode().encode(self.clip, "A red fox.")

    def sampling_high(self):
        self.latent = sample(self.experts[HIGH], HIGH, self.latent, numbers=True)

    def sampling_low(self):
        self.latent = sample(self.with_lora, LOW, self.latent, first=False, numbers=True)

    def decoding(self):
        (self.images,) = nodes.VAEDecode().decode(self.vae, self.latent)

    def saving(self):
        SaveVideo.execute(16.0, "clip", "h264-mp4", "standard", images=self.images)
        assert list((self.folder / "output").glob("clip*.mp4"))


ON_THE_DEVICE = {"text_encoder", "sampling_high", "sampling_low", "decoding"}
ORDER = ("encode_prompts", "text_encoder", "sampling_high", "sampling_low", "decoding", "saving")


if TABLE in ((2, 10), (2, 13)):

    def test_after_every_stage(folders):
        stages = Stages(folders)
        remaining, drivers = {}, {}
        for name in ORDER:
            getattr(stages, name)()
            held = live()
            anything, report = FreeMemory.execute(True, True, anything=stages.latent).result
            assert anything is stages.latent
            assert report.startswith("Unloaded: nothing") == (name not in ON_THE_DEVICE)
            remaining[name] = sim.stats().live
            drivers[name] = torch.mps.driver_allocated_memory()
            if name in ON_THE_DEVICE:
                assert held > remaining[name] + 64 * KIB
            elif name == "encode_prompts":
                assert held == remaining[name]  # it has released the encoder itself
            forget_tables()
            assert sim.stats().live == 0, f"{sim.stats().live} bytes beside the tables after {name}"
        print(remaining, drivers)
        assert max(remaining.values()) < KIB
        assert max(drivers.values()) < MIB  # the allocator's pages of the tables


if TABLE == (2, 13):  # what follows does not depend on the table

    def test_the_second_run_leaves_what_the_first_left(folders):
        levels = []
        stages = Stages(folders)
        for _ in range(2):
            stages.latent = blank(HIGH, *SIZE)
            for name in ORDER:
                getattr(stages, name)()
            free_memory()
            levels.append((sim.stats().live, torch.mps.driver_allocated_memory()))
        assert len(set(levels)) == 1

    def test_prompts_are_encoded_without_the_last_run_s_model(folders):
        """The second run with other words: an expert and the encoder would be on the device together."""
        stages = Stages(folders)
        stages.encode_prompts()
        sim.reset()
        stages.encode_prompts()
        alone = sim.stats().peak
        stages.sampling_low()
        resident = live()
        assert resident > 4 * MIB
        sim.reset()
        stages.encode_prompts()
        assert loaded_models() == []
        assert sim.stats().peak == max(alone, resident)

    def test_what_is_chosen_is_released(folders):
        """Patched models alone; then all; a model that stays keeps exactly its tensors."""
        stages = Stages(folders)
        plain, patched = stages.experts[HIGH], stages.with_lora
        management.load_models_gpu([plain, patched])
        assert len(loaded_models()) == 2
        sizes = {patcher: bytes_on_mps(patcher) for patcher in (plain, patched)}
        assert min(sizes.values()) > 1 << 20 and live() > sum(sizes.values())  # the LoRA's factors too
        for unload, patches in ((False, False), (False, True), (True, False)):
            before = live()
            text = FreeMemory.execute(unload, True, drop_patches=patches, drop_caches="keep").result[1]
            after = live()
            if not unload and not patches:
                assert after == before and text.startswith("Unloaded: nothing\nMPS driver")
            elif patches:
                assert after == sizes[plain] == bytes_on_mps(plain) and bytes_on_mps(patched) == 0
            else:
                assert after == 0
        sample(patched, LOW, blank(LOW, *SIZE), numbers=True)

    def test_weights_kept_for_scheduled_loras_are_forgotten(folders):
        """What core stores when a hook patches a dense weight, and would keep until the next sampling."""
        stages = Stages(folders)
        patcher = stages.experts[HIGH]
        management.load_models_gpu([patcher])
        start = live()
        stored = {"diffusion_model.head.head.bias": (torch.zeros(1 << 20, device="mps"), torch.device("mps"))}
        patcher.cached_hook_patches["a hook"] = stored
        del stored
        assert live() == start + (4 << 20)
        free_memory(models=False, patches=True)
        assert live() == start


LINES = [
    "Pages of model files in RAM: dropped for 2 files",
    "Stored results of nodes: forgotten when this run ends",
]


@pytest.mark.parametrize("caches", ["keep", "files", "everything"])
def test_caches(monkeypatch, caches):
    dropped, flags = [], []
    monkeypatch.setattr(mapped_pages, "release_all", lambda: dropped.append(1) or 2)
    monkeypatch.setattr("apple_silicon_video.memory.comfy_server._instance", lambda: queue)
    queue = SimpleNamespace(prompt_queue=SimpleNamespace(set_flag=lambda *flag: flags.append(flag)))
    lines = free_memory(caches=caches).text().splitlines()
    told = [line for line in lines if line in LINES]
    assert told == LINES[: ["keep", "files", "everything"].index(caches)]
    assert len(dropped) == (caches != "keep") and flags == [("free_memory", True)] * (caches == "everything")
