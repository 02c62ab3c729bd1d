"""The shipped workflows with small models in the places of the large ones, for servers that run them to their end."""

import shutil
from pathlib import Path

import apple_silicon_video.tests.scripts_path  # noqa: F401
from small_models import make_set, wan_weights, write_wan_gguf

import demo  # isort: skip

SMALL_5B = "small-wan2.2-ti2v-5b.gguf"
NARROW_VAE = Path(__file__).parent / "narrow_vae.py"
SIZE = {"width": 64, "height": 64, "length": 9, "frame_limit": 9}


def make_models(folder):
    """Write the demo's small models and those of Wan 2.2 5B; role -> file, as demo.made_small takes it."""
    substitutions = dict(make_set("demo", folder)["substitutions"])
    write_wan_gguf(folder / "diffusion_models" / SMALL_5B, wan_weights("wan2.2-ti2v-5b", "Q5_K_M"), "Q5_K_M")
    return substitutions | {"diffusion_model_ti2v": SMALL_5B, "vae_2.2": _narrow_vae_file()}


def _narrow_vae_file():
    """The file that narrow_vae.py writes."""
    return next(line.split('"')[1] for line in NARROW_VAE.read_text().splitlines() if line.startswith("FILE = "))


def add_packs(base, *sources):
    """Copy test packs, narrow_vae.py among them, to a server's private directory; the arguments that admit them."""
    (base / "custom_nodes").mkdir()
    sources = (NARROW_VAE, *sources)
    for source in sources:
        shutil.copy(source, base / "custom_nodes")
    return ["--whitelist-custom-nodes", "apple-silicon-video", *(source.name for source in sources)]


def small_prompt(name, substitutions):
    """A workflow in API format in SIZE with few steps."""
    prompt = demo.made_small(demo.find_workflow(name)[0], substitutions)
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in SIZE.items() if isinstance(node["inputs"].get(key), int)}
        if "filename_prefix" in node["inputs"]:
            node["inputs"]["filename_prefix"] = name  # two sizes of one workflow would be the same small prompt
    return prompt
