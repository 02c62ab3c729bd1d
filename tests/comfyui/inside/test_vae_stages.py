"""Streamed and tiled decoding and encoding inside ComfyUI, against core's own: Wan 2.1 and 2.2, small widths, CPU."""

import ctypes
import gc
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import comfy.ldm.wan.vae2_2
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import psutil
import pytest
import torch
from apple_silicon_video.memory import comfy_vae_stages as stages
from apple_silicon_video.memory import vae_tiles
from apple_silicon_video.memory.telemetry import MemorySnapshot
from apple_silicon_video.memory.vae_canvas import FileCanvas, ScratchError, TensorCanvas
from apple_silicon_video.memory.vae_streaming import wan_kind
from apple_silicon_video.memory.vae_tiles import GIB, BudgetError, make_tiling, plan_tiles
from apple_silicon_video.nodes.vae import VAEDecode, VAEDecodeToVideo, VAEEncode
from apple_silicon_video.tests.unit.video_clips import tone
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.reader import FrameSelection, open_video
from small_models import write_vae

import nodes

KINDS = ("wan2.1", "wan2.2")
CHANNELS = {"wan2.1": 16, "wan2.2": 48}
STRIDE = {"wan2.1": 8, "wan2.2": 16}
M_MMAP_THRESHOLD = -3
SIZES = [(1, 6, 4), (2, 5, 7), (3, 4, 6), (5, 7, 5)]  # latent frames, rows, columns


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """(kind, dtype) -> core's VAE object; of Wan 2.2 with 16 channels in place of its 160 and 256."""
    small = tmp_path_factory.mktemp("vae")
    made = {}

    def make(kind, dtype=torch.float32):
        if (kind, dtype) not in made:
            made[kind, dtype] = wan_2_1(small, dtype) if kind == "wan2.1" else wan_2_2(dtype)
        return made[kind, dtype]

    return make


def wan_2_1(folder, dtype):
    path = write_vae(folder / "vae.safetensors")
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)), dtype=dtype)


def wan_2_2(dtype):
    original = comfy.ldm.wan.vae2_2.WanVAE

    def narrow(**options):
        return original(**options | {"dim": 16, "dec_dim": 16})

    torch.manual_seed(3)
    model = narrow(z_dim=48, temperal_downsample=[False, True, True])
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and not name.endswith("gamma"):
            weight.data = torch.randn(weight.shape) / weight[0].numel() ** 0.5
        elif not name.endswith("gamma"):
            weight.data = torch.randn(weight.shape) * 0.05
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.ldm.wan.vae2_2, "WanVAE", narrow)
        return comfy.sd.VAE(sd=model.state_dict(), dtype=dtype)


def latent(kind, frames, rows, columns, batch=1):
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, CHANNELS[kind], frames, rows, columns, generator=generator)


def pictures(frames, height, width, channels=3):
    return torch.rand(frames, height, width, channels, generator=torch.Generator().manual_seed(frames))


def flat(images):
    return images.reshape(-1, *images.shape[-3:])


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_decoding_is_core_s_bit_for_bit(vaes, kind, size):
    vae = vaes(kind)
    samples = latent(kind, *size)
    assert torch.equal(stages.decode(vae, samples), flat(vae.decode(samples)))


@pytest.mark.parametrize("frames", [1, 2, 8, 17])
@pytest.mark.parametrize("kind", KINDS)
def test_streamed_encoding_is_core_s_bit_for_bit(vaes, kind, frames):
    vae = vaes(kind)
    images = pictures(frames, 5 * 16 + 3, 64, 4)
    assert torch.equal(stages.encode(vae, images), vae.encode(images))


@pytest.mark.parametrize(("kind", "dtype"), [("wan2.1", torch.float16), ("wan2.2", torch.bfloat16)])
def test_half_precision(vaes, kind, dtype):
    vae = vaes(kind, dtype)
    samples = latent(kind, 3, 4, 4)
    assert torch.equal(stages.decode(vae, samples), flat(vae.decode(samples)))
    images = pictures(9, 64, 64)
    assert torch.equal(stages.encode(vae, images), vae.encode(images))


def test_batches_are_decoded_one_after_the_other(vaes):
    vae = vaes("wan2.1")
    samples = latent("wan2.1", 2, 4, 4, batch=3)
    alone = [stages.decode(vae, one) for one in samples.split(1)]
    assert torch.equal(stages.decode(vae, samples), torch.cat(alone))


def budget_for(vae, operation, width, height, frames, tiles):
    """GiB that just suffice for so many tiles."""
    kind = wan_kind(vae.first_stage_model)
    size = operation, kind, width, height, frames
    for step in range(1, 1000):
        try:
            if len(plan_tiles(*size, vae.vae_dtype, step << 18)) <= tiles:
                return (step << 18) / GIB
        except BudgetError:
            continue
    raise AssertionError


