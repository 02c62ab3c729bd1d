"""Saving a video when something goes wrong: nothing half-written stays, no file is replaced that should not be."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
from apple_silicon_video.tests.unit.video_clips import FORMAT, SOFTWARE, clip, decode, leftovers, number_in, save
from apple_silicon_video.video import container_file
from apple_silicon_video.video.encode_job import EncoderFailed
from apple_silicon_video.video.encoding import encode_video
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.output_file import OutputFile, numbered_names
from apple_silicon_video.video.video_formats import FOLDER, QUALITIES, VideoEncoder, load_format, load_formats

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


# ---- failures leave nothing behind


class Interrupted(BaseException):
    pass


def failing(frames, after: int, error: BaseException):
    yield from frames[:after]
    raise error


@pytest.mark.parametrize("error", [Interrupted(), RuntimeError("sampler"), OSError(errno.EIO, "decoder")])
def test_a_failing_source_keeps_the_old_file(tmp_path, error):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(type(error)) as caught:
        save(path, failing(clip(30), 20, error))
    assert caught.value is error
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == ["clip.mp4"]


def test_interrupt_from_the_callback(tmp_path):
    seen = []

    def on_frame(done: int) -> None:
        seen.append(done)
        if done == 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        save(tmp_path / "clip.mp4", clip(9), on_frame=on_frame)
    assert seen == [0, 1, 2, 3, 4] and leftovers(tmp_path) == []


def test_progress_counts_every_frame(tmp_path):
    seen: list[int] = []
    save(tmp_path / "clip.mp4", clip(5), on_frame=seen.append)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_missing_and_vanishing_folder(tmp_path):
    with pytest.raises(VideoError, match="folder does not exist"):
        save(tmp_path / "nowhere" / "clip.mp4")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(VideoError, match="folder does not exist or has been removed"):
        save(folder / "clip.mp4", clip(9), on_frame=lambda done: done == 5 and shutil.rmtree(folder))
    assert leftovers(tmp_path) == []


def test_a_file_as_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(VideoError, match="part of its folder's path is a file"):
        save(tmp_path / "file" / "clip.mp4")


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run code with the pack imported in a process of its own."""
    head = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\nfrom _pack import load_pack; load_pack()\n"
    head += "import os, resource, torch; from pathlib import Path; torch.set_num_threads(1)\n"
    head += "from apple_silicon_video.video.encoding import encode_video\n"
    head += "from apple_silicon_video.video.video_formats import load_formats\n"
    head += "FORMAT = load_formats()['h264-mp4']\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_failing_writes_leave_nothing(tmp_path):
    """The system stops the file's growth at several points, the last one while the index moves to the front."""
    path = tmp_path / "clip.mp4"
    result = run(
        """
        frames = torch.rand(20, 120, 160, 3, generator=torch.Generator().manual_seed(0))
        path = Path(sys.argv[1])
        size = encode_video(path, frames, fps=24, video_format=FORMAT).path.stat().st_size
        path.write_bytes(b"old")
        for limit in (0, 1000, size // 3, size - 1000, size - 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                encode_video(path, frames, fps=24, video_format=FORMAT)
            except ValueError as error:
                print(type(error).__name__, error)
        """,
        path,
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 5, result
    assert all(line.startswith(f"VideoError Cannot save {path}: it grew larger") for line in lines)
    assert path.read_bytes() == b"old" and leftovers(tmp_path) == ["clip.mp4"]


def test_a_killed_process_leaves_the_old_file_and_its_fragment_is_reused(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    result = run(
        """
        def kill(done):
            if done == 10:
                os.kill(os.getpid(), 9)
        encode_video(Path(sys.argv[1]), torch.rand(20, 120, 160, 3), fps=24, video_format=FORMAT, on_frame=kill)
        """,
        path,
    )
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == [".clip.mp4.partial", "clip.mp4"]
    save(path)
    assert len(decode(path)) == 6 and leftovers(tmp_path) == ["clip.mp4"]


def test_memory_does_not_grow_with_the_clip():
    result = run(
        """
        import tempfile
        unit = 1 if sys.platform == "darwin" else 1024
        def peak(frames):
            with tempfile.TemporaryDirectory() as folder:
                images = torch.rand(1, 720, 1280, 3).expand(frames, -1, -1, -1)
                encode_video(Path(folder) / "clip.mp4", images, fps=24, video_format=FORMAT)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20
        print(peak(1), peak(80), peak(300))
        """
    )
    one, eighty, three_hundred = map(int, result.stdout.split())
    assert three_hundred - eighty < 30  # 220 frames are 2.3 GiB as float32
    assert three_hundred - one < 400


# ---- names


def test_numbered_names_never_replace(tmp_path):
    (tmp_path / "a_00001_.mp4").write_bytes(b"old")

    def someone_else(done: int) -> None:
        if done == 3:
            (tmp_path / "a_00002_.mp4").write_bytes(b"theirs")

    video = encode_video(
        numbered_names(tmp_path, "a", 1, ".mp4"), clip(6), fps=24, video_format=FORMAT, on_frame=someone_else
    )
    assert video.path == tmp_path / "a_00003_.mp4" and len(decode(video.path)) == 6
    assert (tmp_path / "a_00001_.mp4").read_bytes() == b"old"
    assert (tmp_path / "a_00002_.mp4").read_bytes() == b"theirs"
    assert leftovers(tmp_path) == ["a_00001_.mp4", "a_00002_.mp4", "a_00003_.mp4"]


def test_two_writers_take_two_names(tmp_path):
    with (
        OutputFile(numbered_names(tmp_path, "a", 1, ".mp4")) as first,
        OutputFile(numbered_names(tmp_path, "a", 1, ".mp4")) as second,
    ):
        first.partial.write_bytes(b"1")
        second.partial.write_bytes(b"2")
        assert (second.publish().name, first.publish().name) == ("a_00002_.mp4", "a_00001_.mp4")
    assert [(tmp_path / name).read_bytes() for name in leftovers(tmp_path)] == [b"1", b"2"]


def test_a_name_being_written_is_refused(tmp_path):
    with (
        OutputFile([tmp_path / "a.mp4"], replace=True),
        pytest.raises(VideoError, match="name is in use"),
        OutputFile([tmp_path / "a.mp4"], replace=True),
    ):
        pass


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", no_links)
    with OutputFile(numbered_names(tmp_path, "a", 1, "")) as output:
        output.partial.write_bytes(b"new")
        (tmp_path / "a_00001_").write_bytes(b"theirs")
        assert output.publish().name == "a_00002_"
    assert leftovers(tmp_path) == ["a_00001_", "a_00002_"]


# ---- encoders and formats


NO_SUCH = VideoEncoder(
    "no_such_encoder", None, {}, {quality: {} for quality in QUALITIES}, "yuv420p", label="no_such_encoder"
)


def test_fallback_is_told_in_one_line(tmp_path, caplog):
    video = save(tmp_path / "a.mp4", video_format=replace(SOFTWARE, video_encoders=(NO_SUCH, *SOFTWARE.video_encoders)))
    assert video.encoder == "libx264"
    assert [r.getMessage() for r in caplog.records] == ["no_such_encoder failed (no_such_encoder); trying libx264."]


def test_no_encoder_works(tmp_path):
    refused = replace(SOFTWARE.video_encoders[0], options={"preset": "no such preset"})
    with pytest.raises(VideoError, match=r"no_such_encoder failed .*; libx264 failed .*choose another format"):
        save(tmp_path / "a.mp4", video_format=replace(SOFTWARE, video_encoders=(NO_SUCH, refused)))
    assert leftovers(tmp_path) == []


def test_an_encoder_that_gives_up_is_replaced(tmp_path, monkeypatch, caplog):
    """VideoToolbox loses its session when the Mac sleeps: the clip starts over with the next encoder."""
    real, calls = container_file.encoded, []

    def lost(stream, picture, started):
        calls.append(picture)
        if len(calls) == 4:
            raise EncoderFailed(RuntimeError("session lost"), started=True)
        return real(stream, picture, started)

    monkeypatch.setattr(container_file, "encoded", lost)
    twice = replace(SOFTWARE, video_encoders=SOFTWARE.video_encoders * 2)
    path = save(tmp_path / "a.mp4", clip(7), video_format=twice).path
    assert [number_in(picture) for picture in decode(path)] == list(range(7))
    assert len(caplog.records) == 1
    calls.clear()
    with pytest.raises(VideoError, match="session lost"):
        save(tmp_path / "b.mp4", iter(clip(7)), video_format=twice)
    assert leftovers(tmp_path) == ["a.mp4"]


def test_every_packet_lasts_one_frame():
    """Not every encoder says how long a picture lasts, and the last one's length is nowhere else."""
    packet = av.Packet(4)
    packet.time_base, packet.pts, packet.dts = Fraction(1, 90000), 0, 0
    context = SimpleNamespace(framerate=Fraction(30000, 1001))
    stream = SimpleNamespace(codec_context=context, encode=lambda picture: [packet])
    assert [packet.duration for packet in container_file.encoded(stream, None, False)] == [3003]


@pytest.mark.parametrize(("pts", "dts", "wanted"), [(7, -(10**16), 7), (7, None, 7), (7, 8, 7), (7, 5, 5)])
def test_decoding_times_left_to_chance_are_put_right(pts, dts, wanted):
    packet = av.Packet(4)
    packet.time_base, packet.pts, packet.dts = Fraction(1, 24), pts, dts
    stream = SimpleNamespace(codec_context=SimpleNamespace(framerate=Fraction(24)), encode=lambda picture: [packet])
    assert [packet.dts for packet in container_file.encoded(stream, None, False)] == [wanted]


def test_videotoolbox_comes_first_on_a_mac_only(monkeypatch):
    for platform, names in (
        ("darwin", ["h264_videotoolbox", "h264_videotoolbox allow_sw=1", "libx264"]),
        ("linux", ["libx264"]),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        assert [encoder.label for encoder in FORMAT.encoders_here()] == names
        assert [encoder.label for encoder in FORMAT.encoders_here(software_only=True)] == ["libx264"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"container"', '"box"', "no field 'container'"),
        ('"best"', '"better"', "no field 'best'"),
        ("yuv420p", "yuv411p", "'yuv411p' is none of yuv420p, yuv422p"),
        ("bt709", "bt601", "'bt601' is none of bt709"),
        ("{", "", "cannot be used"),
        ('"video": {', '"video": 3, "v": {', "cannot be used"),
    ],
)
def test_a_broken_format_file_is_named(tmp_path, caplog, old, new, words):
    source = FOLDER / "h264-mp4.json"
    shutil.copy(source, tmp_path / "good.json")
    (tmp_path / "mine.json").write_text(source.read_text().replace(old, new, 1))
    with pytest.raises(VideoError, match=words) as caught:
        load_format(tmp_path / "mine.json")
    assert "mine.json" in str(caught.value) and "\n" not in str(caught.value)
    assert list(load_formats(tmp_path)) == ["good"]
    assert [r.getMessage() for r in caplog.records] == [str(caught.value)]
