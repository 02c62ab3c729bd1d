"""Which frames a selection means and what a picture becomes in a frame, without any video."""

from fractions import Fraction as F

import pytest
from apple_silicon_video.video.errors import VideoError
from apple_silicon_video.video.geometry import MODES, MULTIPLES, FrameSize, Placement
from apple_silicon_video.video.selection import FrameSelection

STEADY = [F(i, 10) for i in range(20)]
END = F(2)
UNEVEN = [F(0), F(1, 10), F(5, 10), F(6, 10), F(15, 10)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, list(range(20))),
        ({"start_frame": 5, "end_frame": 8}, [5, 6, 7]),
        ({"start_frame": -3}, [17, 18, 19]),
        ({"end_frame": -18}, [0, 1]),
        ({"start_frame": -99, "limit": 2}, [0, 1]),
        ({"start_frame": 20}, []),
        ({"start_time": 0.3, "end_time": 0.6}, [3, 4, 5]),
        ({"start_time": F(31, 100), "length": F(2, 10)}, [4, 5]),
        ({"start_time": -0.2}, [18, 19]),
        ({"end_time": -1.8}, [0, 1]),
        ({"start_time": 0.5, "length": 0.1}, [5]),
        ({"stride": 7}, [0, 7, 14]),
        ({"stride": 2, "limit": 3, "start_frame": 1}, [1, 3, 5]),
        ({"limit": 8, "round_to_4n1": True}, [0, 1, 2, 3, 4]),
        ({"limit": 9, "round_to_4n1": True}, list(range(9))),
        ({"limit": 3, "round_to_4n1": True}, [0]),
        ({"fps": 5}, list(range(0, 20, 2))),
        ({"fps": 20, "length": 0.3}, [0, 0, 1, 1, 2, 2]),
        ({"fps": 10, "stride": 4}, [0, 4, 8, 12, 16]),
        ({"fps": 3, "limit": 4}, [0, 3, 6, 10]),
        ({"fps": 10, "start_time": 0.55, "length": 0.2}, [5, 6]),
        ({"length": 0}, []),
    ],
)
def test_indices(options, expected):
    assert FrameSelection(**options).indices(STEADY, END) == expected


def test_uneven_times_are_resampled_by_what_is_shown():
    assert FrameSelection(fps=10).indices(UNEVEN, F(17, 10)) == [0, 1, 1, 1, 1, 2, *[3] * 9, 4, 4]
    assert FrameSelection(start_time=0.2, length=0.5).indices(UNEVEN, F(17, 10)) == [2, 3]


@pytest.mark.parametrize(
    ("options", "section"),
    [
        ({}, (0, 2)),
        ({"start_time": 0.31, "length": 0.2}, (F(4, 10), F(51, 100))),
        ({"limit": 4}, (0, F(4, 10))),
        ({"stride": 3, "limit": 2}, (0, F(6, 10))),
        ({"start_frame": 18, "stride": 3}, (F(18, 10), 2)),
        ({"fps": 4, "limit": 3, "start_time": 0.5}, (F(1, 2), F(5, 4))),
        ({"fps": 4}, (0, 2)),
    ],
)
def test_section_is_the_time_of_the_chosen_frames(options, section):
    assert FrameSelection(**options).section(STEADY, END) == section


def test_rate():
    assert FrameSelection(stride=3).rate(F(24)) == 8 and FrameSelection(fps=12, stride=2).rate(F(24)) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "Every 0th frame"),
        ({"limit": -1}, "at most -1 frames"),
        ({"fps": 0}, "fps is 0; enter a number above 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"length": -1}, "The length is -1 seconds"),
    ],
)
def test_impossible_selections(options, message):
    with pytest.raises(VideoError, match=message):
        FrameSelection(**options)


def test_absurd_rates_are_refused_before_memory_is_used():
    with pytest.raises(VideoError, match="enter a smaller rate"):
        FrameSelection(fps=1e9).indices(STEADY, END)


@pytest.mark.parametrize(
    ("size", "picture", "expected"),
    [
        (FrameSize(), (101, 57), Placement(101, 57, 101, 57)),
        (FrameSize(832, 480), (1920, 1080), Placement(832, 480, 832, 480)),
        (FrameSize(832, 0), (1920, 1080), Placement(832, 468, 832, 468)),
        (FrameSize(0, 480, multiple=16), (1920, 1080), Placement(848, 480, 848, 480)),
        (FrameSize(832, 480, "fit"), (1080, 1920), Placement(270, 480, 270, 480)),
        (FrameSize(832, 480, "crop"), (1920, 1080), Placement(832, 480, 853, 480, -11, 0)),
        (FrameSize(832, 480, "pad"), (1080, 1920), Placement(832, 480, 270, 480, 281, 0)),
        (FrameSize(mode="crop", multiple=16), (1920, 1080), Placement(1920, 1072, 1920, 1080, 0, -4)),
        (FrameSize(mode="pad", multiple=16), (1920, 1080), Placement(1920, 1088, 1920, 1080, 0, 4)),
        (FrameSize(mode="crop", multiple=32), (20, 100), Placement(32, 96, 32, 160, 0, -32)),
        (FrameSize(833, 479, "crop", 32), (1000, 1000), Placement(832, 480, 832, 832, 0, -176)),
    ],
)
def test_placement(size, picture, expected):
    assert size.place(*picture) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("multiple", MULTIPLES)
def test_every_size_is_a_multiple_and_keeps_the_aspect(mode, multiple):
    for box in ((0, 0), (300, 0), (0, 200), (333, 211)):
        for picture in ((640, 360), (97, 331), (3, 2)):
            place = FrameSize(*box, mode, multiple).place(*picture)
            assert place.width % multiple == 0 == place.height % multiple and place.width > 0 < place.height
            if mode in ("crop", "pad"):
                assert abs(place.scaled_width / picture[0] * picture[1] - place.scaled_height) <= max(
                    1, picture[1] / picture[0]
                )
            if mode == "crop":
                assert place.left <= 0 >= place.top
                assert place.scaled_width >= place.width and place.scaled_height >= place.height
            if mode == "pad":
                assert place.left >= 0 <= place.top
                assert place.scaled_width <= place.width and place.scaled_height <= place.height


def test_impossible_sizes():
    with pytest.raises(VideoError, match="mode 'zoom' is none of"):
        FrameSize(mode="zoom")
    with pytest.raises(VideoError, match="cannot be made"):
        FrameSize(width=-1)