def steps(error, dim):
    """How much the error changes from each line of points to the next one, on average."""
    return error.diff(dim=dim).abs().mean([other for other in range(error.ndim) if other != dim])


@pytest.mark.parametrize(("kind", "columns"), [("wan2.1", 48), ("wan2.2", 28)])
def test_tiles_have_no_visible_seams(vaes, monkeypatch, kind, columns):
    """The error may change no more across the tiles' border than it does elsewhere; without an overlap it does."""
    vae, stride, rows = vaes(kind), STRIDE[kind], 8
    samples = torch.nn.functional.avg_pool3d(latent(kind, 1, rows, columns), (1, 3, 3), 1, (0, 1, 1)) * 2
    whole = stages.decode(vae, samples)
    assert whole.std() > 0.01

    def border_and_rest(overlap):
        tiling = make_tiling(rows, columns, 1, 2, overlap)
        with monkeypatch.context() as patch:
            patch.setattr(stages, "_prepare", lambda *inputs: tiling)
            error = stages.decode(vae, samples) - whole
        first, last = tiling.columns[1].first * stride - 2, tiling.columns[0].last * stride + 1
        changes = steps(error, 2)
        return changes[first:last], torch.cat((changes[2:first], changes[last:-2]))

    border, rest = border_and_rest(vae_tiles.OVERLAP[stride])
    assert border.max() < rest.max() and border.mean() < 1.4 * rest.mean()
    border, rest = border_and_rest(0)
    assert border.mean() > 1.8 * rest.mean()


@pytest.mark.parametrize(("kind", "columns"), [("wan2.1", 40), ("wan2.2", 32)])
def test_tiles_of_the_encoder_blend(vaes, kind, columns):
    vae, stride = vaes(kind), STRIDE[kind]
    images = torch.nn.functional.avg_pool2d(pictures(5, 8 * stride, columns * stride).movedim(-1, 1), 9, 1, 4)
    images = images.movedim(1, -1)
    whole = stages.encode(vae, images)
    tiled = stages.encode(vae, images, budget_for(vae, "encode", columns * stride, 8 * stride, 5, 2))
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    error = tiled - whole
    assert error.pow(2).mean().sqrt() < 0.05 * whole.std()
    assert steps(error, 4).max() < 0.25 * steps(whole, 4).mean()


