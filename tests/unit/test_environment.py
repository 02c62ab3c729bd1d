"""What scripts/environment.py decides: interpreter, sources of torch, requirements, and whether anything is to do."""

import shutil
import subprocess
import sys
from pathlib import Path

import apple_silicon_video.tests.scripts_path  # noqa: F401
import pytest

import environment  # isort: skip
import fetch_comfyui  # isort: skip

REQUIREMENTS = """comfyui-frontend-package==1.47.12
comfyui-workflow-templates==0.11.27
comfyui_embedded.docs==0.5.9
torch
torchvision
torchsde
numpy>=1.25.0

#non essential dependencies:
PyOpenGL>=3.1.8
glfw
"""


def select(found):
    return environment.select_python(found, found.get)


def test_running_python_is_preferred():
    assert environment.candidate_pythons()[0] == sys.executable
    assert select({"running": (3, 11), "python3.13": (3, 13)}) == "running"


def test_unsuitable_pythons_are_passed_over():
    assert select({"running": (3, 14), "python3.13": None, "python3.12": (3, 12)}) == "python3.12"


def test_newer_python_is_a_last_resort():
    assert select({"running": (3, 9), "python3.13": None, "python3": (3, 14)}) == "python3"


def test_no_python_is_one_sentence():
    with pytest.raises(environment.SetupError, match=r"^No Python 3\.10 or later .* install Python 3\.12 .*\.$"):
        select({"running": (3, 9), "python3.13": None})


def test_probing_pythons(tmp_path):
    broken = tmp_path / "python3.12"
    broken.write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    broken.chmod(0o755)
    assert environment.probe_python(sys.executable) == sys.version_info[:2]
    assert environment.probe_python(str(broken)) is None
    assert environment.probe_python(str(tmp_path / "missing")) is None


@pytest.mark.parametrize(
    "text, version",
    [("2.13.0+cpu", (2, 13)), ("2.6", (2, 6)), ("2.14.0.dev2026", (2, 14)), ("", (0, 0)), ("x", (0, 0))],
)
def test_version_of(text, version):
    assert environment.version_of(text) == version


def test_torch_on_linux_is_a_cpu_build_where_there_is_one():
    first, second, last = environment.torch_attempts("Linux")
    assert first.requirements == ("torch==2.13.0+cpu",) and "--index-url" not in first.options
    assert second.options[:2] == ("--index-url", "https://download.pytorch.org/whl/cpu")
    assert last == environment.Attempt(("torch==2.13.0",))


def test_torch_on_a_mac():
    assert environment.torch_attempts("Darwin")[0].requirements == ("torch>=2.13", "torchvision", "torchaudio")


def test_other_systems_are_refused():
    with pytest.raises(environment.SetupError, match="Darwin and Linux only, and not on Windows"):
        environment.torch_attempts("Windows")


@pytest.mark.parametrize(
    "torch, vision, audio",
    [("2.6.0", "0.21", "2.6"), ("2.8.0+cu128", "0.23", "2.8"), ("2.13.0+cpu", "0.28", "2.11")],
)
def test_companions_follow_torch(torch, vision, audio):
    wanted = {"torchvision": f"torchvision=={vision}.*", "torchaudio": f"torchaudio=={audio}.*"}
    assert environment.companions(torch) == wanted


def test_attempts_in_order(monkeypatch):
    calls = []

    def install(*arguments):
        calls.append(arguments)
        return None if arguments == ("b",) else "no such version"

    monkeypatch.setattr(environment, "pip_install", install)
    environment.first_success("x", [environment.Attempt((name,)) for name in "abc"])
    assert calls == [("a",), ("b",)]
    with pytest.raises(environment.SetupError, match=r"^pip could not install x \(no such version\): .*\.log\.$"):
        environment.first_success("x", [environment.Attempt(("a",))])


def test_comfyui_requirements_without_the_heavy_ones():
    kept = ["comfyui-frontend-package==1.47.12", "torchsde", "numpy>=1.25.0"]
    assert environment.needed_requirements(REQUIREMENTS) == kept


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """An empty checkout with an environment that looks finished and ComfyUI in the cache."""
    for name in ("VENV", "PYTHON", "STAMP", "CACHE", "LOG", "SHIM", "ROOT"):
        path = tmp_path / getattr(environment, name).relative_to(environment.ROOT)
        path.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(environment, name, path)
    monkeypatch.setattr(environment.platform, "system", lambda: "Linux")
    tree = tmp_path / ".cache" / "comfyui" / fetch_comfyui.DEFAULT_VERSION
    (tree / "comfy").mkdir(parents=True)
    (tree / "main.py").touch()
    (tree / "requirements.txt").write_text(REQUIREMENTS)
    monkeypatch.setattr(fetch_comfyui, "find", lambda version=None: tree)
    environment.PYTHON.symlink_to(sys.executable)
    (environment.VENV / "pyvenv.cfg").write_text("version = 3.11.7\n")
    for name in ("requirements.txt", "requirements-test.txt", "scripts/torchvision_on_cpu_torch.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# nothing\n")
    return tmp_path


