"""What the Comfy Registry and pip need: metadata, the archive's files, and requirements that Macs have wheels for.

The registry's rules are those of docs.comfy.org/registry/specifications, read in November 2026.
"""

import ast
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from apple_silicon_video.tests.archive import ROOT, archive_files, ignored
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MAC = {
    "sys_platform": "darwin",
    "platform_machine": "arm64",
    "platform_system": "Darwin",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}
LINUX = MAC | {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"}
PACKAGES = ("nodes", "mps_patches", "quantization", "memory", "video")
USED_AT_RUN_TIME = ("web", "locales", "workflows", "video/formats", "quantization/metal", "quantization/data")
FILES = ("__init__.py", "prestartup_script.py", "requirements.txt", "pyproject.toml", "LICENSE", "CHANGELOG.md")
ICON_LIMIT = (800, 400)


@pytest.fixture(scope="module")
def metadata():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def in_force(system, python):
    """The requirements whose markers hold for CPython of a version on a system."""
    environment = system | {"python_version": python, "python_full_version": f"{python}.0"}
    return [each for each in requirements() if each.marker is None or each.marker.evaluate(environment)]


def test_metadata_is_what_the_registry_takes(metadata):
    project, comfy = metadata["project"], metadata["tool"]["comfy"]
    name = project["name"]
    assert len(name) < 100 and re.fullmatch(r"[A-Za-z](?:[A-Za-z0-9]|[-_.](?=[A-Za-z0-9]))*", name)
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (ROOT / project["license"]["file"]).is_file() and (ROOT / project["readme"]).is_file()
    assert project["description"] and project["classifiers"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and SpecifierSet(comfy["requires-comfyui"])
    assert "Icon" not in comfy or comfy["Icon"].startswith("https://")
    supported = SpecifierSet(project["requires-python"])
    assert all(supported.contains(python) for python in PYTHONS) and not supported.contains("3.9")
    assert project["dynamic"] == ["dependencies"]
    assert metadata["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]


def test_version_is_in_the_changelog(metadata):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (newest, *_) = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert newest == metadata["project"]["version"]


def test_icon_is_within_the_limit():
    data = (ROOT / "assets" / "icon.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width <= ICON_LIMIT[0] and height <= ICON_LIMIT[1]


def test_archive_leaves_out_tests():
    assert all(not re.search(r"[*?!\[\\]", pattern) and not pattern.startswith("/") for pattern in ignored())
    for pattern in set(ignored()) - {".github/"}:
        assert (ROOT / pattern).exists(), f"{pattern} names nothing"
    names = [file.as_posix() for file in archive_files()]
    assert not [name for name in names if name.startswith(("tests/", ".ci/")) or "test" in Path(name).stem]


def test_archive_holds_what_the_pack_imports_and_reads():
    files = set(archive_files())
    assert {Path(name) for name in FILES} <= files
    for name in USED_AT_RUN_TIME:
        assert {path.relative_to(ROOT) for path in (ROOT / name).rglob("*.*") if path.is_file()} <= files, name
    for package in PACKAGES:
        for source in (ROOT / package).rglob("*.py"):
            assert source.relative_to(ROOT) in files
            for module in relative_imports(source):
                options = (module.with_suffix(".py"), module / "__init__.py")
                assert any(option.relative_to(ROOT) in files for option in options), f"{source} imports {module}"


def relative_imports(source):
    """Paths, without suffix, of the modules of the pack that a file imports."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = source.parents[node.level - 1]
            if node.module:
                yield folder.joinpath(*node.module.split("."))
            else:
                yield from (folder / alias.name for alias in node.names if not (folder / "__init__.py").is_file())
                yield folder


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_a_wheel_for_macs(python, tmp_path):
    """pip looks only for wheels for macOS 14 on arm64 and this Python; nothing is installed."""
    for requirement in in_force(MAC, python):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--platform", "macosx_14_0_arm64", "--python-version", python, "--implementation", "cp"]
        named = f"{requirement.name}{requirement.specifier}"
        result = subprocess.run([*command, "--dest", tmp_path, named], capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{named} has no wheel for Python {python}: {result.stderr}"
    wheels = list(tmp_path.iterdir())
    assert len(wheels) == len(in_force(MAC, python)) and all("arm64" in wheel.name for wheel in wheels)


def test_where_requirements_hold():
    """decord for Macs with a wheel, nothing elsewhere: whatever else is needed comes with ComfyUI."""
    names = {python: [each.name for each in in_force(MAC, python)] for python in PYTHONS}
    assert names == {"3.10": ["eva-decord"], "3.11": ["eva-decord"], "3.12": [], "3.13": []}
    intel = MAC | {"platform_machine": "x86_64"}
    assert not [each for system in (LINUX, intel) for python in PYTHONS for each in in_force(system, python)]
