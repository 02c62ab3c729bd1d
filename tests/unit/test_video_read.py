"""Reading videos: every fixture's exact frames and times, any selection, few frames decoded, flat memory."""

import json
import random
import subprocess
import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import pytest
import torch
from apple_silicon_video.tests.video_fixtures import FIXTURES, UnreadableNumber, read_number
from apple_silicon_video.tests.video_fixtures import video_files as video_files
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.geometry import FrameSize
from apple_silicon_video.video.reader import FrameSelection, forget_indices, open_video

READABLE = [name for name, f in FIXTURES.items() if not f.error and len(f.numbers) < 1000]
WHOLE = [name for name in READABLE if not FIXTURES[name].unreadable and not FIXTURES[name].cut_off]
PALETTES = ("gif", "webp")  # which may always hold transparent pixels
SAME_MATRIX = {"bt470bg": "smpte170m"}
LONG = "20000_frames.mp4"
GROUP = 250
CHILD = """
import json, sys
sys.path.append(sys.argv[1])
from _pack import load_pack
load_pack()
import psutil, threading, time
from apple_silicon_video.video.reader import open_video, FrameSelection
with open_video(sys.argv[2]) as video:
    process, peak, running = psutil.Process(), [0], [True]
    def watch():
        while running[0]:
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.005)
    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    if sys.argv[3] == "read":
        size = video.read(FrameSelection()).nbytes
    else:
        size = 0
        for frame in video.frames(FrameSelection()):
            del frame
    running[0] = False
    thread.join()
print(json.dumps({"grew": peak[0] - before - size}))
"""


def numbers(frames):
    found = []
    for frame in frames:
        try:
            found.append(read_number(frame))
        except UnreadableNumber:
            found.append(None)
    return found


@pytest.mark.parametrize("name", READABLE)
def test_every_frame_and_its_time(video_files, name):
    fixture = FIXTURES[name]
    with open_video(video_files(name)) as video:
        frames, times, info = video.read(FrameSelection()), video.timestamps(), video.info
    assert frames.dtype == torch.float32 and frames.shape == (info.frames, *fixture.size[::-1], 3)
    assert float(frames.min()) >= 0 and float(frames.max()) <= 1
    count = len(fixture.numbers)
    assert len(times) == count or (fixture.cut_off and len(times) >= count)
    assert tuple(times[:count]) == fixture.times
    for expected, found in zip(fixture.numbers, numbers(frames)):
        assert found == expected or expected in fixture.unreadable


@pytest.mark.parametrize("name", WHOLE)
def test_info(video_files, name):
    fixture = FIXTURES[name]
    with open_video(video_files(name)) as video:
        info = video.info
    assert (info.width, info.height) == fixture.size and info.frames == len(fixture.numbers)
    assert (info.codec, info.bit_depth, info.has_alpha) == (
        fixture.codec,
        fixture.bits,
        fixture.alpha or fixture.codec in PALETTES,
    )
    assert fixture.fps is None or info.fps == fixture.fps
    assert info.variable_frame_rate == ("variable" in name)
    matrix = SAME_MATRIX.get(info.color.matrix, info.color.matrix)
    assert (matrix, info.color.transfer) == (fixture.matrix, fixture.transfer)
    assert info.hdr == {"smpte2084": "pq", "arib-std-b67": "hlg"}.get(fixture.transfer)
    turned = {
        "clockwise": (90, False),
        "half a turn": (180, False),
        "anticlockwise": (270, False),
        "mirrored": (0, True),
    }
    assert (info.rotation, info.mirrored) == turned.get(fixture.turned, (0, False))
    assert info.duration > fixture.times[-1]
    sound = fixture.sound
    assert (info.audio is None) == (sound is None)
    if sound is not None and info.audio is not None:
        assert (info.audio.channels, info.audio.sample_rate) == (sound.channels, sound.rate)
        assert info.audio.layout in (sound.layout, f"{sound.layout}(side)")


@pytest.mark.parametrize("name", [name for name, fixture in FIXTURES.items() if fixture.error])
def test_what_is_no_video_is_refused_in_one_sentence(video_files, name):
    import re

    path = video_files(name)
    with pytest.raises(VideoError) as refused:
        open_video(path)
    message = str(refused.value)
    assert re.search(FIXTURES[name].error, message, re.IGNORECASE) and message.startswith(path.name)
    assert message.endswith(".") and "\n" not in message and ". " not in message


@pytest.mark.parametrize("name", WHOLE)
def test_any_frames_in_any_order(video_files, name):
    """Random indices, repeats and negatives give what reading everything gives, through seeks of every kind."""
    generator = random.Random(name)
    fixture = FIXTURES[name]
    count = len(fixture.numbers)
    with open_video(video_files(name)) as video:
        everything = video.read(FrameSelection())
        for _ in range(6):
            wanted = [generator.randrange(-count, count) for _ in range(generator.randint(1, 5))]
            assert torch.equal(video.read(wanted), everything[wanted])
        assert torch.equal(video.read([count - 1]), everything[-1:]) and torch.equal(video.read([0]), everything[:1])


@pytest.mark.parametrize("name", ["h264.mp4", "open_gop.mp4", "mpeg4.avi", "webp.webp", "prores.mov", "vp9.webm"])
def test_streamed_frames_are_the_read_ones(video_files, name):
    with open_video(video_files(name)) as video:
        everything = video.read(FrameSelection())
        given_up = video.frames(FrameSelection(start_frame=3))
        assert torch.equal(next(given_up), everything[3])
        given_up.close()
        streamed = list(video.frames(FrameSelection(stride=3)))
    assert torch.equal(torch.stack(streamed), everything[::3])


