"""The model against the published one (golden vectors), against NumPy float64, and against itself in pieces."""

from __future__ import annotations

import ast
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from submissions.jepa_mamba.train_gpt import (
    CausalAttention,
    Config,
    LanguageModel,
    TrainingModel,
    select_kernels,
)
from tests.submissions.jepa_mamba.conftest import tiny
from tests.submissions.jepa_mamba.reference_model import forward

GOLDEN = Path(__file__).parents[2] / "golden"
CPU = torch.device("cpu")
KERNELS = select_kernels("torch", CPU)


def golden_files() -> list[Path]:
    """The committed file, and those of the folder named by GOLF_GOLDEN (together 10 MB: too large for the tree)."""
    files = {path.name: path for path in GOLDEN.glob("jepa_mamba_*.npz")}
    if folder := os.environ.get("GOLF_GOLDEN"):
        files |= {path.name: path for path in Path(folder).glob("jepa_mamba_*.npz")}
    return [files[name] for name in sorted(files)]


RENAMES = [
    (".ssm_scale", ".mixer_scale"),
    (".ssm.conv1d.weight", ".mixer.conv_weight"),
    (".ssm.conv1d.bias", ".mixer.conv_bias"),
    (".ssm.norm.weight", ".mixer.norm_weight"),
    (".ssm.", ".mixer."),
    (".mlp.gate_up.", ".mlp.up."),
    (".mlp.fc.", ".mlp.up."),
    ("lm_head_adapter.0.", "lm_head_adapter."),
]


