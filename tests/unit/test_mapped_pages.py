"""Pages of mapped files that the device holds a copy of go back to the system; ordinary memory is never touched."""

import gc

import psutil
import torch
from apple_silicon_video.quantization import mapped_pages
from apple_silicon_video.quantization.gguf import GGUFFile
from apple_silicon_video.quantization.gguf_writer import GGUFWriter
from apple_silicon_video.quantization.safetensors_file import SafetensorsFile
from apple_silicon_video.quantization.scaled_formats import SCALED_FORMATS
from apple_silicon_video.quantization.tensor import QuantizedWeight
from safetensors.torch import save_file

MIB = 1 << 20


def resident():
    return psutil.Process().memory_info().rss


def big_file(folder, megabytes=128):
    path = folder / "big.safetensors"
    codes = torch.arange(megabytes * MIB, dtype=torch.int32).to(torch.uint8).view(megabytes, MIB)
    save_file({"weight": codes.view(torch.float8_e4m3fn), "small": torch.ones(3)}, path)
    return path, codes


def test_a_weight_that_moved_leaves_no_pages_behind(tmp_path):
    path, codes = big_file(tmp_path)
    file = SafetensorsFile(path)
    weight = QuantizedWeight(file.raw("weight"), SCALED_FORMATS["F8_E4M3"], tuple(codes.shape), torch.float16)
    before = resident()
    assert torch.equal(weight.blocks.view(codes.shape), codes)
    assert resident() - before > 100 * MIB
    away = weight.on_device(torch.device("meta"))
    assert resident() - before < 16 * MIB
    back = away.on_device(torch.device("cpu"))
    assert torch.equal(back.blocks.view(codes.shape), codes)


def test_gguf_files_too(tmp_path):
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path)
    writer.metadata("general.architecture", "wan")
    writer.tensor("a", (64, 4096), "F32", torch.arange(64 * 4096.0))
    writer.write()
    raw = GGUFFile(path).raw("a")
    before = raw.clone()
    assert mapped_pages.release(raw) > 60 * 4096 * 4
    assert torch.equal(raw, before)


def test_memory_that_is_no_mapped_file_is_left_alone(tmp_path):
    own = torch.randint(0, 256, (8 * MIB,), dtype=torch.uint8)
    before = own.clone()
    assert mapped_pages.release(own) == 0
    assert torch.equal(own, before)
    path, _ = big_file(tmp_path, 4)
    tensor = SafetensorsFile(path).tensor("weight").view(torch.uint8)
    address = tensor.data_ptr()
    assert mapped_pages.release(tensor) > 3 * MIB
    assert mapped_pages.release(tensor[0, :100]) == 0
    del tensor
    gc.collect()
    assert all(not start <= address < stop for start, stop in mapped_pages._mappings)


def test_only_whole_pages_of_the_tensor_go(tmp_path):
    """What was written to a neighbour on the same page stays."""
    path = tmp_path / "two.safetensors"
    save_file({"a": torch.zeros(5000, dtype=torch.uint8), "b": torch.zeros(50_000, dtype=torch.uint8)}, path)
    file = SafetensorsFile(path)
    file.tensor("a").fill_(7)
    mapped_pages.release(file.raw("b"))
    assert (file.tensor("a") == 7).all()
