"""Records: round trip, windows, uniformity, digests, and a named error for every kind of damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from worldmodel.data import records
from worldmodel.data.records import (
    END_CUT,
    EpisodeEncoder,
    RecordLayout,
    RecordWriter,
    encode_episode,
    episode_digest,
    find_problems,
    open_dataset,
    read_manifest,
    write_manifest,
)

MakeSet = Callable[..., Path]


def raw_records(path: Path) -> list[bytes]:
    reader = array_record_module.ArrayRecordReader(str(path))
    return [reader.read(i, i + 1)[0] for i in range(reader.num_records())]


def rewrite(path: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Replace a file's records; the container's own checksums are right, so only our checks can see the change."""
    changed = change(raw_records(path))
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in changed:
        writer.write(record)
    writer.close()
    manifest_path = path.parent / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    for split in manifest["splits"].values():
        for entry in split["files"]:
            if entry["name"] == path.name:
                entry["bytes"] = path.stat().st_size
    manifest_path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("scan", ["rows", "columns", "auto"])
def test_episodes_come_back_exactly(make_set: MakeSet, synthetic: Any, scan: str) -> None:
    dataset = open_dataset(make_set(scan=scan), "train")
    assert [e.num_frames for e in dataset.episodes] == [9, 3, 17, 1, 8]
    assert [e.file_index for e in dataset.episodes] == [0, 0, 0, 1, 1]
    assert [e.level_seed for e in dataset.episodes] == [100, 101, 102, 103, 104]
    for episode, length in enumerate([9, 3, 17, 1, 8]):
        frames, actions, rewards = synthetic.episode_arrays(episode, length)
        got = dataset.read(episode)
        assert np.array_equal(got["items"], frames)
        assert np.array_equal(got["actions"], actions)
        assert np.array_equal(got["rewards"], rewards)
        assert dataset.episodes[episode].digest == episode_digest(frames, actions, rewards, 100 + episode).hex()


@pytest.mark.parametrize("scan", ["rows", "columns"])
@pytest.mark.parametrize("seq_len", [1, 3, 4, 5, 9])
def test_every_window_is_inside_one_episode(make_set: MakeSet, synthetic: Any, scan: str, seq_len: int) -> None:
    dataset = open_dataset(make_set(scan=scan), "train")
    expected = [(e, t) for e, length in enumerate([9, 3, 17, 1, 8]) for t in range(length - seq_len + 1)]
    assert dataset.num_windows(seq_len) == len(expected)
    items, actions = dataset.windows(range(len(expected)), seq_len)
    assert items is not None
    for number, (episode, start) in enumerate(expected):
        assert dataset.locate(number, seq_len) == (episode, start)
        frames, all_actions, rewards = synthetic.episode_arrays(episode, start + seq_len)
        assert np.array_equal(items[number], frames[start:])
        assert np.array_equal(actions[number], all_actions[start:])
        one = dataset.window(number, seq_len)
        assert np.array_equal(one["items"], frames[start:])
        assert np.array_equal(one["rewards"], rewards[start:])


