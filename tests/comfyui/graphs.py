"""The shipped workflows in API format, changed for small models and for comparison with core's own loaders."""

import copy
import json
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
SIZE = {"width": 64, "height": 64, "length": 9}
T2V, I2V = "wan2.1_t2v_1.3b_16gb", "wan2.2_i2v_a14b_64gb"


def workflow(name):
    """(API format, UI format) of a shipped workflow."""
    api = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    return api, json.loads((WORKFLOWS / f"{name}.json").read_text())


def nodes(graph, kind):
    """Ids of the nodes of a kind, in order."""
    return [key for key, node in graph.items() if node["class_type"] == kind]


def small(graph, names, image=None):
    """The graph with small models, a small size and few steps.

    names: files for the diffusion loaders in order, then "text_encoder" and "vae".
    """
    graph = copy.deepcopy(graph)
    for key, name in zip(nodes(graph, "MPSLoadDiffusionModel"), names["diffusion_models"], strict=True):
        graph[key]["inputs"]["unet_name"] = name
    for node in graph.values():
        inputs = node["inputs"]
        kind = node["class_type"]
        if kind == "MPSEncodePrompts":
            inputs["clip_name"] = names["text_encoder"]
        elif kind == "MPSLoadVAE":
            inputs["vae_name"] = names["vae"]
        elif kind == "LoadImage":
            inputs["image"] = image
        elif kind in ("EmptyHunyuanLatentVideo", "WanImageToVideo"):
            inputs |= SIZE
        elif kind == "KSampler":
            inputs["steps"] = 3
        elif kind == "KSamplerAdvanced":
            inputs["steps"] = 4
            inputs["start_at_step"], inputs["end_at_step"] = (
                min(inputs["start_at_step"], 2),
                min(inputs["end_at_step"], 2),
            )
            if inputs["add_noise"] == "disable":
                inputs["end_at_step"] = 10000
    return graph


def with_lora(graph, lora, strength=0.8):
    """The graph with a LoraLoaderModelOnly behind every diffusion model loader."""
    graph = copy.deepcopy(graph)
    for key in nodes(graph, "MPSLoadDiffusionModel"):
        added = f"lora{key}"
        rewire(graph, key, 0, added)
        inputs = {"model": [key, 0], "lora_name": lora, "strength_model": strength}
        graph[added] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    return graph


def with_text_nodes(graph, loader="MPSLoadTextEncoder", **options):
    """The graph with a text encoder's loader and two CLIPTextEncode in place of Encode Prompts."""
    graph = copy.deepcopy(graph)
    for key in nodes(graph, "MPSEncodePrompts"):
        inputs = graph.pop(key)["inputs"]
        chosen = {"clip_name": inputs["clip_name"], "type": inputs["type"], "device": "auto"} | options
        graph[f"clip{key}"] = {"class_type": loader, "inputs": chosen}
        for slot, name in enumerate(("positive", "negative")):
            text = {"clip": [f"clip{key}", 0], "text": inputs[name]}
            graph[f"{name}{key}"] = {"class_type": "CLIPTextEncode", "inputs": text}
            rewire(graph, key, slot, f"{name}{key}")
    return graph


def rewire(graph, source, slot, target):
    """Let everything that takes output ``slot`` of ``source`` take output 0 of ``target`` instead."""
    for node in graph.values():
        for name, value in node["inputs"].items():
            if value == [source, slot]:
                node["inputs"][name] = [target, 0]


def with_core_loaders(graph, references, config):
    """The graph with core's loaders on decoded weights instead of the pack's; references: file -> decoded file."""
    graph = with_text_nodes(graph)
    for key, node in list(graph.items()):
        inputs, kind = node["inputs"], node["class_type"]
        if kind == "MPSLoadDiffusionModel":
            replaced = {"unet_name": references[inputs["unet_name"]], "weight_dtype": "default"}
            graph[key] = {"class_type": "UNETLoader", "inputs": replaced}
        elif kind == "MPSLoadTextEncoder":
            replaced = {"clip_name": references[inputs["clip_name"]], "config": json.dumps(config)}
            graph[key] = {"class_type": "CoreCLIPLoader", "inputs": replaced}
        elif kind == "MPSLoadVAE":
            graph[key] = {"class_type": "VAELoader", "inputs": {"vae_name": inputs["vae_name"]}}
        elif kind == "MPSMemoryGovernor":
            source, slot = inputs["model"]
            del graph[key]
            for other in graph.values():
                for name, value in other["inputs"].items():
                    if value == [key, 0]:
                        other["inputs"][name] = [source, slot]
        elif kind == "MPSSaveVideo":
            del graph[key]
    return graph


def with_tensor(graph, name):
    """The graph with its decoded frames saved as a tensor."""
    graph = copy.deepcopy(graph)
    decode = next(key for key, node in graph.items() if node["class_type"].startswith("VAEDecode"))
    graph["tensor"] = {"class_type": "SaveTensor", "inputs": {"images": [decode, 0], "name": name}}
    return graph
