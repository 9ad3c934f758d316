"""Typed configuration of every stage: frozen dataclasses, strict JSON, and the comparison that guards a resume.

One `TrainConfig` describes one stage of training (tokenizer, latent actions, dynamics). A preset (`worldmodel/configs`)
is a set of such configs plus the collection, rollout and evaluation settings that go with them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from common.errors import ConfigError
from worldmodel.data.collect import CollectConfig

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class FrameConfig:
    """Size of one video frame and of the square patches that it is cut into."""

    height: int = 64
    width: int = 64
    channels: int = 3
    patch: int = 16
    """Side of a patch in pixels; height and width must be multiples of it."""

    def __post_init__(self) -> None:
        if self.height % self.patch or self.width % self.patch:
            raise ConfigError(
                f"frame {self.height}x{self.width} is not a multiple of patch {self.patch}; "
                "choose a patch that divides both"
            )

    @property
    def rows(self) -> int:
        """Patches from top to bottom."""
        return self.height // self.patch

    @property
    def columns(self) -> int:
        """Patches from left to right."""
        return self.width // self.patch

    @property
    def tokens(self) -> int:
        """Patches in a frame."""
        return self.rows * self.columns

    @property
    def patch_values(self) -> int:
        """Numbers in one patch."""
        return self.patch * self.patch * self.channels


@dataclass(frozen=True)
class BlockConfig:
    """One stack of spatio-temporal transformer blocks (`worldmodel/models/blocks.py`)."""

    dim: int = 512
    ffn_dim: int = 2048
    heads: int = 8
    layers: int = 4
    temporal: bool = True
    """False leaves out temporal attention: every frame is then treated alone."""
    temporal_window: int = 16
    """Frames that a frame sees, itself included. Banded, so that a ring-buffer cache is exact at any length."""
    joint: bool = False
    """One attention over space and time together in place of spatial and temporal attention."""
    mixer: Literal["attention", "mamba2"] = "attention"
    """What runs along time. mamba2: a state-space layer without a window; its memory does not grow."""
    mamba_state: int = 48
    """Numbers in the state of one channel. With dim / 2, and mamba_expand 1, it has as many weights as attention."""
    mamba_expand: int = 1
    """Inner width of mamba2 over dim."""
    position: Literal["rope", "learned"] = "rope"
    """rope: axial rotations over rows and columns in space, over time in time. learned: two separate tables."""
    max_frames: int = 64
    """Rows of the learned time table; unused with rope, which has no limit."""
    rope_theta: float = 1000.0
    qk_norm: bool = True
    dropout: float = 0.0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matmul inputs. Parameters, norms, softmax and losses stay float32."""
    attention: Literal["xla", "cudnn", "auto"] = "auto"
    """auto: cuDNN where the default backend is a GPU and compute is bfloat16, otherwise XLA."""

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.position == "rope" and (self.dim // self.heads) % 4:
            raise ConfigError(
                f"rope needs a head size divisible by 4 (rows and columns share it), got {self.dim // self.heads}"
            )
        if self.joint and not (self.temporal and self.mixer == "attention"):
            raise ConfigError("joint attention runs over time too: it needs temporal and mixer attention")
        if self.joint and self.position == "rope" and (self.dim // self.heads) % 8:
            raise ConfigError(
                f"joint attention with rope needs a head size divisible by 8 (time, rows and columns share it), got "
                f"{self.dim // self.heads}"
            )
        if self.mixer == "mamba2" and (self.mamba_state < 1 or self.mamba_expand < 1):
            raise ConfigError(f"mamba2 needs a state and an expansion, got {self.mamba_state} and {self.mamba_expand}")
        if self.attention == "cudnn" and self.compute_dtype != "bfloat16":
            raise ConfigError("attention cudnn needs compute_dtype bfloat16; use xla or auto with float32")


@dataclass(frozen=True)
class QuantizerConfig:
    """The discrete bottleneck of the tokenizer or of the latent action model."""

    kind: Literal["vq", "fsq", "tanh"] = "vq"
    """tanh: no codes at all, continuous latents in -1..1 (the MAE tokenizer, for diffusion dynamics)."""
    codes: int = 1024
    """Codebook size; with fsq it must equal the product of the levels, with tanh it is 0."""
    latent_dim: int = 32
    fsq_levels: tuple[int, ...] = ()
    metric: Literal["cosine", "euclidean"] = "cosine"
    """cosine compares directions (as published); euclidean keeps lengths, which PCA + k-means initialisation needs."""
    commitment: float = 0.25
    codebook_dropout: float = 0.0
    """Probability that a code is hidden from one training step's look-up."""
    dead_after_steps: int = 0
    """A code unused for so many steps is replaced by an encoder output of the batch; 0 turns that off."""
    kmeans_init: bool = False
    """Initialise the codebook by k-means on encoder outputs of real data before step 0."""

    def __post_init__(self) -> None:
        if self.kind == "fsq":
            product = 1
            for level in self.fsq_levels:
                product *= level
            if not self.fsq_levels or product != self.codes or min(self.fsq_levels) < 2:
                raise ConfigError(f"fsq levels {self.fsq_levels} (each >= 2) must multiply to codes = {self.codes}")
            if self.latent_dim != len(self.fsq_levels):
                raise ConfigError(f"fsq uses one latent per level: latent_dim must be {len(self.fsq_levels)}")
            if self.kmeans_init:
                raise ConfigError("fsq has no codebook to initialise; turn kmeans_init off")
        elif self.kind == "tanh":
            if self.codes or self.kmeans_init or self.dead_after_steps or self.codebook_dropout:
                raise ConfigError("tanh latents have no codebook: set codes to 0 and leave its other options off")
        elif self.codes < 2:
            raise ConfigError(f"a codebook needs at least 2 codes, got {self.codes}")


@dataclass(frozen=True)
class TokenizerConfig:
    """Video tokenizer (`worldmodel/models/tokenizer.py`)."""

    frame: FrameConfig = field(default_factory=FrameConfig)
    encoder: BlockConfig = field(default_factory=BlockConfig)
    decoder: BlockConfig = field(default_factory=BlockConfig)
    quantizer: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(codebook_dropout=0.01))
    linear_path: bool = False
    """Add a linear patch -> latent -> patch path beside the transformers, initialised by PCA of real patches, with the
    transformers starting at zero: training then starts from the k-means (with tanh, PCA) reconstruction instead of from
    noise."""
    mask_high: float = 0.0
    """In training a share ~ U(0, mask_high) of a clip's patches is hidden from the encoder (masked autoencoder, 0.9 as
    published); 0 hides none."""

    def __post_init__(self) -> None:
        lengths = self.quantizer.kind == "tanh" or (self.quantizer.kind, self.quantizer.metric) == ("vq", "euclidean")
        if self.linear_path and not lengths:
            raise ConfigError(
                "linear_path keeps the length of a patch: it needs a vq codebook with metric euclidean, or tanh"
            )
        if not 0.0 <= self.mask_high <= 1.0:
            raise ConfigError(f"mask_high {self.mask_high}: expected a share in 0..1")


@dataclass(frozen=True)
class LamConfig:
    """Latent action model (`worldmodel/models/lam.py`)."""

    frame: FrameConfig = field(default_factory=FrameConfig)
    encoder: BlockConfig = field(default_factory=BlockConfig)
    decoder: BlockConfig = field(default_factory=BlockConfig)
    quantizer: QuantizerConfig = field(
        default_factory=lambda: QuantizerConfig(codes=6, dead_after_steps=50, codebook_dropout=0.0)
    )

    def __post_init__(self) -> None:
        if self.quantizer.kind != "vq":
            raise ConfigError("latent actions use a vq codebook; set quantizer.kind to vq")


@dataclass(frozen=True)
class DiffusionConfig:
    """Diffusion dynamics (`worldmodel/models/diffusion.py`)."""

    levels: int = 64
    """Noise levels from noise to data; a power of two."""
    prediction: Literal["x", "v"] = "x"
    """What the network says: the data, or the velocity from noise to data."""
    history: Literal["forcing", "context"] = "forcing"
    """forcing: every frame sees the frames before it, each at a random level of its own, in one stream. context: it
    sees them at the level of `context_noise`, as sampling does, in a second stream."""
    context_noise: float = 0.1
    """Share of noise on finished frames when sampling; the network is told their true level."""
    shortcut: bool = False
    """Learn large steps from two half ones as well, for sampling in few steps (shortcut forcing)."""
    shortcut_share: float = 0.25
    """Share of the clips of a batch that learn large steps."""

    def __post_init__(self) -> None:
        if self.levels < 2 or self.levels & (self.levels - 1):
            raise ConfigError(f"levels must be a power of two from 2 on, got {self.levels}")
        if not 0.0 <= self.context_noise < 1.0:
            raise ConfigError(f"context_noise {self.context_noise}: expected a share in 0..1, below 1")
        if not 0.0 < self.shortcut_share < 1.0:
            raise ConfigError(f"shortcut_share {self.shortcut_share}: expected a share between 0 and 1")


@dataclass(frozen=True)
class DynamicsConfig:
    """A dynamics model (`worldmodel/models/dynamics.py`)."""

    kind: Literal["maskgit", "causal", "diffusion"] = "maskgit"
    """maskgit: masked tokens, several at once. causal: token after token. diffusion: continuous latents from noise."""
    blocks: BlockConfig = field(default_factory=lambda: BlockConfig(layers=6))
    action_source: Literal["latent", "latent-frozen", "ground-truth"] = "latent"
    """latent: the action model is trained together with the dynamics. latent-frozen: it comes from `lam_run`.
    ground-truth: the recorded actions."""
    action_conditioning: Literal["prepend", "add"] = "prepend"
    masking: Literal["current", "all"] = "current"
    """current: a clean causal history and, beside it, a masked copy of every frame that attends to the clean past (what
    sampling sees). all: every frame after the first is masked in one stream, as published."""
    mask_low: float = 0.5
    mask_high: float = 1.0
    """The mask ratio is drawn from U(mask_low, mask_high): per clip when all frames are masked, per frame otherwise."""
    tie_codebook: bool = True
    """Token embeddings (and the output head) = codebook x learned matrix + learned per-token offset (zero at first)."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Of kind diffusion; the fields from masking to z_loss are of the token kinds."""
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)^2), in nats^2."""
    vq_weight: float = 1.0
    """Weight of the action codebook's loss when the action model is co-trained."""

    def __post_init__(self) -> None:
        if not self.blocks.temporal:
            raise ConfigError("dynamics needs temporal attention; set dynamics.blocks.temporal")
        if self.blocks.mixer == "mamba2" and self.blocks.position == "learned":
            raise ConfigError("mamba2 has no window and its rollouts no end: use position rope, which has no limit")
        if not 0.0 <= self.mask_low <= self.mask_high <= 1.0:
            raise ConfigError(f"mask ratios must satisfy 0 <= low <= high <= 1, got {self.mask_low}, {self.mask_high}")