@pytest.fixture
def installed(monkeypatch):
    """The groups that would be installed, in order."""
    groups = []
    monkeypatch.setattr(environment, "make_venv", lambda: None)
    monkeypatch.setattr(environment, "install_torch", lambda: groups.append("torch"))
    monkeypatch.setattr(environment, "install_requirements", lambda what, lines: groups.append(what.split()[-2]))
    return groups


def test_second_run_has_nothing_to_do(checkout, installed):
    environment.ensure(tests=True)
    assert installed == ["torch", "ComfyUI", "tests"]
    environment.ensure(tests=True)
    environment.ensure()
    assert installed == ["torch", "ComfyUI", "tests"]


def test_demo_then_tests_adds_the_tests(checkout, installed):
    environment.ensure()
    environment.ensure(tests=True)
    assert installed == ["torch", "ComfyUI", "tests"]


@pytest.mark.parametrize(
    "file, groups",
    [
        ("requirements.txt", ["ComfyUI"]),
        ("requirements-test.txt", ["tests"]),
        (f".cache/comfyui/{fetch_comfyui.DEFAULT_VERSION}/requirements.txt", ["ComfyUI"]),
        ("scripts/torchvision_on_cpu_torch.py", ["torch"]),
        (".venv/pyvenv.cfg", ["torch", "ComfyUI", "tests"]),
    ],
)
def test_changed_inputs_are_installed_again(checkout, installed, file, groups):
    environment.ensure(tests=True)
    installed.clear()
    path = checkout / file
    path.write_text(path.read_text() + "einops\n")
    environment.ensure(tests=True)
    assert installed == groups


def test_skipped_requirements_change_nothing(checkout, installed):
    environment.ensure()
    installed.clear()
    path = checkout / ".cache" / "comfyui" / fetch_comfyui.DEFAULT_VERSION / "requirements.txt"
    path.write_text(path.read_text().replace("templates==0.11.27", "templates==0.11.28"))
    environment.ensure()
    assert installed == []


def test_failure_leaves_the_rest_to_do(checkout, installed, monkeypatch):
    def fail(*_):
        raise environment.SetupError("pip could not install it.")

    with monkeypatch.context() as broken:
        broken.setattr(environment, "install_requirements", fail)
        with pytest.raises(environment.SetupError):
            environment.ensure()
    assert installed == ["torch"]
    environment.ensure()
    assert installed == ["torch", "ComfyUI"]


def test_dead_interpreter_is_noticed(checkout, installed):
    environment.ensure()
    environment.PYTHON.unlink()
    environment.PYTHON.symlink_to("/nowhere/python3")
    wanted = environment.wanted_stamp(fetch_comfyui.find(), False)
    assert not environment.up_to_date(environment.read_stamp(), wanted)


def test_damaged_stamp_counts_as_none(checkout):
    for text in ("", "{", "[1]"):
        environment.STAMP.write_text(text)
        assert environment.read_stamp() == {}


def test_foreign_folder_is_not_touched(checkout):
    environment.PYTHON.unlink()
    (environment.VENV / "pyvenv.cfg").unlink()
    (environment.VENV / "precious").touch()
    with pytest.raises(environment.SetupError, match="is no virtual environment: move it away"):
        environment.make_venv()
    assert (environment.VENV / "precious").exists()


def test_environment_that_runs_is_kept(checkout):
    (environment.VENV / "precious").touch()
    environment.make_venv()
    assert (environment.VENV / "precious").exists() and environment.PYTHON.readlink() == Path(sys.executable)


