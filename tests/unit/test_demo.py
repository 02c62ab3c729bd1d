"""What the demo does to a workflow, and the sentences it ends with."""

import io
import json

import apple_silicon_video.tests.scripts_path  # noqa: F401
import numpy
import pytest
from PIL import Image

import demo  # isort: skip

SUBSTITUTIONS = {
    "diffusion_model_t2v": "small.gguf",
    "diffusion_model_ti2v": "small-5b.gguf",
    "diffusion_model_t2v_high": "small-high.gguf",
    "diffusion_model_t2v_low": "small-low.gguf",
    "diffusion_model_i2v_high": "small-i2v-high.gguf",
    "diffusion_model_i2v_low": "small-i2v-low.gguf",
    "lora_t2v_high": "small-high.safetensors",
    "lora_t2v_low": "small-low.safetensors",
    "lora_i2v_high": "small-i2v-high.safetensors",
    "lora_i2v_low": "small-i2v-low.safetensors",
    "text_encoder": "small-t5.gguf",
    "vae": "small-vae.safetensors",
    "vae_2.2": "small-vae-2.2.safetensors",
}


def names(prompt):
    return {file for _, _, file, _ in demo.model_inputs(prompt)}


@pytest.mark.parametrize("workflow", demo.workflow_names())
def test_every_workflow_becomes_small(workflow):
    prompt, ui = demo.find_workflow(workflow)
    before = json.dumps(prompt)
    small = demo.made_small(prompt, SUBSTITUTIONS)
    assert json.dumps(prompt) == before and ui is not None
    assert names(small) <= set(SUBSTITUTIONS.values())
    assert ("5b" in workflow) == ("small-5b.gguf" in names(small))
    pictures = any(node["class_type"] == "LoadImage" for node in prompt.values())
    assert any("i2v" in name for name in names(small)) == (pictures and "5b" not in workflow)
    for node in small.values():
        for name, limit in demo.SMALL_SIZES.items():
            assert not isinstance(node["inputs"].get(name), int) or node["inputs"][name] <= limit


def test_models_keep_their_parts():
    prompt = {
        "1": {"class_type": "A", "inputs": {"unet_name": "Wan-HighNoise.gguf"}},
        "2": {"class_type": "A", "inputs": {"unet_name": "wan_low_noise.gguf"}},
        "3": {"class_type": "B", "inputs": {"clip_name": "high.gguf", "vae_name": ["2", 0]}},
    }
    small = demo.made_small(prompt, SUBSTITUTIONS)
    values = ["small-high.gguf", "small-low.gguf", "small-t5.gguf"]
    assert [next(iter(node["inputs"].values())) for node in small.values()] == values


def test_unknown_parts_are_refused():
    prompt = {"1": {"class_type": "LoraLoader", "inputs": {"lora_name": "x.safetensors"}}}
    with pytest.raises(demo.DemoError, match=r"No small models stand for lora_t2v: .*--models"):
        demo.made_small(prompt, SUBSTITUTIONS)


@pytest.mark.parametrize(
    "inputs, small",
    [
        ({"steps": 20, "start_at_step": 0, "end_at_step": 10}, {"steps": 4, "start_at_step": 0, "end_at_step": 2}),
        (
            {"steps": 20, "start_at_step": 10, "end_at_step": 10000},
            {"steps": 4, "start_at_step": 2, "end_at_step": 10000},
        ),
        ({"steps": 2}, {"steps": 2}),
        ({"width": 832, "height": 480, "length": 81}, demo.SMALL_SIZES),
        ({"width": 64, "length": 5}, {"width": 64, "length": 5}),
        ({"width": ["3", 0]}, {"width": ["3", 0]}),
    ],
)
def test_shrinking(inputs, small):
    demo.shrink(inputs)
    assert inputs == small


def test_missing_models_are_named_with_their_folder(tmp_path):
    prompt, _ = demo.find_workflow(demo.DEFAULT_WORKFLOW)
    missing = demo.missing_models(prompt, tmp_path)
    assert {name.split("/")[0] for name in missing} == {"diffusion_models", "text_encoders", "vae"}
    for name in missing:
        path = tmp_path / name.replace("diffusion_models", "unet").replace("text_encoders", "clip")
        path.parent.mkdir()
        path.touch()
    assert demo.missing_models(prompt, tmp_path) == []


def test_workflows_are_found_by_name_and_by_path(tmp_path):
    by_name = demo.find_workflow(demo.DEFAULT_WORKFLOW)
    assert demo.find_workflow(f"{demo.DEFAULT_WORKFLOW}.json") == by_name
    assert demo.find_workflow(str(demo.WORKFLOWS / f"{demo.DEFAULT_WORKFLOW}.json")) == by_name
    api = tmp_path / "mine.json"
    api.write_text('{"1": {"class_type": "A", "inputs": {}}}')
    assert demo.find_workflow(str(api)) == ({"1": {"class_type": "A", "inputs": {}}}, None)


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"nodes": [], "links": []}', "is in ComfyUI's UI format: export it in API format"),
        ("[]", "is no workflow"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(demo.DemoError, match=words):
        demo.find_workflow(str(path))


def test_unknown_workflow_is_refused():
    with pytest.raises(demo.DemoError, match=rf"no workflow nonsense: use one of {demo.DEFAULT_WORKFLOW}"):
        demo.find_workflow("nonsense")


def test_gradient_is_a_picture():
    picture = numpy.asarray(Image.open(io.BytesIO(demo.gradient_png(32, 16))))
    assert picture.shape == (16, 32, 3)
    assert picture[0, 0].tolist() == [0, 0, 128] and picture[15, 31, 0] > 240 and picture[15, 31, 1] > 230


def progress(capsys, prompt, *messages):
    shown = demo.Progress(prompt)
    for kind, data in messages:
        shown(kind, data)
    shown.end()
    return capsys.readouterr().err.splitlines()


def test_progress_in_plain_lines(capsys):
    prompt = {"7": {"class_type": "KSampler"}, "8": {"class_type": "VAEDecode"}}
    lines = progress(
        capsys,
        prompt,
        ("status", {}),
        ("executing", {"node": "7"}),
        ("progress", {"node": "7", "value": 1, "max": 2}),
        ("progress", {"node": "7", "value": 1, "max": 2}),
        ("progress", {"node": "7", "value": 2, "max": 2}),
        ("executing", {"node": "8"}),
        ("progress", {"node": "8", "value": 1, "max": 1}),
        ("executing", {"node": None}),
    )
    assert lines == ["[1/2] KSampler", "[1/2] KSampler 1/2", "[1/2] KSampler 2/2", "[2/2] VAEDecode"]


def test_options():
    options = demo.parse(["--models", "models", "--", "--force-fp16", "--", "x"])
    assert options.models.is_absolute() and options.timeout == float("inf")
    assert options.server_arguments == ["--force-fp16", "--", "x"]
    assert demo.parse([]).timeout == 900.0


def test_help_names_every_folder(capsys):
    with pytest.raises(SystemExit):
        demo.parse(["--help"])
    text = capsys.readouterr().out
    made = (demo.environment.VENV, demo.fetch_comfyui.CACHE, demo.SMALL_MODELS, demo.BASE, demo.environment.LOG.parent)
    assert [str(path.relative_to(demo.ROOT)) in text for path in made] == [True] * len(made)
