"""A video file's own streams into a new container with new metadata, without encoding anything again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av

from .encode_job import EncodedVideo
from .output_file import OutputFile, writing
from .video_formats import VideoFormat


def fits(source: str | Path | BytesIO, video_format: VideoFormat) -> bool:
    """Whether the file holds one video stream as this format's encoders make it, and only sound that it takes."""
    layouts = {encoder.pixel_format for encoder in video_format.video_encoders}
    layouts |= {encoder.alpha_pixel_format for encoder in video_format.video_encoders if encoder.alpha_pixel_format}
    sounds = {av.Codec(encoding.encoder, "w").canonical_name for encoding in video_format.audio}
    try:
        with _opened(source) as container:
            video, audio = container.streams.video, container.streams.audio
            return (
                video_format.codec is not None
                and (len(video), len(container.streams)) == (1, 1 + len(audio))
                and video[0].codec_context.codec.canonical_name == video_format.codec
                and video[0].codec_context.pix_fmt in layouts
                and all(stream.codec_context.codec.canonical_name in sounds for stream in audio)
            )
    except (OSError, ValueError):
        return False


def copy_streams(
    names: Path | Iterable[Path],
    source: str | Path | BytesIO,
    video_format: VideoFormat,
    metadata: Mapping[str, str],
    on_frame: Callable[[int], None] = lambda done: None,
) -> EncodedVideo:
    """Write what `fits` into a file of this format. names, on_frame: as for VideoWriter; sizes and times stay.

    Raises VideoError, one sentence, for a folder that cannot be used; nothing is left behind when it fails.
    """
    candidates = [names] if isinstance(names, Path) else names
    with OutputFile(candidates, replace=isinstance(names, Path)) as output, _opened(source) as template:
        video = template.streams.video[0]
        rate = Fraction(video.average_rate or 1)
        options = video_format.muxer_options(rate)
        if video_format.timescale_option and video.time_base is not None:
            options["video_track_timescale"] = str(video.time_base.denominator)  # PyAV before 15 sets no clock itself
        with writing(output.path):
            target = av.open(str(output.partial), "w", format=video_format.container, options=options)
        with target:
            target.metadata.update(metadata)
            streams = {
                stream.index: target.add_stream_from_template(stream, opaque=True) for stream in template.streams
            }
            if video_format.codec_tag:
                streams[video.index].codec_context.codec_tag = video_format.codec_tag
            with writing(output.path):
                target.start_encoding()
            count = 0
            on_frame(0)
            for packet in template.demux():
                if packet.size == 0:
                    continue
                is_video = packet.stream.index == video.index
                packet.stream = streams[packet.stream.index]
                with writing(output.path):
                    target.mux(packet)
                if is_video:
                    count += 1
                    on_frame(count)
            size = video.codec_context.width, video.codec_context.height
            has_audio = bool(template.streams.audio)
            with writing(output.path):
                target.close()
        return EncodedVideo(output.publish(), *size, count, rate, "copy", has_audio)


def _opened(source: str | Path | BytesIO) -> av.container.InputContainer:
    if isinstance(source, BytesIO):
        source.seek(0)
        return av.open(source, "r")
    return av.open(f"file:{source}", "r")
