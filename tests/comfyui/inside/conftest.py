"""These tests run inside a process that has imported a real ComfyUI (see ../test_inside.py)."""

import os
import sys

import pytest
import torch

TREE = os.environ["COMFYUI_DIR"]

torch.set_num_threads(1)
sys.path.insert(0, TREE)
_arguments = sys.argv
sys.argv = ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402

sys.argv = _arguments
import folder_paths  # noqa: E402

import nodes  # noqa: E402, F401


@pytest.fixture
def model_folders(tmp_path):
    """Empty model folders in place of ComfyUI's own: name -> path; lists are changed in place, as names share them."""
    folders, before = {}, {}
    for name in ("diffusion_models", "text_encoders", "vae", "loras"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        paths = folder_paths.folder_names_and_paths[name][0]
        before[name] = paths[:]
        paths[:] = [str(folders[name])]
    folder_paths.filename_list_cache.clear()
    yield folders
    for name, paths in before.items():
        folder_paths.folder_names_and_paths[name][0][:] = paths
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty folders in place of ComfyUI's output, temp and user folders."""
    paths = {name: tmp_path / name for name in ("output", "temp", "user")}
    for name, path in paths.items():
        path.mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(path))
    return paths