def our_weights(published: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Published names -> ours, for TrainingModel."""
    out = {}
    for name, value in published.items():
        for old, new in RENAMES:
            name = name.replace(old, new)
        tensor = torch.from_numpy(np.array(value))
        if name.endswith("conv_weight"):
            tensor = tensor.squeeze(1)
        if name.split(".")[0] in ("projector", "pred_proj", "predictor"):
            name = "jepa." + name.replace("predictor.0.", "predictor_in.").replace("predictor.2.", "predictor_out.")
        else:
            name = "lm." + name
        out[name] = tensor
    return out


def config_of(golden: dict, projections: int) -> Config:
    g = dict(golden)
    return Config(
        logit_softcap=float(g.pop("softcap")),
        jepa_weight=1.0,
        sigreg_lambda=1.0,
        ce_weight=1.0,
        sigreg_timesteps=0,
        sigreg_num_proj=projections,
        chunk_size=16,
        train_seq_len=40,
        train_batch_tokens=40,
        **g,
    )


def check_parity(
    config: Config, published: dict[str, np.ndarray], A: np.ndarray, x, y, expected: dict, tolerance: float
):
    model = TrainingModel(config, KERNELS)
    weights = our_weights(published) | {"jepa.sigreg_A_DM": torch.from_numpy(A)}
    model.load_state_dict(weights, strict=True)
    ids, targets = torch.from_numpy(x), torch.from_numpy(y)
    with torch.no_grad():
        h, _ = model.lm.encode(ids)
        nll = model.lm.nll(h, targets, temperature=1.0)
    rows, table, bias = model.lm.head(h)
    from common.softcap_xent.torch_impl import softcap_torch

    assert bias is not None
    logits = softcap_torch(rows @ table.T + bias, config.logit_softcap, model.lm.softcap_kind)
    np.testing.assert_allclose(h.numpy(), expected["h"], atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(logits.detach().view(expected["logits"].shape), expected["logits"], atol=tolerance * 5)
    assert float(nll.mean()) == pytest.approx(float(expected["nll"]), abs=tolerance)
    loss, parts = model(ids, targets, None, 1.0, None)
    for key, value in {"jepa": parts["jepa"], "sigreg": parts["sigreg"], "loss": loss}.items():
        assert float(value) == pytest.approx(float(expected[key]), abs=tolerance), key
    assert float(parts["ce"] + parts["z_loss"]) == pytest.approx(float(expected["ce"]), abs=tolerance)


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_published_model_is_reproduced(path: Path) -> None:
    data = np.load(path, allow_pickle=False)
    config = config_of(ast.literal_eval(str(data["config"])), data["sigreg_A"].shape[1])
    published = {name.removeprefix("w."): data[name] for name in data if name.startswith("w.")}
    expected = {key: data[key] for key in ("h", "logits", "nll", "loss", "jepa", "sigreg", "ce")}
    check_parity(config, published, data["sigreg_A"], data["x"], data["y"], expected, 1e-4)


@pytest.mark.parametrize("path", golden_files(), ids=lambda p: p.stem)
def test_numpy_reference_reproduces_the_published_model(path: Path) -> None:
    """So that the next test, for every combination of options, stands on something."""
    data = np.load(path, allow_pickle=False)
    published = {name.removeprefix("w."): data[name] for name in data if name.startswith("w.")}
    ours = forward(published, ast.literal_eval(str(data["config"])), data["x"], data["y"], data["sigreg_A"])
    for key in ("h", "logits", "nll", "loss", "jepa", "sigreg", "ce"):
        np.testing.assert_allclose(ours[key], data[key], atol=5e-5, err_msg=key)


@pytest.mark.parametrize(
    ("tie", "activation", "projector", "cap"),
    [
        (0, "relu2", "linear", "poly"),
        (1, "swiglu", "mlp", "tanh"),
        (2, "relu2", "mlp", "poly"),
        (3, "swiglu", "linear", "poly"),
        (3, "relu2", "mlp", "tanh"),
    ],
)
def test_every_option_agrees_with_float64(tie: int, activation: str, projector: str, cap: str) -> None:
    golden = {
        "vocab_size": 60,
        "model_dim": 32,
        "num_layers": 5,
        "d_state": 8,
        "d_conv": 4,
        "expand": 2,
        "headdim": 16,
        "embed_dim": 24,
        "predictor_hidden_mult": 2,
        "mlp_mult": 2,
        "mlp_every": 2,
        "activation": activation,
        "tie_embeddings": tie,
        "projector_type": projector,
        "jepa_steps": 2,
        "softcap": 15,
        "softcap_type": cap,
    }
    config = config_of(golden, 16)
    model = TrainingModel(config, KERNELS)
    generator = torch.Generator().manual_seed(tie)
    inverse = [(new, old) for old, new in RENAMES if old not in (".mlp.gate_up.", ".mlp.fc.")]
    inverse.insert(0, (".mlp.up.", ".mlp.gate_up." if activation == "swiglu" else ".mlp.fc."))
    published = {}
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.ndim == 1 else 0.2)
        if name.endswith(("norm_weight", "mixer_scale", "mlp_scale", "norm.weight")):
            value = 1 + 0.2 * value
        name = name.removeprefix("lm.").removeprefix("jepa.")
        for new, old in inverse:
            name = name.replace(new, old)
        name = name.replace("predictor_in.", "predictor.0.").replace("predictor_out.", "predictor.2.")
        published[name] = value.unsqueeze(1).numpy() if name.endswith("conv1d.weight") else value.numpy()
    A = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=0).numpy()
    x, y = (torch.randint(0, 60, (3, 21), generator=generator).numpy() for _ in range(2))
    assert model.jepa is not None
    model.jepa.sigreg_A_DM = torch.from_numpy(A)
    expected = forward(published, golden, x, y, A)
    check_parity(config, published, A, x, y, expected, 2e-4)


def randomised(config: Config) -> LanguageModel:
    """A model whose zero-initialised matrices are not zero, so that every path carries a signal."""
    torch.manual_seed(0)
    lm = LanguageModel(config, KERNELS)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2 and float(parameter.abs().sum()) == 0:
                parameter.normal_(std=0.1)
    return lm.eval()


VARIANTS = [
    {},
    {"attn_layers": "1"},
    {"attn_layers": "0,2", "document_reset": True},
    {"document_reset": True},
    {"attn_layers": "1", "document_reset": True, "repeat_blocks": "0,1", "parallel_residual": True, "dt_apart": True},
    {"bigram_buckets": 61},
    {"bigram_buckets": 61, "attn_layers": "1", "document_reset": True},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_later_tokens_change_nothing_earlier(options: dict) -> None:
    lm = randomised(tiny(**options))
    ids = torch.randint(0, 250, (2, 40))
    changed = ids.clone()
    changed[:, 25:] = torch.randint(0, 250, (2, 15))
    documents = torch.tensor([[0] * 10 + [1] * 20 + [2] * 10] * 2, dtype=torch.int32)
    with torch.no_grad():
        before, after = lm.encode(ids, documents)[0], lm.encode(changed, documents)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("cuts", [[16], [1, 2, 3], [7, 30], list(range(1, 48))], ids=["even", "short", "odd", "tokens"])
def test_a_stream_in_pieces_is_the_stream(options: dict, cuts: list[int]) -> None:
    """Carried state, with a document that ends inside a piece and one that ends exactly at a cut (16, 30)."""
    lm = randomised(tiny(train_seq_len=48, train_batch_tokens=48, **options))
    torch.manual_seed(1)
    ids = torch.randint(0, 250, (2, 48))
    documents = torch.tensor([[5] * 11 + [6] * 5 + [7] * 14 + [8] * 18, [1] * 48], dtype=torch.int32)
    with torch.no_grad():
        whole, _ = lm.encode(ids, documents)
        state, pieces = None, []
        for start, end in itertools.pairwise([0, *cuts, 48]):
            h, state = lm.encode(ids[:, start:end], documents[:, start:end], state)
            pieces.append(h)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [v for v in VARIANTS if v.get("document_reset")], ids=str)
def test_documents_do_not_see_each_other(options: dict) -> None:
    lm = randomised(tiny(**options))
    first, second = torch.randint(0, 250, (1, 13)), torch.randint(0, 250, (1, 19))
    documents = torch.tensor([[0] * 13 + [1] * 19], dtype=torch.int32)
    with torch.no_grad():
        joined, _ = lm.encode(torch.cat([first, second], dim=1), documents)
        alone = torch.cat([lm.encode(first)[0], lm.encode(second)[0]], dim=1)
    torch.testing.assert_close(joined, alone, atol=2e-5, rtol=1e-4)


def test_attention_sees_its_window_and_no_more() -> None:
    attention = CausalAttention(tiny(attn_window=5))
    torch.nn.init.normal_(attention.out_proj.weight)
    u = torch.randn(1, 12, 32)
    moved = u.clone()
    moved[:, 3] += 1.0
    with torch.no_grad():
        difference = (attention(u, None, None)[0] - attention(moved, None, None)[0]).abs().amax(-1)[0]
    assert (difference[:3] == 0).all()
    assert (difference[3:8] > 0).all()
    assert (difference[8:] == 0).all()


def test_language_model_starts_the_same_with_and_without_jepa() -> None:
    on = TrainingModel(tiny(), KERNELS).lm.state_dict()
    off = TrainingModel(tiny(jepa_weight=0.0, sigreg_lambda=0.0), KERNELS).lm.state_dict()
    assert on.keys() == off.keys()
    assert all(torch.equal(on[name], off[name]) for name in on)


@pytest.mark.parametrize("preset", ["seed_bpe", "seed_byte"])
def test_published_sizes(preset: str) -> None:
    """FACTS of the published log: 32,816,684 parameters scored and 4,099,200 training-only for the BPE run."""
    from submissions.jepa_mamba.train_gpt import read_preset

    config = Config(**read_preset(preset))
    with torch.device("meta"):
        lm = LanguageModel(config, KERNELS)
    if preset == "seed_bpe":
        assert sum(p.numel() for p in lm.parameters()) == 32_816_684
        model_jepa = TrainingModel(config, KERNELS).jepa
        assert model_jepa is not None
        assert sum(p.numel() for p in model_jepa.parameters()) == 4_099_200
    else:
        assert sum(p.numel() for p in lm.parameters()) == 37_007_208


def test_package_kernels_get_what_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mamba-ssm and causal-conv1d adapters, with stand-ins that behave as the packages' documentation says."""
    import sys
    import types

    from common.causal_conv1d.package_impl import causal_conv1d_package
    from common.causal_conv1d.torch_impl import causal_conv1d_torch
    from common.ssd.mamba_ssm_impl import ssd_scan_mamba_ssm
    from common.ssd.torch_impl import ssd_scan_torch

    def scan(x, dt, A, B, C, chunk_size, D=None, initial_states=None, seq_idx=None, return_final_states=False):
        assert seq_idx is None or (seq_idx.dtype == torch.int32 and int(seq_idx[:, 0].abs().sum()) == 0)
        assert return_final_states
        return ssd_scan_torch(x, dt, A, B, C, D, initial_state_BHPN=initial_states, document_ids_BT=seq_idx)

    def convolution(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        assert initial_states is None or seq_idx is None, "the package takes one or the other"
        assert seq_idx is None or (seq_idx.dtype == torch.int32 and x.stride(1) == 1), "channel-last with seq_idx"
        y, _ = causal_conv1d_torch(x.transpose(1, 2), weight, bias, document_ids_BT=seq_idx, activation=activation)
        return y.transpose(1, 2)

    names = ["mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined", "causal_conv1d"]
    modules = {name: types.ModuleType(name) for name in names}
    modules["mamba_ssm.ops.triton.ssd_combined"].mamba_chunk_scan_combined = scan  # pyright: ignore
    modules["causal_conv1d"].causal_conv1d_fn = convolution  # pyright: ignore
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)

    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 9, 6), (6, 4), (6,)))
    state = torch.randn(2, 6, 3, generator=generator)
    documents = torch.tensor([[3] * 4 + [4] * 5, [7] * 8 + [9]])
    for initial, ids in itertools.product((None, state), (None, documents)):
        options = {"initial_state_BDS": initial, "document_ids_BT": ids}
        for ours, theirs in zip(
            causal_conv1d_torch(x, weight, bias, **options),
            causal_conv1d_package(x, weight, bias, **options),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
    args = [torch.randn(2, 9, 4, 8, generator=generator), torch.rand(2, 9, 4, generator=generator), -torch.rand(4)]
    args += [torch.randn(2, 9, 1, 5, generator=generator) for _ in range(2)] + [torch.ones(4)]
    first = torch.randn(2, 4, 8, 5, generator=generator)
    for initial, ids in itertools.product((None, first), (None, documents)):
        options = {"initial_state_BHPN": initial, "document_ids_BT": ids}
        for ours, theirs in zip(ssd_scan_torch(*args, **options), ssd_scan_mamba_ssm(*args, **options), strict=True):
            torch.testing.assert_close(ours, theirs)
