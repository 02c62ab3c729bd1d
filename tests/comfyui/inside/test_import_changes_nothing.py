"""Off Apple Silicon, loading the pack replaces no function of torch, ComfyUI or anything else that was there before."""

import asyncio
import importlib
import inspect
import pkgutil
import sys

import apple_silicon_video
import torch
from apple_silicon_video import comfy_entrypoint

PACK = "apple_silicon_video"


def functions():
    """Everything callable in the modules loaded now, and in their classes: (module, name[, attribute]) -> object."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.split(".")[0] in (PACK, __name__.split(".")[0]):
            continue
        for name, value in list(vars(module).items()):
            if callable(value):
                found[module_name, name] = value
            if inspect.isclass(value) and value.__module__ == module_name:
                found |= {(module_name, name, key): attribute for key, attribute in vars(value).items()}
    return found


def load_everything():
    """The pack's modules, its nodes, and what it does when ComfyUI has loaded it, with every patch asked for."""
    extension = asyncio.run(comfy_entrypoint())
    asyncio.run(extension.on_load())
    assert asyncio.run(extension.get_node_list())
    for folder in ("mps_patches", "nodes", "memory", "video", "quantization"):
        package = importlib.import_module(f"{PACK}.{folder}")
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    install = importlib.import_module(f"{PACK}.mps_patches.install")
    table = importlib.import_module(f"{PACK}.mps_patches.registry").DEFECTS
    assert install.apply(choices=dict.fromkeys(table, "on")) == install.Report()


def test_no_function_is_replaced():
    assert apple_silicon_video.__file__ and not torch.backends.mps.is_available()
    before = functions()
    for known in (
        ("torch.nn.functional", "interpolate"),
        ("torch", "Tensor", "__pow__"),
        ("comfy.ldm.modules.attention", "attention_pytorch"),
    ):
        assert known in before
    load_everything()
    after = functions()
    changed = sorted(str(key) for key, value in before.items() if after.get(key, value) is not value)
    gone = sorted(str(key) for key in before if key not in after)
    overriding = sorted(key for key in after if key[:2] == ("torch", "Tensor") and key not in before)
    assert (changed, gone, overriding) == ([], [], [])
