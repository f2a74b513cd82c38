"""Sources against what is really there: files, a video whose frames are known, and real robot episodes."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from oxe_layouts import COLOUR, LAYOUTS, motion
from PIL import Image

from spear_lightning.errors import ConfigError, DataError
from spear_lightning.labeling.sources import ImageFolder, ImageRef, RobotFrames
from spear_lightning.labeling.video_source import VideoFrames
from spear_lightning.labeling.work_split import WorkSplit
from spear_lightning.robot_data.images import decode_image

RATE = 10


def test_a_folder_yields_its_pictures_by_relative_path(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/c.png", "a/d.jpeg", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "empty").mkdir()
    source = ImageFolder(str(tmp_path))
    assert [ref.image_id for ref in source.refs()] == ["a/c.png", "a/d.jpeg", "b.JPG"]
    assert source.read(ImageRef("a/c.png", "")) == b"a/c.png"
    assert source.name == tmp_path.name
    with pytest.raises(DataError, match="An image cannot be read"):
        source.read(ImageRef("gone.jpg", ""))
    with pytest.raises(DataError, match=r"(?s)no images.*\.jpg"):
        list(ImageFolder(str(tmp_path / "empty")).refs())
    with pytest.raises(DataError, match="does not exist"):
        list(ImageFolder(str(tmp_path / "nowhere")).refs())


STORED_AS = {
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen),
    7: lambda seen: np.rot90(seen, 2).transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen, -1),
}
"""How a camera that writes an orientation tag stores what is to be seen (EXIF 2.3, tag 0x0112)."""


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_pictures_of_a_folder_are_upright(orientation: int, ending: str, tmp_path: Path) -> None:
    seen = np.zeros((32, 48, 3), np.uint8)
    seen[:16, :16, 0] = seen[16:, :16, 1] = seen[16:, 32:, 2] = 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](seen)))
    path = tmp_path / f"a.{ending}"
    stored.save(path, exif=exif, **({"quality": 98, "subsampling": 0} if ending == "jpg" else {}))
    data = ImageFolder(str(tmp_path)).read(ImageRef(path.name, ""))
    np.testing.assert_allclose(decode_image(data, "a").astype(int), seen, atol=12)
    # Others who are sent the bytes must not turn them again; what is upright is not encoded anew.
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112, 1) == 1
    assert (data == path.read_bytes()) == (orientation == 1)


def test_other_tags_of_a_turned_picture_may_be_of_any_kind(tmp_path: Path) -> None:
    # Orientation 6 as a short, XResolution (a ratio, says EXIF) as the text "72": Pillow cannot write that anew.
    header, entries = b"Exif\0\0MM\0*\0\0\0\x08", [(0x0112, 3, 1, b"\0\x06\0\0"), (0x011A, 2, 3, b"72\0\0")]
    rows = b"".join(struct.pack(">HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = header + struct.pack(">H", len(entries)) + rows + bytes(4)
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:, 24:] = 250
    Image.fromarray(stored).save(tmp_path / "odd.jpg", quality=95, exif=exif)
    (ref,) = ImageFolder(str(tmp_path)).refs()
    shown = decode_image(ImageFolder(str(tmp_path)).read(ref), "odd.jpg")
    assert shown.shape == (48, 32, 3)
    assert shown[:20].max() < 20
    assert shown[28:].min() > 230


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 12.5 s at 10 Hz whose frame n has the grey level 2 n, with a key frame every three seconds."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    (folder / "day").mkdir()
    with av.open(str(folder / "day" / "take.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 30
        for number in range(125):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 2 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


def grey(source: VideoFrames, ref: ImageRef) -> float:
    return float(simplejpeg.decode_jpeg(source.read(ref)).mean())


def test_a_video_yields_the_frame_shown_at_each_time(video_folder: Path) -> None:
    source = VideoFrames(str(video_folder), rate_hz=0.8, chunk_s=5.0)
    refs = list(source.refs())
    assert [ref.image_id for ref in refs[:3]] == [f"day/take.mp4@{t:09d}ms" for t in (0, 1250, 2500)]
    # At 1.25 s frame 12 is shown, which came at 1.2 s.
    expected = [2 * int(1.25 * number * RATE + 1e-6) for number in range(10)]
    assert len(refs) == 10
    np.testing.assert_allclose([grey(source, ref) for ref in refs], expected, atol=4)
    assert [ref.group for ref in refs] == [f"day/take.mp4#{int(1.25 * n / 5)}" for n in range(10)]


def test_frames_do_not_depend_on_the_order_they_are_read_in(video_folder: Path) -> None:
    refs = list(VideoFrames(str(video_folder), rate_hz=2).refs())
    forward = VideoFrames(str(video_folder))
    expected = {ref.image_id: forward.read(ref) for ref in refs}
    source = VideoFrames(str(video_folder))
    for number in np.random.default_rng(0).permutation(len(refs)).tolist():
        assert source.read(refs[number]) == expected[refs[number].image_id]


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((0, 1, -1, 0), lambda stored: stored.transpose(1, 0, 2)[:, ::-1]),
        ((-1, 0, 0, -1), lambda stored: stored[::-1, ::-1]),
        ((0, -1, 1, 0), lambda stored: stored.transpose(1, 0, 2)[::-1]),
    ],
)
def test_a_video_is_upright(
    matrix: tuple[int, ...], turned: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    """A track has QuickTime's matrix a, b, c, d: pixel (x, y) is shown at (a x + c y, b x + d y), shifted."""
    av = pytest.importorskip("av")
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:24, :32, 0] = stored[24:, 32:, 2] = 240
    path = tmp_path / "take.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode())
    a, b, c, d = (number << 16 for number in matrix)
    written, one = path.read_bytes(), 1 << 16
    start = written.index(struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30), written.index(b"tkhd"))
    path.write_bytes(written[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + written[start + 36 :])
    source = VideoFrames(str(tmp_path))
    shown = simplejpeg.decode_jpeg(source.read(next(source.refs()))).astype(int)
    expected = turned(stored)
    assert shown.shape == expected.shape
    # Edges blur: colours are stored at half the resolution.
    assert np.abs(shown - expected).mean() < 12


def test_a_broken_video_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(DataError, match="video cannot be opened"):
        list(VideoFrames(str(tmp_path)).refs())
    with pytest.raises(ConfigError, match="positive"):
        VideoFrames(str(tmp_path), rate_hz=0)


def test_robot_frames_are_those_of_the_episodes(bridge_folder: Path, tmp_path: Path) -> None:
    source = RobotFrames(str(bridge_folder), seconds_apart=1.0, index_folder=str(tmp_path))
    refs = list(source.refs())
    # 25 episodes of 10 steps at 5 Hz: steps 0 and 5 of each.
    assert len(refs) == 50
    assert [ref.image_id.split("/")[-2] for ref in refs[:4]] == ["00000", "00005"] * 2
    assert len({ref.image_id for ref in refs}) == 50
    pictures = [decode_image(source.read(ref), ref) for ref in refs]
    assert {picture.shape for picture in pictures} == {(64, 64, 3)}
    assert min(picture.std() for picture in pictures) > 10
    with pytest.raises(ConfigError, match="no such camera"):
        RobotFrames(str(bridge_folder), camera="nose", index_folder=str(tmp_path))


@pytest.mark.parametrize(("dataset", "camera"), [("hydra", "wrist"), ("fmb", "primary")])
def test_robot_frames_show_their_colours_however_they_are_stored(
    dataset: str, camera: str, tmp_path: Path
) -> None:
    layout = LAYOUTS[dataset]
    assert camera in layout.blue_first
    folder = layout.write(tmp_path, [layout.serialize(motion(layout.centre, 30, seed=0))])
    source = RobotFrames(str(folder), camera, index_folder=str(tmp_path / "index"))
    data = source.read(next(iter(source.refs())))
    assert np.abs(decode_image(data, "a")[-1, -1].astype(int) - COLOUR).max() <= 4


def test_every_image_belongs_to_one_process_whoever_asks() -> None:
    groups = [f"image {number}" for number in range(2000)]
    for world in (1, 3, 8):
        owners = [[g for g in groups if WorkSplit(rank, world).owns(g)] for rank in range(world)]
        assert sorted(group for own in owners for group in own) == sorted(groups)
        assert min(map(len, owners)) > 0.7 * len(groups) / world
    # Stable: the hash must never change, or a resumed run would divide its work in another way.
    assert [WorkSplit(rank, 8).owns("a.jpg") for rank in range(8)].index(True) == 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, WorkSplit(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, WorkSplit(5, 8, 1)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"},
            WorkSplit(2, 4, 0),
        ),
        # A batch script of an allocation that starts us without srun: one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, WorkSplit(0, 1, 0)),
    ],
)
def test_the_launcher_says_who_we_are(environment: dict[str, str], expected: WorkSplit) -> None:
    assert WorkSplit.from_environment(environment) == expected


@pytest.mark.parametrize("environment", [{"RANK": "one"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_a_contradicting_launcher_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="launcher"):
        WorkSplit.from_environment(environment)