@dataclass(frozen=True)
class JepaConfig:
    """JEPA world model (`worldmodel/models/jepa.py`)."""

    frame: FrameConfig = field(default_factory=FrameConfig)
    encoder: BlockConfig = field(default_factory=lambda: BlockConfig(temporal=False))
    predictor: BlockConfig = field(default_factory=BlockConfig)
    embedding_dim: int = 128
    sigreg_weight: float = 10.0
    """Weight of SIGReg beside the error of the next embedding. Below about 1 the error wins and embeddings collapse;
    the published 0.1 multiplies a statistic that is larger than ours by the number of clips in a batch."""
    projections: int = 256
    """Random directions of SIGReg, drawn anew each step."""

    def __post_init__(self) -> None:
        if not self.predictor.temporal:
            raise ConfigError("the predictor looks at past embeddings; set jepa.predictor.temporal")
        if self.sigreg_weight <= 0.0:
            raise ConfigError("without SIGReg the embeddings collapse to a point; set jepa.sigreg_weight above 0")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for matrices, AdamW for everything else (embeddings, codebooks, norms, biases)."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    learning_rate: float = 3e-4
    muon_learning_rate: float = 0.01
    warmup_steps: int = 10_000
    decay_steps: int = 30_000
    """Steps of linear decay to zero at the end (wsd only)."""
    beta1: float = 0.9
    beta2: float = 0.9
    weight_decay: float = 1e-4
    """Decoupled; applied to matrices only."""
    gradient_clip: float = 0.0
    """Largest global gradient norm; 0 turns clipping off."""
    ema: float = 0.0
    """Decay of the averaged weights that evaluation, rollout and export use; 0 turns averaging off."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices: batches are split over `data` x `fsdp`, large parameters over `fsdp`."""

    data: int = 1
    fsdp: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training, complete: what runs, on what, for how long."""

    stage: Literal["tokenizer", "lam", "dynamics", "jepa"] = "tokenizer"
    data_dir: str = "data/coinrun"
    run_dir: str = "runs/tokenizer"
    tokenizer_run: str = ""
    """Run folder of the tokenizer (stage dynamics only)."""
    lam_run: str = ""
    """Run folder of the action model (action_source latent-frozen only)."""
    token_dir: str = ""
    """Tokenised form of data_dir (`python -m worldmodel tokenize`); with it, ground-truth dynamics reads no pixels."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    lam: LamConfig = field(default_factory=LamConfig)
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    jepa: JepaConfig = field(default_factory=JepaConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    steps: int = 1000
    batch_size: int = 36
    """Clips per step over all processes."""
    seq_len: int = 16
    seed: int = 0
    loader_threads: int = 2
    init_clips: int = 256
    """Clips that data-dependent initialisation (PCA, k-means) reads."""
    log_every: int = 50
    eval_every: int = 500
    eval_clips: int = 32
    checkpoint_every: int = 500
    nonfinite_limit: int = 10
    """Steps whose loss or gradient is not finite before the run stops; they change nothing but the count."""
    keep_checkpoints: int = 2
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept forever; 0 keeps only the newest `keep_checkpoints`."""
    tensorboard: bool = True
    wandb: bool = False
    deterministic: bool = True
    """On a GPU, ask XLA for deterministic kernels (slower). The CPU is bitwise reproducible either way."""

    def __post_init__(self) -> None:
        continuous = self.tokenizer.quantizer.kind == "tanh"
        if self.stage == "dynamics" and continuous != (self.dynamics.kind == "diffusion"):
            raise ConfigError(
                f"dynamics kind {self.dynamics.kind} does not work on a {self.tokenizer.quantizer.kind} tokenizer: "
                "diffusion needs continuous latents (quantizer kind tanh), maskgit and causal need tokens (vq or fsq)"
            )
        if continuous and self.token_dir:
            raise ConfigError("token_dir holds integers, a tanh tokenizer gives latents: leave token_dir empty")
        if self.stage == "dynamics" and self.dynamics.action_source == "latent-frozen" and not self.lam_run:
            raise ConfigError("action_source latent-frozen needs lam_run, the run folder of a trained action model")
        if self.steps < 1 or self.batch_size < 1 or self.seq_len < 1:
            raise ConfigError(
                f"steps, batch_size and seq_len must be positive, got {self.steps}, {self.batch_size}, {self.seq_len}"
            )
        if self.stage != "tokenizer" and self.seq_len < 2:
            raise ConfigError(f"stage {self.stage} needs seq_len >= 2, got {self.seq_len}")
        if self.batch_size % (self.mesh.data * self.mesh.fsdp):
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of the {self.mesh.data * self.mesh.fsdp} mesh devices"
            )


# Fields that a resumed run may change: they do not enter the arithmetic of a step.
RESUMABLE_FIELDS = frozenset(
    {
        "data_dir", "run_dir", "tokenizer_run", "lam_run", "token_dir", "mesh", "loader_threads", "log_every",
        "eval_every", "eval_clips", "checkpoint_every", "keep_checkpoints", "keep_every", "tensorboard", "wandb",
        "nonfinite_limit",
    }
)  # fmt: skip


@dataclass(frozen=True)
class RolloutConfig:
    """How future frames are sampled."""

    prompt_frames: int = 4
    horizon: int = 15
    decode_steps: int = 2
    """Passes per frame. maskgit: each fixes at least one token, so more than the tokens of a frame are not run.
    diffusion: Euler steps, at most the levels; a power of two with a shortcut model. causal has one pass a token."""
    temperature: float = 0.0
    """Of the token distribution; 0 takes the most likely token. diffusion: scale of the starting noise, 1 draws from
    the model's distribution, 0 starts at the centre of the noise."""
    choice_temperature: float = 0.0
    """Gumbel noise on the confidences that choose which tokens to fix, annealed to 0 over the passes."""
    use_cache: bool = True
    """Keep temporal keys and values of past frames; off recomputes the whole history (same result, for tests)."""

    def __post_init__(self) -> None:
        if self.prompt_frames < 1 or self.horizon < 1 or self.decode_steps < 1:
            raise ConfigError("prompt_frames, horizon and decode_steps must be at least 1")


@dataclass(frozen=True)
class EvaluateConfig:
    """What `evaluate` measures and on how many fixed validation clips."""

    split: str = "val"
    clips: int = 1024
    batch_size: int = 64
    horizons: tuple[int, ...] = (1, 4, 8, 15)
    delta_horizon: int = 4
    bootstrap_samples: int = 1000
    seed: int = 0
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    speed_frames: int = 40
    reader_steps: int = 400
    """Training steps of the network that reads actions and states off frames; 0 leaves those scores out."""
    frechet_samples: int = 200
    """Bootstrap draws of the Fréchet distance, which are costlier than the others; 0 leaves it out."""

    def __post_init__(self) -> None:
        if self.reader_steps < 0 or self.frechet_samples < 0:
            raise ConfigError(
                f"reader_steps {self.reader_steps} and frechet_samples {self.frechet_samples}: expected at least 0"
            )
        if max(self.horizons) > self.rollout.horizon or self.delta_horizon > self.rollout.horizon:
            raise ConfigError(
                f"horizons {self.horizons} and delta_horizon {self.delta_horizon} must lie within "
                f"rollout.horizon = {self.rollout.horizon}"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """The JSON form of a config dataclass (tuples become lists).

    Args:
        config: a dataclass instance.

    Returns:
        A dict that `from_dict` turns back into an equal config.
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[ConfigT], values: dict[str, Any], *, where: str = "config") -> ConfigT:
    """Build a config from its JSON form, refusing what it does not know.

    Args:
        cls: the dataclass.
        values: JSON object; missing keys take their defaults.
        where: name used in messages.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: unknown key (the nearest known one is suggested) or a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object for {cls.__name__}, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
        built[key] = _convert(hints[key], value, f"{where}.{key}")
    try:
        return cls(**built)
    except (ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"{where}: a size of {cls.__name__} is out of range ({error}); use at least 1") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        inner = typing.get_args(hint)
        kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, got {len(value)}")
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is Literal:
        if value not in typing.get_args(hint):
            raise ConfigError(f"{where}: {value!r} is not one of {typing.get_args(hint)}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in typing.get_args(hint) if a is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (not isinstance(value, hint) or (hint is int and isinstance(value, bool))):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def read_json(path: str | Path, *, what: str) -> dict[str, Any]:
    """Read a JSON object from a file, with a named error when it is missing or damaged.

    Args:
        path: file.
        what: what the file is, for the message.

    Returns:
        The parsed object.

    Raises:
        ConfigError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; expected {what}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); expected {what}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object with {what}, got {type(value).__name__}")
    return value


def resume_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Names of the fields in which two stage configs differ and that a resume may not change.

    Args:
        saved: JSON form stored in the run folder.
        current: JSON form of the config that wants to continue it.

    Returns:
        Dotted field names with both values, empty when the run may continue.
    """
    differences: list[str] = []

    def walk(a: Any, b: Any, name: str) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(set(a) | set(b)):
                if not name and key in RESUMABLE_FIELDS:
                    continue
                walk(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        elif a != b:
            differences.append(f"{name}: saved {a!r}, now {b!r}")

    walk(saved, current, "")
    return differences


@dataclass(frozen=True)
class Profile:
    """Everything that `python -m worldmodel coinrun` needs (see `worldmodel/configs`); it fills the paths in."""

    collect: CollectConfig
    tokenizer: TrainConfig
    dynamics: TrainConfig
    dynamics_latent: TrainConfig
    evaluate: EvaluateConfig
    grid: str = "int8"
    rollout_clips: int = 4