@pytest.mark.parametrize(("height", "width", "overlap"), [(90, 160, 8), (44, 80, 6), (60, 104, 8), (7, 33, 6)])
def test_the_tiles_contributions_add_up_to_one(height, width, overlap):
    grids = list(vae_tiles._candidates(height, width, overlap))
    assert len(grids[0]) == 1 and len(grids) > 1
    for tiling in grids[:: max(1, len(grids) // 12)]:
        total = torch.zeros(height * 8, width * 8)
        for row, column in tiling:
            part = total[row.first * 8 : row.last * 8, column.first * 8 : column.last * 8]
            part += tiling.weights(row, column, 8)
        assert (total - 1).abs().max() < 1e-6
        for spans in (tiling.rows, tiling.columns):
            assert all(one.last - other.first >= overlap for one, other in pairwise(spans))


def test_both_canvases_hold_the_same(tmp_path):
    tiling, shape = make_tiling(9, 13, 2, 3, 2), (3, 9, 13, 3)
    tile = torch.rand(shape)
    memory = TensorCanvas(torch.zeros(shape))
    with FileCanvas(shape, tmp_path) as disk:
        for canvas in (memory, disk):
            for row, column in tiling:
                part = tile[:, row.first : row.last, column.first : column.last]
                canvas.add(0, row, column, part * tiling.weights(row, column)[..., None])
        assert torch.allclose(memory.frames(1, 2), tile[1:], atol=1e-6)
        assert torch.allclose(disk.frames(1, 2), tile[1:], atol=2 / 65535)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_anything_is_decoded(tmp_path, monkeypatch):
    free = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    with pytest.raises(ScratchError, match=r"needs 2\.5 GiB .* and 0\.0 are free: make room"):
        FileCanvas((481, 720, 1280, 3), tmp_path)


def test_budgets_that_nothing_fits_in_are_refused_before_loading(vaes, monkeypatch):
    vae = vaes("wan2.1")
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", None)
    with pytest.raises(
        BudgetError, match=r"A budget of 0\.00 GiB is too small to decode 512x512: enter at least 0\.\d"
    ):
        stages.decode(vae, latent("wan2.1", 3, 64, 64), 1e-4)
    with pytest.raises(BudgetError, match=r"too small to encode 256x256"):
        stages.encode(vae, pictures(5, 256, 256), 1e-4)


def test_the_budget_is_what_is_free():
    snapshot = MemorySnapshot(available=10 * GIB, recommended=12 * GIB, live=4 * GIB)
    assert vae_tiles.automatic_budget(snapshot, GIB) == int(8 * GIB * vae_tiles.AUTOMATIC_SHARE)
    assert vae_tiles.automatic_budget(snapshot, 5 * GIB) == int(5 * GIB * vae_tiles.AUTOMATIC_SHARE)
    assert vae_tiles.automatic_budget(MemorySnapshot()) is None
    assert vae_tiles.automatic_budget(MemorySnapshot(recommended=1, live=2)) == 0


def test_with_next_to_nothing_free_the_smallest_tiles_are_taken(vaes, monkeypatch, caplog):
    vae = vaes("wan2.1")
    monkeypatch.setattr(stages, "take_snapshot", lambda: MemorySnapshot(available=1 << 20))
    images = stages.decode(vae, latent("wan2.1", 2, 4, 28))
    assert images.shape == (5, 32, 224, 3) and images.isfinite().all()
    assert "Memory is short: A budget of 0.00 GiB" in caplog.text and "smallest tiles" in caplog.text


def test_other_vaes_and_other_latents_go_core_s_way(vaes):
    images, asked = torch.rand(2, 8, 8, 3), []

    class Other:
        latent_dim = 2
        first_stage_model = torch.nn.Linear(1, 1)

        def decode(self, samples):
            asked.append(samples)
            return images

        encode = decode

    vae, samples = Other(), torch.zeros(2, 4, 1, 1)
    assert stages.decode(vae, samples) is images and stages.encode(vae, images) is images
    taken = []
    stages.decode_to(vae, samples, 0.0, lambda first, frames: taken.append((first, frames)), "unused")
    assert taken[0][0] == 0 and taken[0][1] is images and asked == [samples, images, samples]
    assert stages.stream_vae(vae, "on") is vae


def to_video(vae, samples, **inputs):
    hidden = SimpleNamespace(prompt={"1": {"x": 2}}, extra_pnginfo={"workflow": {"nodes": [1]}})
    node = type("Node", (VAEDecodeToVideo,), {"hidden": hidden})
    plain = {"fps": 16.0, "filename_prefix": "clip", "format": "h264-mp4", "quality": "best"}
    return node.execute(samples={"samples": samples}, vae=vae, **plain | inputs)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("tiles", [1, 2])
def test_the_video_holds_what_the_images_show(vaes, folders, tiles):
    vae = vaes("wan2.1")
    samples = latent("wan2.1", 3, 4, 28) * 0.5
    budget = budget_for(vae, "decode", 224, 32, 9, tiles)
    output = to_video(vae, samples, audio=tone(5, 44100), budget_gib=budget)
    path = Path(output.args[1])
    assert files(folders["output"]) == ["clip_00001_.mp4"] and files(folders["temp"]) == []
    with open_video(str(path)) as reader:
        assert (reader.info.width, reader.info.height, reader.info.fps) == (224, 32, 16)
        found = torch.stack(list(reader.frames(range(9))))
        assert reader.audio() is not None
    assert output.args[0].get_components().images.shape[0] == 9
    images = VAEDecode.execute({"samples": samples}, vae, budget).args[0]
    assert (found - images).abs().mean() < 0.02


def test_formats_without_a_video_of_their_own_show_a_copy(vaes, folders):
    output = to_video(vaes("wan2.1"), latent("wan2.1", 2, 4, 4), format="prores422-mov")
    assert files(folders["output"]) == ["clip_00001_.mov"]
    assert files(folders["temp"]) == ["apple_silicon_video/preview_00001_.mp4"]
    assert output.ui.as_dict()["images"][0]["filename"] == "preview_00001_.mp4"


def test_an_interruption_and_bad_input_leave_nothing(vaes, folders, monkeypatch):
    vae, done = vaes("wan2.1"), []

    def interrupted():
        done.append(1)
        if len(done) > 6:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        to_video(vae, latent("wan2.1", 5, 4, 4))
    assert files(folders["output"]) == [] and not vae.first_stage_model.decoder._forward_hooks
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        VAEEncode.execute(pictures(9, 32, 32), vae)
    assert not vae.first_stage_model.encoder._forward_pre_hooks
    with pytest.raises(VideoError, match="fps is 0"):
        to_video(vae, latent("wan2.1", 1, 4, 4), fps=0)
    with pytest.raises(VideoError, match="leads outside"):
        monkeypatch.undo()
        monkeypatch.setattr(folder_paths, "output_directory", str(folders["output"]))
        to_video(vae, latent("wan2.1", 1, 4, 4), filename_prefix="../../out")


def test_progress_and_previews(vaes, folders, monkeypatch):
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **more: shown.append(
        (value, total, preview is not None)
    ))  # fmt: skip
    vae = vaes("wan2.1")
    to_video(vae, latent("wan2.1", 5, 4, 4))
    assert shown[-1][:2] == (17, 17) and [value for value, _, _ in shown] == sorted(value for value, _, _ in shown)
    assert any(preview for _, _, preview in shown)
    shown.clear()
    VAEDecode.execute({"samples": latent("wan2.1", 2, 4, 28)}, vae, budget_for(vae, "decode", 224, 32, 5, 2))
    assert shown[-1][:2] == (10, 10)
    shown.clear()
    VAEEncode.execute(pictures(9, 32, 224), vae, budget_for(vae, "encode", 224, 32, 9, 2))
    values = [value for value, _, _ in shown]
    assert shown[-1][:2] == (18, 18) and values == sorted(values) and values[0] == 0


@pytest.fixture
def freed_blocks_leave():
    """glibc gives blocks of 64 KiB and more back at once, so that resident memory is what is in use."""
    if sys.platform == "linux":
        assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)