@pytest.mark.parametrize("name", ["h264.mp4", "variable_rate.mp4", "variable_rate.mkv", "gif.gif", "hevc.mp4"])
@pytest.mark.parametrize("fps", [Fraction(8), Fraction(25), Fraction(60), 23.976])
def test_resampling_shows_what_is_on_screen(video_files, name, fps):
    fixture = FIXTURES[name]
    with open_video(video_files(name)) as video:
        frames, end = video.read(FrameSelection(fps=fps)), video.info.duration
    step = 1 / Fraction(fps).limit_denominator(1_000_000)
    moments = [index * step for index in range(len(frames))]
    on_screen = [max(i for i, time in enumerate(fixture.times) if time <= moment) for moment in moments]
    assert numbers(frames) == [fixture.numbers[i] for i in on_screen]
    assert moments[-1] < end <= len(frames) * step


def test_memory_buffer_and_wrong_file_are_left_alone(video_files):
    content = video_files("h264.mp4").read_bytes()
    buffer = BytesIO(content)
    buffer.seek(7)
    with open_video(buffer) as video, open_video(video_files("h264.mp4")) as file:
        assert torch.equal(video.read(FrameSelection()), file.read(FrameSelection()))
        assert torch.equal(video.audio()["waveform"], file.audio()["waveform"])
    assert buffer.tell() == 7
    with pytest.raises(VideoError, match=r"^The video in memory cannot be read"):
        open_video(BytesIO(content[:900]))


def test_a_changed_file_is_read_anew(video_files, tmp_path):
    path = tmp_path / "clip.mp4"
    for name, count in (("one_frame.mp4", 1), ("h264.mp4", 24)):
        path.write_bytes(video_files(name).read_bytes())
        with open_video(path) as video:
            assert video.info.frames == count and len(video.read(FrameSelection())) == count


def test_out_of_range_is_one_sentence(video_files):
    with open_video(video_files("h264.mp4")) as video:
        with pytest.raises(
            VideoError, match=r"^h264.mp4 has no frame 24; it has 24, numbered 0 to 23 or from -24 to -1\.$"
        ):
            video.read([3, 24])
        with pytest.raises(VideoError, match=r"has no frame in the chosen range; it has 24 frames in 1.000 seconds"):
            video.read(FrameSelection(start_time=5))
        with pytest.raises(VideoError, match="ascending order"):
            next(video.frames([5, 2]))


def test_damaged_frames_are_named_once_and_repeated(video_files, caplog):
    with open_video(video_files("corrupt.avi")) as video:
        frames = video.read(FrameSelection())
    assert numbers(frames)[6:10] == [6, 7, 7, 9]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["corrupt.avi: 1 frames are damaged; each shows the frame before it."]
    with open_video(video_files("corrupt.avi")) as video:
        assert numbers(video.read([8, 9])) == [9, 9]
        with pytest.raises(VideoError, match=r"corrupt.avi is damaged: none of the chosen frames"):
            video.read([8])


def test_sparse_reading_decodes_one_group_for_each_frame(video_files):
    forget_indices()
    wanted = [100, 3599, 7000, 10_001, 15_499, 19_999]
    with open_video(video_files(LONG)) as video:
        assert video.info.frames == 20_000 and video.decoded_frames == 0
        frames = video.read(wanted)
        assert video.decoded_frames <= sum(index % GROUP + 1 for index in wanted)
        assert video.key_frames == list(range(0, 20_000, GROUP))
    assert numbers(frames) == wanted


@pytest.mark.parametrize("name", ["prores.mov", "mjpeg.avi"])
def test_intra_frames_are_decoded_alone(video_files, name):
    with open_video(video_files(name)) as video:
        assert numbers(video.read(FrameSelection(stride=6))) == [0, 6, 12, 18] and video.decoded_frames == 4


def test_frames_are_written_once(video_files):
    """Progress counts frames; what the callback raises ends the read."""
    seen = []
    with open_video(video_files("h264.mp4")) as video:
        video.read(FrameSelection(fps=48), on_frame=seen.append)
        assert seen[0] == 0 and seen[-1] == 48 and sorted(seen) == seen

        def stop(done):
            if done == 5:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            video.read(FrameSelection(), on_frame=stop)
        assert numbers(video.read([20])) == [20]


@pytest.mark.parametrize(
    ("mode", "shape"), [("stretch", (48, 96)), ("fit", (48, 48)), ("crop", (48, 96)), ("pad", (48, 96))]
)
def test_sizes(video_files, mode, shape):
    with open_video(video_files("h264.mp4")) as video:
        frames = video.read([5, 11], size=FrameSize(96, 48, mode), alpha=True)
    assert frames.shape == (2, *shape, 4)
    if mode != "crop":
        inside = frames[:, :, 24:72] if mode == "pad" else frames
        assert numbers(inside) == [5, 11]
    if mode == "pad":
        assert float(frames[:, :, :24].abs().max()) == 0 and float(frames[:, :, 24:72, 3].min()) == 1


def grown(path, how):
    """Bytes by which a process grows above the result while it reads."""
    scripts = str(Path(__file__).resolve().parents[2] / "scripts")
    command = [sys.executable, "-c", CHILD, scripts, str(path), how]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["grew"]


def test_twenty_thousand_frames_stream_in_flat_memory(video_files):
    assert grown(video_files(LONG), "stream") < 60e6


def test_1080p_takes_the_result_and_a_constant(tmp_path):
    import av

    path = tmp_path / "large.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast", "bf": "3", "refs": "4"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for index in range(40):
            frame = av.VideoFrame(1920, 1080, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([100 + index]) * plane.buffer_size)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert grown(path, "read") < 200e6
    assert grown(path, "stream") < 300e6