def test_a_window_decodes_only_the_groups_that_it_touches(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(make_set({"train": [[40]]}), "train")
    read: list[int] = []
    original = records.RecordFile._read_raw
    monkeypatch.setattr(
        records.RecordFile, "_read_raw", lambda self, record: read.append(record) or original(self, record)
    )
    dataset.window(10, 4)  # frames 10 to 13 of groups of 4
    assert read == [2, 3]


def test_windows_longer_than_every_episode_are_refused(make_set: MakeSet) -> None:
    dataset = open_dataset(make_set(), "train")
    assert dataset.num_windows(18) == 0
    with pytest.raises(DataError, match=r"no episode has 18 frames.*longest has 17"):
        dataset.require_windows(18)
    with pytest.raises(DataError, match="expected a number in"):
        dataset.locate(dataset.num_windows(4), 4)


def test_fixed_windows_are_fixed_different_and_spread(make_set: MakeSet) -> None:
    data_dir = make_set({"train": [[200, 3, 100]]})
    first, second = (open_dataset(data_dir, "train").fixed_windows(50, 5, seed=3) for _ in range(2))
    assert np.array_equal(first["frames_BTHWC"], second["frames_BTHWC"])
    assert first["frames_BTHWC"].shape == (50, 5, 6, 10, 3)
    assert len(set(first["windows_B"].tolist())) == 50
    other = open_dataset(data_dir, "train").fixed_windows(50, 5, seed=4)
    assert not np.array_equal(first["windows_B"], other["windows_B"])
    with pytest.raises(DataError, match="1000 clips"):
        open_dataset(data_dir, "train").fixed_windows(1000, 5)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)), st.tuples(st.integers(1, 40))),
    length=st.integers(1, 23),
    group_frames=st.integers(1, 9),
    scan=st.sampled_from(["rows", "columns", "auto"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_round_trips(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    length: int,
    group_frames: int,
    scan: Any,
    seed: int,
) -> None:
    dtype = "uint8" if len(shape) == 3 else "uint16"
    rng = np.random.default_rng(seed)
    layout = RecordLayout(shape, dtype, num_actions=3, group_frames=group_frames, scan=scan)
    items = rng.integers(0, np.iinfo(dtype).max, (length, *shape), endpoint=True).astype(dtype)
    actions, rewards = rng.integers(-1, 3, length), rng.normal(size=length).astype(np.float32)
    folder = tmp_path_factory.mktemp("any")
    with RecordWriter(folder / "x.array_record", layout) as writer:
        writer.write(encode_episode(layout, items, actions, rewards, level_seed=seed))
    file = records.RecordFile(folder / "x.array_record", layout)
    start = int(rng.integers(0, length))
    count = int(rng.integers(1, length - start + 1))
    got, got_actions, got_rewards = np.empty((count, *shape), dtype), np.empty(count, int), np.empty(count, np.float32)
    file.read_span(0, start, count, items_ND=got, actions_N=got_actions, rewards_N=got_rewards)
    span = slice(start, start + count)
    assert np.array_equal(got, items[span])
    assert np.array_equal(got_actions, actions[span])
    assert np.array_equal(got_rewards, rewards[span])


def test_sideways_scrolling_is_stored_by_columns() -> None:
    """The reason for the scan order: the "auto" choice must find it, and not take it where it does harm."""
    rng = np.random.default_rng(0)
    world = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    sideways = np.stack([world[:, t : t + 64] for t in range(16)])
    layouts = {scan: RecordLayout((64, 64, 3), scan=scan) for scan in ("rows", "columns", "auto")}
    size = {scan: sum(map(len, encode_episode(layout, sideways).payloads)) for scan, layout in layouts.items()}
    assert size["auto"] == size["columns"] < 0.8 * size["rows"]
    upwards = sideways.swapaxes(1, 2).copy()
    size = {scan: sum(map(len, encode_episode(layout, upwards).payloads)) for scan, layout in layouts.items()}
    assert size["auto"] == size["rows"] < 0.8 * size["columns"]


def test_equal_content_gives_equal_files(make_set: MakeSet) -> None:
    one, two = make_set(name="one"), make_set(name="two")
    for name in ("train-00000.array_record", "val-00000.array_record", "manifest.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_the_digest_is_of_the_content_not_of_the_compressor(make_set: MakeSet) -> None:
    plain, other = make_set(name="one"), make_set(name="two", scan="columns", zstd_level=1, group_frames=7)
    assert (plain / "train-00000.array_record").read_bytes() != (other / "train-00000.array_record").read_bytes()
    assert read_manifest(plain)["content_sha256"] == read_manifest(other)["content_sha256"]
    shorter = make_set({"train": [[9, 3, 17], [1, 7]], "val": [[12, 5]]}, name="three")
    assert read_manifest(plain)["content_sha256"] != read_manifest(shorter)["content_sha256"]


def test_the_writer_leaves_nothing_behind_after_an_error(tmp_path: Path) -> None:
    layout = RecordLayout((2, 2, 3), num_actions=2)
    path = tmp_path / "x.array_record"
    with pytest.raises(DataError), RecordWriter(path, layout) as writer:
        writer.write(encode_episode(layout, np.zeros((3, 2, 2, 3), np.uint8), np.full(3, 7)))
    assert list(tmp_path.iterdir()) == []


def test_bad_input_to_the_encoder_is_refused() -> None:
    layout = RecordLayout((2, 2, 3), num_actions=4)
    encoder = EpisodeEncoder(layout)
    with pytest.raises(DataError, match="without frames"):
        encoder.finish(level_seed=0, end=END_CUT)
    with pytest.raises(DataError, match=r"shape \(2, 3, 3\).*expected \(2, 2, 3\)"):
        encoder.add_item(np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(DataError, match="float32"):
        encoder.add_item(np.zeros((2, 2, 3), np.float32))
    encoder.add_item(np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(DataError, match="1 frames but 0 actions"):
        encoder.finish(level_seed=0, end=END_CUT)
    encoder.add_step(4, 0.0)
    with pytest.raises(DataError, match=r"action 4 is outside \[0, 4\)"):
        encoder.finish(level_seed=0, end=END_CUT)
    with pytest.raises(DataError, match="3 frames, 2 actions"):
        encode_episode(layout, np.zeros((3, 2, 2, 3), np.uint8), np.zeros(2, int))
    for bad in ({"item_shape": ()}, {"item_shape": (0, 2)}, {"dtype": "float32"}, {"group_frames": 0}):
        with pytest.raises(DataError):
            RecordLayout(**{"item_shape": (2, 2, 3), **bad})


# ------------------------------------------------------------------------------------------------------------- damage


def test_a_sound_set_has_no_problems(make_set: MakeSet) -> None:
    assert find_problems(make_set()) == []


def test_any_flipped_byte_is_found_and_never_crashes(make_set: MakeSet) -> None:
    data_dir = make_set({"train": [[9, 3]]})
    path = data_dir / "train-00000.array_record"
    sound = path.read_bytes()
    positions = np.random.default_rng(0).choice(len(sound), 60, replace=False)
    for position in positions.tolist():
        damaged = bytearray(sound)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        problems = find_problems(data_dir)
        assert problems, position
        assert all(problem.file == path.name for problem in problems)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_truncated_file_is_named(make_set: MakeSet, keep: float) -> None:
    data_dir = make_set()
    path = data_dir / "train-00001.array_record"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"train-00001.array_record.*the manifest says"):
        open_dataset(data_dir, "train")
    assert find_problems(data_dir)[0].file == path.name
    manifest = json.loads((data_dir / "manifest.json").read_text())
    manifest["splits"]["train"]["files"][1]["bytes"] = path.stat().st_size  # A manifest that agrees hides nothing.
    (data_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"train-00001.array_record: not a complete ArrayRecord file"):
        open_dataset(data_dir, "train")


def test_a_damaged_record_is_named_when_it_is_read(make_set: MakeSet) -> None:
    data_dir = make_set({"train": [[40]]})
    path = data_dir / "train-00000.array_record"
    third = raw_records(path)[3]
    content = bytearray(path.read_bytes())
    content[content.index(third) + len(third) - 3] ^= 1
    path.write_bytes(content)
    dataset = open_dataset(data_dir, "train")
    dataset.window(0, 12)
    with pytest.raises(DataError, match=r"train-00000.array_record, record 3: damaged"):
        dataset.window(1, 12)
    assert {problem.record for problem in find_problems(data_dir)} == {None, 3}


def flip(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda record: record[:offset] + value + record[offset + len(value) :]


BAD_COMPRESSION = zstandard.ZstdCompressor().compress(bytes(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[:20], "20 bytes, shorter than a header"),
        (flip(0, b"XXXX"), "header b'XXXX'"),
        (flip(4, b"\x02"), "version 2, expected"),
        (flip(5, b"\x09"), "unknown codec 9"),
        (flip(6, b"\x07"), "unknown codec 1 or scan order 7"),
        (flip(7, b"\x01"), "dtype uint16"),
        (flip(7, b"\x63"), "dtype code 99"),
        (flip(8, b"\x05"), "of episode 5"),
        (flip(12, b"\x08"), "from frame 8 of"),
        (flip(16, b"\x03"), "3 frames from"),
        (flip(18, b"\x09"), r"shape \(9, 10, 3\)"),
        (flip(24, b"\x01\x00\x00\x00"), "its header says"),
        (lambda r: r + b"!", "its header says"),
        (flip(32, b"\x05\x00"), r"action 5 is outside \[0, 5\)"),
        (flip(32, b"\xfe\xff"), r"action -2 is outside \[0, 5\)"),
        (flip(56, b"\x00\x00\x00\x00"), "payload does not decode"),
        (
            lambda r: r[:24] + len(BAD_COMPRESSION).to_bytes(4, "little") + r[28:56] + BAD_COMPRESSION,
            "decodes to 10 of",
        ),
    ],
)
def test_a_wrong_record_is_named_with_its_fault(
    make_set: MakeSet, change: Callable[[bytes], bytes], message: str
) -> None:
    data_dir = make_set({"train": [[16]]})
    path = data_dir / "train-00000.array_record"
    rewrite(path, lambda all_records: [change(r) if i == 1 else r for i, r in enumerate(all_records)])
    dataset = open_dataset(data_dir, "train")
    with pytest.raises(DataError, match=rf"train-00000.array_record, record 1: .*{message}"):
        dataset.windows([2], 8)
    problems = [p for p in find_problems(data_dir) if p.record == 1]
    assert len(problems) == 1
    assert "record 1" in problems[0].fault


def test_changed_content_that_decodes_is_found_by_its_digest(make_set: MakeSet) -> None:
    data_dir = make_set({"train": [[16]]})
    path = data_dir / "train-00000.array_record"
    rewrite(
        path, lambda all_records: [flip(40, b"\x00\x00\x80\x41")(r) if i == 1 else r for i, r in enumerate(all_records)]
    )
    open_dataset(data_dir, "train").read(0)
    faults = [problem.fault for problem in find_problems(data_dir)]
    assert any("episode 0: content does not have the digest" in fault for fault in faults)


@pytest.mark.parametrize("index", [b"", b"WMI1", b"WMI1\xc1", b"XXXX\x80", b"WMI1\x80", b"WMI1\x93\x01\x02\x03"])
def test_a_wrong_index_is_named(make_set: MakeSet, index: bytes) -> None:
    data_dir = make_set({"train": [[16]]})
    rewrite(data_dir / "train-00000.array_record", lambda all_records: [*all_records[:-1], index])
    with pytest.raises(DataError, match=r"train-00000.array_record, record 4 \(index\)"):
        open_dataset(data_dir, "train")


def test_frames_of_another_size_are_named(make_set: MakeSet, tmp_path: Path) -> None:
    data_dir = make_set()
    layout = RecordLayout((8, 8, 3), num_actions=5, group_frames=4)
    name = "train-00001.array_record"
    with RecordWriter(data_dir / name, layout) as writer:
        writer.write(encode_episode(layout, np.zeros((9, 8, 8, 3), np.uint8)))
    rewrite(data_dir / name, lambda all_records: all_records)
    with pytest.raises(DataError, match=rf"{name}.*\(8, 8, 3\).*the manifest says.*\(6, 10, 3\).*another size"):
        open_dataset(data_dir, "train")


def test_files_of_another_set_are_refused(make_set: MakeSet) -> None:
    data_dir, other = make_set(), make_set({"train": [[9], [4]], "val": [[9]]}, name="other")
    shutil.copy(other / "train-00001.array_record", data_dir / "train-00001.array_record")
    rewrite(data_dir / "train-00001.array_record", lambda all_records: all_records)
    with pytest.raises(DataError, match="belong to different data sets"):
        open_dataset(data_dir, "train")


def test_missing_things_are_named(make_set: MakeSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json: not found.*worldmodel collect"):
        open_dataset(tmp_path / "nowhere", "train")
    data_dir = make_set()
    with pytest.raises(DataError, match=r"no split 'test', it has \['train', 'val'\]"):
        open_dataset(data_dir, "test")
    (data_dir / "train-00001.array_record").unlink()
    with pytest.raises(DataError, match=r"train-00001.array_record: listed in the manifest"):
        open_dataset(data_dir, "train")
    with pytest.raises(DataError, match="episode 99"):
        open_dataset(data_dir, "val").read(99)
    with pytest.raises(DataError, match="frames"):
        open_dataset(data_dir, "val").read(0, 10, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "not a world-model data set"),
        ('{"format": "worldmodel-records", "version": 9}', "version 9"),
        ('{"format": "worldmodel-records", "version": 1}', "field 'kind'"),
    ],
)
def test_bad_manifests_are_refused(make_set: MakeSet, text: str, message: str) -> None:
    data_dir = make_set()
    (data_dir / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        open_dataset(data_dir, "train")


def test_an_empty_split_is_refused(make_set: MakeSet) -> None:
    data_dir = make_set()
    manifest = read_manifest(data_dir)
    manifest["splits"]["train"]["files"] = []
    write_manifest(data_dir, manifest)
    with pytest.raises(DataError, match="split 'train' is empty"):
        open_dataset(data_dir, "train")


def test_overlapping_levels_are_found(make_set: MakeSet) -> None:
    data_dir = make_set()
    manifest = read_manifest(data_dir)
    manifest["splits"]["train"]["level_ranges"] = [[0, 500]]
    manifest["splits"]["val"]["level_ranges"] = [[499, 600]]
    write_manifest(data_dir, manifest)
    assert ["overlap" in problem.fault for problem in find_problems(data_dir)] == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../val-00000.array_record"}, "expected the name of a file in this folder"),
        ({"name": "/etc/passwd"}, "expected the name of a file in this folder"),
        ({"name": ""}, "expected the name of a file"),
        ({"bytes": -1}, "bytes of .* expected a count"),
        ({"frames": True}, "frames of .* expected a count"),
        ({"sha256": None}, "sha256 of .* hexadecimal"),
    ],
)
def test_manifests_that_name_or_count_what_is_not_there_are_refused(
    make_set: MakeSet, change: dict, message: str
) -> None:
    data_dir = make_set()
    manifest = json.loads((data_dir / "manifest.json").read_text())
    manifest["splits"]["train"]["files"][0] |= change
    (data_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        open_dataset(data_dir, "train")


def test_a_manifest_nested_too_deep_is_refused(make_set: MakeSet) -> None:
    data_dir = make_set()
    (data_dir / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not readable as JSON"):
        open_dataset(data_dir, "train")
