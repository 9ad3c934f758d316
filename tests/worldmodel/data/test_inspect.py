"""`inspect` counts right and draws the frames it says; `validate` names faults."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from common.errors import DataError
from worldmodel.data.inspect import InspectConfig, ValidateConfig, contact_sheet, describe, run_inspect, run_validate
from worldmodel.data.records import open_dataset, read_manifest

MakeSet = Callable[..., Path]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_figures_are_right(make_set: MakeSet, synthetic: Any) -> None:
    data_dir = make_set()
    figures = describe(open_dataset(data_dir, "train"))
    lengths = [9, 3, 17, 1, 8]
    actions = [synthetic.action_of(e, t) for e, length in enumerate(lengths) for t in range(length)]
    assert figures["episodes"] == 5
    assert figures["frames"] == sum(lengths)
    assert figures["length_min_q25_median_q75_max"] == [1, 3, 8, 9, 17]
    assert figures["action_counts"] == [*np.bincount(actions, minlength=5).tolist(), 0]
    assert figures["ends"]["ended by the game"] == 5
    files = sorted(data_dir.glob("train-*.array_record"))
    assert figures["bytes_per_frame"] == sum(path.stat().st_size for path in files) / sum(lengths)
    assert (figures["duplicate_episodes"], figures["repeated_levels"]) == (0, 0)


def test_duplicates_are_counted(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(make_set(), "train")
    twins = [*dataset.episodes[:-1], dataset.episodes[0]]
    monkeypatch.setattr(type(dataset), "episodes", twins)
    figures = describe(dataset)
    assert (figures["duplicate_episodes"], figures["repeated_levels"]) == (1, 1)


def test_the_contact_sheet_shows_first_and_last_frames(make_set: MakeSet, synthetic: Any) -> None:
    dataset = open_dataset(make_set({"train": [[9, 3, 17]]}), "train")
    sheet = contact_sheet(dataset, episodes=3, frames=3, margin=2)
    assert sheet.shape == (3 * 8 + 2, 3 * 12 + 2, 3)
    for row, length in enumerate([9, 3, 17]):
        for column, time in enumerate([0, (length - 1) // 2, length - 1]):
            top, left = 2 + 8 * row, 2 + 12 * column
            assert np.array_equal(sheet[top : top + 6, left : left + 10], synthetic.frame_of(row, time))


def test_inspect_prints_and_draws(make_set: MakeSet, tmp_path: Path) -> None:
    data_dir, console = make_set(), quiet()
    figures = run_inspect(InspectConfig(data_dir), console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert set(figures) == {"train", "val"}
    for word in ("episodes", "bytes_per_frame", "action 4 a4", "duplicate_episodes", "contact sheet"):
        assert word in text
    with Image.open(data_dir / "contact_sheet.png") as picture:
        assert picture.size == (8 * 12 + 2, 5 * 8 + 2)
    (tmp_path / "mine.png").write_bytes(b"precious")
    with pytest.raises(DataError, match="--overwrite"):
        run_inspect(InspectConfig(data_dir, sheet=tmp_path / "mine.png"), quiet())
    assert (tmp_path / "mine.png").read_bytes() == b"precious"


def test_validate_passes_sound_data_and_names_every_fault(make_set: MakeSet) -> None:
    data_dir, console = make_set(), quiet()
    run_validate(ValidateConfig(data_dir), console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "sound" in text
    assert read_manifest(data_dir)["content_sha256"] in text.replace("\n", "")
    for name in ("train-00000.array_record", "val-00000.array_record"):
        content = bytearray((data_dir / name).read_bytes())
        content[content.index(b"WMG1") + 70] ^= 1
        (data_dir / name).write_bytes(content)
    with pytest.raises(DataError) as failure:
        run_validate(ValidateConfig(data_dir), quiet())
    assert "train-00000.array_record, record 0" in str(failure.value)
    assert "val-00000.array_record, record 0" in str(failure.value)
    with pytest.raises(DataError, match="val-00000"):
        run_validate(ValidateConfig(data_dir, splits=("val",)), quiet())
    with pytest.raises(DataError, match="no split 'tset'"):
        run_validate(ValidateConfig(data_dir, splits=("tset",)), quiet())