@pytest.fixture
def system(tmp_path, monkeypatch, capsys):
    """A search path with chosen programs only, a user, and an apt-get that installs (after an update)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(environment, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(environment, "LOG", tmp_path / "log")
    for tool in ("env", "sh", "touch", "chmod"):
        (folder / tool).symlink_to(shutil.which(tool))

    def prepare(*programs, user=0, packages=True, update=True):
        for program in programs:
            (folder / program).touch()
            (folder / program).chmod(0o755)
        if (folder / "apt-get").exists():
            (folder / "apt-get").write_text(
                f"""#!{folder}/sh
                echo "$@" $DEBIAN_FRONTEND >> {tmp_path}/calls
                if [ "$1" = update ]; then touch {tmp_path}/lists; exit 0; fi
                if {str(not update).lower()} || [ -e {tmp_path}/lists ] && {str(packages).lower()}; then
                    touch {folder}/ffmpeg {folder}/ffprobe {folder}/chromium
                    chmod +x {folder}/ffmpeg {folder}/ffprobe {folder}/chromium
                else
                    echo "E: Unable to locate package" >&2; exit 100
                fi
                """
            )
        monkeypatch.setenv("PATH", str(folder))
        monkeypatch.setattr(environment.os, "geteuid", lambda: user)
        monkeypatch.setattr(environment, "PROGRAMS", [p._replace(names=p.names[:2]) for p in environment.PROGRAMS])
        environment.install_programs()
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return calls, capsys.readouterr().err

    return prepare


INSTALL = "install --yes --no-install-recommends {} noninteractive"


def test_programs_that_are_there_are_left_alone(system):
    assert system("ffmpeg", "ffprobe", "chromium-browser", "apt-get") == ([], "")


def test_root_gets_missing_programs_from_debian(system):
    calls, said = system("ffmpeg", "ffprobe", "apt-get", update=False)
    assert calls == [INSTALL.format("chromium")] and said == "Installing chromium with apt-get ...\n"
    assert environment.missing_programs() == []


def test_package_lists_are_fetched_where_there_are_none(system):
    calls, said = system("apt-get")
    install = INSTALL.format("chromium ffmpeg")
    assert calls == [install, "update noninteractive", install] and len(said.splitlines()) == 1
    assert "Unable to locate" in environment.LOG.read_text() and environment.missing_programs() == []


def test_debian_that_cannot_install_is_one_sentence_more(system):
    calls, said = system("apt-get", packages=False)
    assert len(calls) == 3
    assert said.splitlines()[1].startswith("apt-get could not install ffmpeg and ffprobe and chromium (E: Unable")


def test_users_without_rights_are_told_what_to_install(system):
    calls, said = system("chromium", "ffmpeg", "apt-get", user=1000)
    assert calls == [] and said == (
        'ffprobe not found, so that the tests that use it will fail: install it with "sudo apt-get install ffmpeg".\n'
    )


def test_mac_users_are_told_what_to_install(system):
    calls, said = system(user=501)
    assert calls == [] and said.endswith('on a Mac with "brew install --cask chromium" and "brew install ffmpeg".\n')


def test_tests_ask_for_programs_and_the_demo_does_not(checkout, installed, monkeypatch):
    asked = []
    monkeypatch.setattr(environment, "missing_programs", lambda: [environment.PROGRAMS[0]])
    monkeypatch.setattr(environment, "install_programs", lambda: asked.append("programs"))
    environment.ensure()
    assert asked == []
    environment.ensure(tests=True)
    assert asked == ["programs"]


def test_lock_lets_one_run_in_at_a_time(checkout, tmp_path):
    order = tmp_path / "order"
    script = (
        "import sys, pathlib; sys.path.append(sys.argv[1]); import environment\n"
        "environment.CACHE = pathlib.Path(sys.argv[2]); order = open(sys.argv[3], 'a', buffering=1)\n"
        "with environment.locked(): order.write('other\\n')"
    )
    scripts = Path(fetch_comfyui.__file__).parent
    with environment.locked():
        other = subprocess.Popen(
            [sys.executable, "-c", script, scripts, environment.CACHE, order], stderr=subprocess.PIPE
        )
        assert other.stderr is not None and b"Waiting" in other.stderr.readline()
        with open(order, "a") as file:
            file.write("first\n")
    assert other.wait() == 0
    other.stderr.close()
    assert order.read_text().split() == ["first", "other"]


def test_torch_of_a_parent_stays_in_sight(checkout, tmp_path, monkeypatch):
    """system-site-packages does for an ordinary interpreter; an environment's own packages are named in a .pth."""
    parent = tmp_path / "parent" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "parent"], check=True)
    folder = Path(environment.environment_folders(str(parent)).splitlines()[0])
    assert folder.is_dir() and folder.is_relative_to(tmp_path / "parent" / "lib")

    made = []

    def note(command):
        made.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    environment.PYTHON.unlink()
    monkeypatch.setattr(environment, "probe_python", lambda *_: None)
    monkeypatch.setattr(environment, "select_python", lambda _: str(parent))
    monkeypatch.setattr(environment, "site_packages", lambda: tmp_path)
    monkeypatch.setattr(environment, "run", note)
    for torch, folders in (("2.8.0", str(folder)), ("2.8.0", ""), (None, str(folder))):
        monkeypatch.setattr(environment, "installed_torch", lambda _, torch=torch: torch)
        monkeypatch.setattr(environment, "environment_folders", lambda _, folders=folders: folders)
        environment.make_venv()
    assert (tmp_path / "parent_environment.pth").read_text() == str(folder)
    assert ["--system-site-packages" in command for command in made] == [False, True, False]