def resident(action):
    """By how much the process grows at most while frames pass."""
    gc.collect()
    process, most = psutil.Process(), 0
    before = process.memory_info().rss

    def watch():
        nonlocal most
        most = max(most, process.memory_info().rss - before)

    action(watch)
    return most


def test_memory_does_not_grow_with_the_length(vaes, folders, freed_blocks_leave, monkeypatch):
    """400 more frames of 224x32 would be 33 MiB as IMAGE; the process may grow by 8 more than for 81 frames."""
    vae = vaes("wan2.1")
    budget = budget_for(vae, "decode", 224, 32, 481, 2)
    original = comfy.model_management.throw_exception_if_processing_interrupted

    def run(frames):
        def decode(watch):
            monkeypatch.setattr(
                comfy.model_management, "throw_exception_if_processing_interrupted", lambda: (watch(), original())
            )
            output = to_video(vae, latent("wan2.1", (frames + 3) // 4, 4, 28), budget_gib=budget, quality="small")
            with open_video(output.args[1]) as reader:
                assert len(reader.indices(FrameSelection())) == frames

        return resident(decode)

    run(5)
    short, long = run(81), run(481)
    assert long - short < 8 << 20, f"{short >> 20} MiB for 81 frames, {long >> 20} MiB for 481"


@pytest.mark.parametrize("kind", KINDS)
def test_a_streaming_vae_gives_core_s_nodes_the_same(vaes, kind):
    vae = vaes(kind)
    streamed = stages.stream_vae(vae, "on")
    assert streamed is not vae and stages.stream_vae(vae) is vae and stages.stream_vae(streamed, "on") is streamed
    samples, images = latent(kind, 3, 4, 6), pictures(9, 64, 64)
    assert torch.equal(nodes.VAEDecode().decode(streamed, {"samples": samples})[0], flat(vae.decode(samples)))
    encoded = nodes.VAEEncode().encode(streamed, images)[0]["samples"]
    assert torch.equal(encoded, vae.encode(images))
    tiled = nodes.VAEDecodeTiled().decode(streamed, {"samples": samples}, 512, 64)[0]
    assert torch.equal(tiled, nodes.VAEDecodeTiled().decode(vae, {"samples": samples}, 512, 64)[0])


def test_a_streaming_vae_takes_tiles_when_memory_is_short(vaes, monkeypatch, caplog):
    vae = vaes("wan2.1")
    streamed = stages.stream_vae(vae, "on")
    samples, images = latent("wan2.1", 2, 4, 28, batch=2), pictures(5, 32, 224)
    whole, encoded = vae.decode(samples), vae.encode(images)
    monkeypatch.setattr(stages, "take_snapshot", lambda: MemorySnapshot(available=1 << 20))
    with caplog.at_level("INFO"):
        found = streamed.decode(samples)
        assert "tiles of" in caplog.text
    assert found.shape == whole.shape and not torch.equal(found, whole)
    assert torch.allclose(flat(found), stages.decode(vae, samples), atol=1e-5)
    assert (streamed.encode(images) - encoded).pow(2).mean().sqrt() < 0.1 * encoded.std()


def test_the_model_gets_its_own_methods_back(vaes):
    vae = vaes("wan2.1")
    streamed = stages.stream_vae(vae, "on")
    streamed.decode(latent("wan2.1", 1, 4, 4))
    streamed.patcher.unpatch_model()
    assert vae.first_stage_model.decode.__func__ is type(vae.first_stage_model).decode
    assert streamed.memory_used_decode((1, 16, 21, 60, 104), torch.float16) > 100 * 832 * 480
