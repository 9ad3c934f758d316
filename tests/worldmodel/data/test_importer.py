"""Importing videos, GIFs and image folders: frames, rates, sizes, actions, splits, refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigError, DataError
from worldmodel.data.importer import ImportConfig, find_videos, kept_frames, read_actions, run_import
from worldmodel.data.records import END_CUT, END_OF_VIDEO, find_problems, open_dataset, read_manifest

HEIGHT, WIDTH = 48, 64


def picture(time: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A flat frame whose grey level is its time: survives lossy codecs within a few levels."""
    return np.full((height, width, 3), 8 * time % 256, np.uint8)


def write_images(folder: Path, frames: int, *, start: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(frames):
        Image.fromarray(picture(start + t)).save(folder / f"frame{t}.png")
    return folder


def write_video(path: Path, frames: int, fps: int = 20) -> Path:
    codec = {"mp4": "libx264", "webm": "libvpx-vp9"}[path.suffix[1:]]
    writer = imageio_ffmpeg.write_frames(str(path), (WIDTH, HEIGHT), fps=fps, codec=codec, macro_block_size=1)
    writer.send(None)
    for t in range(frames):
        writer.send(picture(t).tobytes())
    writer.close()
    return path


def write_gif(path: Path, frames: int, duration_ms: int = 100) -> Path:
    images = [Image.fromarray(picture(t)) for t in range(frames)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=duration_ms, loop=0)
    return path


def times(data_dir: Path, split: str = "train", episode: int = 0) -> list[int]:
    """The source time of each frame, read off its grey level."""
    items = open_dataset(data_dir, split).read(episode)["items"]
    return (items.mean((1, 2, 3)) / 8).round().astype(int).tolist()


def config(source: Path, out_dir: Path, **options: Any) -> ImportConfig:
    defaults = {"height": 16, "width": 16, "val_fraction": 0.0, "test_fraction": 0.0, "quiet": True}
    return ImportConfig(source=source, out_dir=out_dir, **{**defaults, **options})


def test_image_folders_come_in_natural_order(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "a", 12)
    manifest = run_import(config(tmp_path / "in", tmp_path / "out"))
    assert times(tmp_path / "out") == list(range(12))
    assert manifest["fps"] == 15
    assert manifest["num_actions"] == 0
    dataset = open_dataset(tmp_path / "out", "train")
    assert dataset.episodes[0].end == END_OF_VIDEO
    assert (dataset.read(0)["actions"] == -1).all()
    assert find_problems(tmp_path / "out") == []


@pytest.mark.parametrize("suffix", ["mp4", "webm", "gif"])
def test_videos_come_with_their_rate(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v.{suffix}"
    _ = write_gif(path, 20, 50) if suffix == "gif" else write_video(path, 20)
    manifest = run_import(config(path, tmp_path / "out"))
    assert times(tmp_path / "out") == list(range(20))
    assert manifest["fps"] == pytest.approx(20)
    assert run_import(config(path, tmp_path / "half", fps=10))["fps"] == 10
    assert times(tmp_path / "half") == list(range(0, 20, 2))


def test_a_rate_keeps_the_frame_shown_at_each_instant() -> None:
    assert list(itertools.islice(kept_frames(30, 10), 5)) == [0, 3, 6, 9, 12]
    assert list(itertools.islice(kept_frames(25, 10), 5)) == [0, 2, 5, 7, 10]
    assert list(itertools.islice(kept_frames(29.97, None), 4)) == [0, 1, 2, 3]


def test_frames_cannot_be_invented(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 5)
    with pytest.raises(ConfigError, match="20 frames a second, 30 wanted"):
        run_import(config(tmp_path / "v.mp4", tmp_path / "out", fps=30))
    assert run_import(config(tmp_path / "v.mp4", tmp_path / "out2", fps=30, source_fps=30))["fps"] == 30


def test_a_video_that_is_cut_off_is_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.webm", 60)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"v.webm: \d+ frames could be decoded of about 60"):
        run_import(config(path, tmp_path / "out"))


def test_videos_of_different_rates_need_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.mp4", 5, fps=20)
    write_video(tmp_path / "in" / "b.mp4", 5, fps=10)
    with pytest.raises(DataError, match=r"20 frames a second.*10: a model needs one rate.*--fps"):
        run_import(config(tmp_path / "in", tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    assert run_import(config(tmp_path / "in", tmp_path / "out", fps=10))["splits"]["train"]["frames"] == 3 + 5


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_other_aspect_ratios(tmp_path: Path, mode: Any) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, :10, 0], wide[:, 10:20, 1], wide[:, 20:, 2] = 255, 255, 255
    Image.fromarray(wide).save(folder / "0.png")
    run_import(config(folder, tmp_path / "out", resize=mode, height=12, width=12))
    frame = open_dataset(tmp_path / "out", "train").read(0)["items"][0]
    if mode == "crop":  # The green middle third alone.
        assert (frame == (0, 255, 0)).all()
    elif mode == "pad":
        assert (frame[:4] == 0).all()
        assert (frame[-4:] == 0).all()
        assert (frame[5:7, 1] == (255, 0, 0)).all()
    else:
        assert (frame[:, :4] == (255, 0, 0)).all()
        assert (frame[:, 8:] == (0, 0, 255)).all()


# ------------------------------------------------------------------------------------------------------------ actions


def two_videos(tmp_path: Path) -> Path:
    write_images(tmp_path / "in" / "a", 4)
    write_images(tmp_path / "in" / "b", 3, start=10)
    return tmp_path / "in"


ROWS = [("a", 0, 1), ("a", 1, 0), ("a", 3, 2), ("b", 0, 2), ("b", 1, 2), ("b", 2, 0)]
EXPECTED = {"a": [1, 0, -1, 2], "b": [2, 2, 0]}


def write_actions(path: Path, form: str) -> Path:
    if form == "csv":
        path.write_text("video,frame,action\n" + "".join(f"{v},{f},{a}\n" for v, f, a in ROWS))
    elif form == "jsonl":
        path.write_text("".join(json.dumps({"video": v, "frame": f, "action": a}) + "\n" for v, f, a in ROWS))
    elif form == "lists":
        path.write_text("".join(json.dumps({"video": v, "actions": a}) + "\n" for v, a in EXPECTED.items()))
    else:
        np.savez(path, a=np.asarray(EXPECTED["a"]), b=np.asarray(EXPECTED["b"]))
    return path


@pytest.mark.parametrize(("form", "suffix"), [("csv", "csv"), ("jsonl", "jsonl"), ("lists", "jsonl"), ("npz", "npz")])
def test_actions_stay_with_their_frames(tmp_path: Path, form: str, suffix: str) -> None:
    source, actions = two_videos(tmp_path), write_actions(tmp_path / f"actions.{suffix}", form)
    manifest = run_import(config(source, tmp_path / "out", actions=actions))
    assert manifest["num_actions"] == 3
    dataset = open_dataset(tmp_path / "out", "train")
    for episode, name in enumerate(manifest["splits"]["train"]["videos"]):
        assert dataset.read(episode)["actions"].tolist() == EXPECTED[name]


def test_a_lower_rate_keeps_the_actions_of_the_kept_frames(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 7)
    (tmp_path / "actions.csv").write_text("action\n" + "\n".join("0123456"))
    run_import(config(tmp_path / "in", tmp_path / "out", actions=tmp_path / "actions.csv", source_fps=30, fps=15))
    got = open_dataset(tmp_path / "out", "train").read(0)["actions"].tolist()
    assert got == times(tmp_path / "out") == [0, 2, 4, 6]


def test_named_actions_are_numbered(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 4)
    (tmp_path / "actions.jsonl").write_text('{"actions": ["right", "jump", "right", "left"]}\n')
    manifest = run_import(config(tmp_path / "in", tmp_path / "out", actions=tmp_path / "actions.jsonl", num_actions=4))
    assert manifest["action_names"] == ["jump", "left", "right", "3"]
    assert open_dataset(tmp_path / "out", "train").read(0)["actions"].tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "video,frame,button\na,0,1\n", r"column `action` is needed"),
        ("a.csv", "frame,action\n0,1\n", r"line 2: no `video`, but there are 2 videos"),
        ("a.csv", "video,frame,action\nc,0,1\n", r"line 2: video 'c' is not in the source"),
        ("a.csv", "video,frame,action\na,-1,1\n", r"line 2: frame '-1'"),
        ("a.csv", "video,frame,action\na,0,1\na,0,2\n", r"line 3: a second action for frame 0"),
        ("a.csv", "video,frame,action\na,9,1\n", r"action for frame 9 of 'a', which has 4 frames"),
        ("a.csv", "video,frame,action\na,0,-3\n", r"expected numbers in \[-1"),
        ("a.csv", "video,frame,action\na,0,99999\n", r"99999: expected numbers in"),
        ("a.csv", "video,frame,action\na,0,1\na,1,jump\n", r"numbers and names are mixed"),
        ("a.csv", "video,frame,action\n", r"holds no action"),
        ("a.jsonl", '{"video": "a"}\n', r"line 1: expected an object with `action`"),
        ("a.jsonl", "{nope\n", r"not readable"),
        ("a.txt", "1\n", r"expected a .csv, .jsonl or .npz"),
        ("a.npz", "not a zip", r"not readable as npz"),
        ("b.csv", None, r"not readable"),
    ],
)
def test_bad_actions_are_named(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    source = two_videos(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        run_import(config(source, tmp_path / "out", actions=tmp_path / name))


def test_pickled_actions_are_refused(tmp_path: Path) -> None:
    source = two_videos(tmp_path)
    np.savez(tmp_path / "a.npz", a=np.asarray([{"evil": 1}], dtype=object))
    with pytest.raises(DataError, match="not readable as npz"):
        read_actions(tmp_path / "a.npz", find_videos(source))
    np.savez(tmp_path / "b.npz", a=np.zeros((2, 2), int))
    with pytest.raises(DataError, match=r"array 'a': shape \(2, 2\)"):
        read_actions(tmp_path / "b.npz", find_videos(source))
    np.savez(tmp_path / "c.npz", a=np.zeros(2))
    with pytest.raises(DataError, match=r"array 'a': dtype float64"):
        read_actions(tmp_path / "c.npz", find_videos(source))


def test_too_few_actions_declared(tmp_path: Path) -> None:
    source, actions = two_videos(tmp_path), write_actions(tmp_path / "a.csv", "csv")
    with pytest.raises(DataError, match=r"has action 2, outside \[0, 2\)"):
        run_import(config(source, tmp_path / "out", actions=actions, num_actions=2))


# ------------------------------------------------------------------------------------------------------------- splits


def test_whole_videos_go_to_splits(tmp_path: Path) -> None:
    for i in range(10):
        write_images(tmp_path / "in" / f"v{i}", 2, start=i)
    options = {"val_fraction": 0.2, "test_fraction": 0.1}
    manifest = run_import(config(tmp_path / "in", tmp_path / "out", **options))
    members = {split: set(value["videos"]) for split, value in manifest["splits"].items()}
    assert {split: len(names) for split, names in members.items()} == {"train": 7, "val": 2, "test": 1}
    assert set.union(*members.values()) == {f"v{i}" for i in range(10)}
    again = run_import(config(tmp_path / "in", tmp_path / "again", **options))
    assert again == manifest
    other = run_import(config(tmp_path / "in", tmp_path / "other", seed=1, **options))
    assert other["splits"]["val"]["videos"] != manifest["splits"]["val"]["videos"]


def test_a_single_video_is_cut_by_time(tmp_path: Path) -> None:
    write_images(tmp_path / "in", 20)
    run_import(config(tmp_path / "in", tmp_path / "out", val_fraction=0.2, test_fraction=0.1))
    assert times(tmp_path / "out") == list(range(14))
    assert times(tmp_path / "out", "val") == list(range(14, 18))
    assert times(tmp_path / "out", "test") == list(range(18, 20))
    ends = [open_dataset(tmp_path / "out", split).episodes[0].end for split in ("train", "val", "test")]
    assert ends == [END_CUT, END_CUT, END_OF_VIDEO]


# ----------------------------------------------------------------------------------------------------------- refusals


def test_unusable_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        run_import(config(tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no video"):
        run_import(config(tmp_path / "empty", tmp_path / "out"))
    for name in ("v.mp4", "v.gif"):
        (tmp_path / name).write_bytes(b"not a video at all")
        with pytest.raises(DataError, match=name):
            run_import(config(tmp_path / name, tmp_path / "out"))
    folder = write_images(tmp_path / "in", 3)
    (folder / "frame1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"frame1.png: not readable as an image"):
        run_import(config(folder, tmp_path / "out"))
    Image.fromarray(picture(0, 20, 20)).save(folder / "frame1.png")
    with pytest.raises(DataError, match=r"frame1.png: 20x20 pixels, the images before it 64x48"):
        run_import(config(folder, tmp_path / "out"))
    for options, message in (
        ({"height": 0}, "size 0x16"),
        ({"fps": 0.0}, "fps 0.0"),
        ({"val_fraction": 0.7, "test_fraction": 0.3}, "val_fraction"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_import(config(folder, tmp_path / "out", **options))


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    source = write_images(tmp_path / "in", 3)
    first = run_import(config(source, tmp_path / "out"))
    with pytest.raises(DataError, match="--overwrite"):
        run_import(config(source, tmp_path / "out"))
    assert read_manifest(tmp_path / "out") == first
    run_import(config(source, tmp_path / "out", height=8, overwrite=True))
    assert open_dataset(tmp_path / "out", "train").frame_shape == (8, 16, 3)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not deleted"):
        run_import(config(source, tmp_path / "mine", overwrite=True))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_imported_set_without_actions_can_be_loaded(tmp_path: Path) -> None:
    """Video without actions is what latent action models are for: every action is -1 and nothing complains."""
    from worldmodel.data.pipeline import make_loader

    run_import(config(write_images(tmp_path / "in", 12), tmp_path / "out"))
    batch = next(make_loader(tmp_path / "out", split="train", seq_len=4, batch_size=3, seed=0, num_threads=0))
    assert (batch["actions_BT"] == -1).all()
    assert batch["frames_BTHWC"].shape == (3, 4, 16, 16, 3)
