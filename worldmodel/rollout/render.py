"""Rollouts as pictures: rows of frames as PNG, GIF and MP4.

Legend: S clips · T time · H W C frame.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import jax
import numpy as np
from PIL import Image, ImageDraw

from common.errors import ConfigError
from common.files import write_atomically
from worldmodel.config import RolloutConfig
from worldmodel.rollout.world import World

LABEL_WIDTH = 132
GAP = 2


@dataclass(frozen=True)
class Row:
    """One labelled row of a grid: a clip of uint8 frames (T, H, W, C)."""

    label: str
    frames_THWC: np.ndarray


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames in 0..1 to 0..255."""
    return np.clip(np.asarray(frames) * 255.0 + 0.5, 0, 255).astype(np.uint8)


def rollout_rows(
    worlds: list[World], frames_THWC: np.ndarray, actions_T: np.ndarray, config: RolloutConfig, *, seed: int = 0
) -> list[Row]:
    """The rows of one clip: truth, reconstruction, then for each world its rollout and one row per constant action.

    Args:
        worlds: one or two worlds (ground-truth and latent actions) that share a tokenizer.
        frames_THWC: true clip, uint8, of prompt_frames + horizon frames or more.
        actions_T: its recorded actions.
        config: sampling.
        seed: of the sampling noise.

    Returns:
        Rows of prompt_frames + horizon frames. Prompt frames of dreamed rows are the reconstruction.
    """
    total = config.prompt_frames + config.horizon
    if len(frames_THWC) < total:
        raise ConfigError(f"a clip of {len(frames_THWC)} frames is too short for {total}; collect longer episodes")
    clip_BTHWC, actions_BT = frames_THWC[None, :total], actions_T[None, :total]
    key = jax.random.key(seed)
    rebuilt_THWC = to_uint8(np.asarray(worlds[0].decode(worlds[0].encode(clip_BTHWC)))[0])
    rows = [Row("truth", clip_BTHWC[0]), Row("reconstruction", rebuilt_THWC)]
    for world in worlds:
        driven_BA = world.actions_of(clip_BTHWC, actions_BT)
        labels = ["inferred latent actions" if world.latent else "true actions"]
        plans = [driven_BA]
        if world.latent:
            for code in range(world.dynamics.num_actions):
                plan_BA = driven_BA.copy()
                plan_BA[:, config.prompt_frames - 1 :] = code
                plans.append(plan_BA)
                labels.append(f"latent action {code}")
        prompt_BPN = world.encode(np.repeat(clip_BTHWC[:, : config.prompt_frames], len(plans), axis=0))
        future = world.rollout(prompt_BPN, np.concatenate(plans), config, key)
        whole = world.decode(jax.numpy.concatenate([prompt_BPN, future], axis=1))
        rows += [Row(label, to_uint8(np.asarray(video))) for label, video in zip(labels, whole, strict=True)]
    return rows


def _label_image(text: str, height: int, scale: int) -> np.ndarray:
    image = Image.new("RGB", (LABEL_WIDTH, height * scale), "white")
    ImageDraw.Draw(image).text((4, height * scale // 2 - 6), text, fill="black")
    return np.asarray(image)


def side_by_side(clips: list[list[Row]], labels: dict[str, str]) -> list[Row]:
    """Some rows of several clips, the clips beside each other in each row.

    Args:
        clips: rows of each clip; every clip has the rows named in `labels`, of one length.
        labels: label of a row -> what to call it here; the order is the result's.

    Returns:
        One row a label, as wide as all clips together.
    """
    rows = []
    for label, name in labels.items():
        lanes = [next(row.frames_THWC for row in clip if row.label == label) for clip in clips]
        spaced = [np.pad(lane, ((0, 0), (0, 0), (0, GAP), (0, 0)), constant_values=255) for lane in lanes[:-1]]
        rows.append(Row(name, np.concatenate([*spaced, lanes[-1]], axis=2)))
    return rows


def sheet(rows: list[Row], *, scale: int = 2, every: int = 1) -> np.ndarray:
    """Rows side by side in time as one picture: (rows * H, label + T * W, 3) uint8."""
    lines = []
    for row in rows:
        frames = [np.kron(frame, np.ones((scale, scale, 1), np.uint8)) for frame in row.frames_THWC[::every]]
        padded = [np.pad(frame, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for frame in frames]
        label = np.pad(
            _label_image(row.label, row.frames_THWC.shape[1], scale), ((0, GAP), (0, 0), (0, 0)), mode="edge"
        )
        lines.append(np.concatenate([label, *padded], axis=1))
    return np.concatenate(lines)


def movie(rows: list[Row], *, scale: int = 2) -> np.ndarray:
    """Rows stacked in each picture of a film: (T, rows * H, label + W, 3) uint8, sides even as video codecs want."""
    stacked = [sheet([Row(row.label, row.frames_THWC[t : t + 1]) for row in rows], scale=scale) for t in
               range(len(rows[0].frames_THWC))]  # fmt: skip
    film = np.stack(stacked)
    return np.pad(film, ((0, 0), (0, film.shape[1] % 2), (0, film.shape[2] % 2), (0, 0)), constant_values=255)


def gif_bytes(film_THWC: np.ndarray, *, fps: float) -> bytes:
    """An endless GIF."""
    buffer = io.BytesIO()
    images = [Image.fromarray(frame) for frame in film_THWC]
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
    return buffer.getvalue()


def png_bytes(image_HWC: np.ndarray) -> bytes:
    """A PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def mp4_bytes(film_THWC: np.ndarray, *, fps: float, scale: int = 1) -> bytes:
    """An H.264 film, whose sides must be even; `scale` enlarges each pixel to a square, inside the encoder."""
    enlarge = ["-vf", f"scale=iw*{scale}:ih*{scale}:flags=neighbor"] if scale > 1 else []
    content = iio.imwrite(
        "<bytes>", film_THWC, extension=".mp4", fps=fps, codec="libx264", macro_block_size=2, output_params=enlarge
    )
    assert content is not None
    return content


def write_picture_files(
    rows: list[Row], stem: Path, *, formats: tuple[str, ...], fps: float, scale: int = 2
) -> list[Path]:
    """Write a grid as `stem`.png, .gif and .mp4.

    Args:
        rows: of one clip.
        stem: path without suffix.
        formats: any of png, gif, mp4.
        fps: of the moving forms.
        scale: pixels per pixel.

    Returns:
        The files.
    """
    paths = []
    for name in formats:
        path = stem.with_suffix(f".{name}")
        if name == "png":
            content = png_bytes(sheet(rows, scale=scale))
        elif name == "gif":
            content = gif_bytes(movie(rows, scale=scale), fps=fps)
        elif name == "mp4":
            content = mp4_bytes(movie(rows, scale=scale), fps=fps)
        else:
            raise ConfigError(f"unknown picture format {name!r}; choose from png, gif, mp4")
        write_atomically(path, content)
        paths.append(path)
    return paths
