"""The whole model in NumPy float64, written from the published description and the operations' references.

Weights go by the published names (`blocks.0.ssm.in_proj.weight`), as in the golden files.
"""

from __future__ import annotations

import math

import numpy as np

from common.causal_conv1d.reference import causal_conv1d_reference
from common.sigreg.reference import sigreg_reference
from common.softcap_xent.reference import softcap_reference
from common.ssd.reference import ssd_scan_reference

erf = np.vectorize(math.erf)


def rms(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def mamba2(u: np.ndarray, w: dict[str, np.ndarray], p: str, config: dict) -> np.ndarray:
    heads, state = w[f"{p}.A_log"].size, config["d_state"]
    inner = heads * config["headdim"]
    z, xbc, dt = np.split(u @ w[f"{p}.in_proj.weight"].T, [inner, 2 * inner + 2 * state], axis=-1)
    xbc, _ = causal_conv1d_reference(xbc, w[f"{p}.conv1d.weight"][:, 0], w[f"{p}.conv1d.bias"], activation="silu")
    x, b, c = np.split(xbc, [inner, inner + state], axis=-1)
    batch, time_, _ = u.shape
    y, _ = ssd_scan_reference(
        x.reshape(batch, time_, heads, -1),
        np.logaddexp(0, dt + w[f"{p}.dt_bias"]),
        -np.exp(w[f"{p}.A_log"]),
        b[:, :, None],
        c[:, :, None],
        w[f"{p}.D"],
    )
    return (rms(y.reshape(batch, time_, inner) * silu(z), 1e-5) * w[f"{p}.norm.weight"]) @ w[f"{p}.out_proj.weight"].T


def feed_forward(x: np.ndarray, w: dict[str, np.ndarray], p: str) -> np.ndarray:
    if f"{p}.gate_up.weight" in w:
        gate, up = np.split(x @ w[f"{p}.gate_up.weight"].T, 2, axis=-1)
        hidden = silu(gate) * up
    else:
        hidden = np.maximum(x @ w[f"{p}.fc.weight"].T, 0) ** 2
    return rms(hidden) @ w[f"{p}.down.weight"].T


def projector(x: np.ndarray, w: dict[str, np.ndarray], p: str) -> np.ndarray:
    if f"{p}.weight" in w:
        return x @ w[f"{p}.weight"].T
    h = x @ w[f"{p}.fc1.weight"].T + w[f"{p}.fc1.bias"]
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    return gelu(h * w[f"{p}.norm.weight"] + w[f"{p}.norm.bias"]) @ w[f"{p}.fc2.weight"].T + w[f"{p}.fc2.bias"]


def forward(w: dict[str, np.ndarray], config: dict, ids: np.ndarray, targets: np.ndarray, A: np.ndarray) -> dict:
    """h, logits and the losses of one training forward with all weights 1."""
    w = {name: value.astype(np.float64) for name, value in w.items()}
    x = w["token_embed.weight"][ids]
    if "embed_proj.weight" in w:
        x = x @ w["embed_proj.weight"].T
    x = x0 = rms(x, 0.0)
    layers, skips = config["num_layers"], []
    for i in range(layers):
        p = f"blocks.{i}"
        if i >= layers // 2 and skips:
            x = x + w["skip_weights"][i - layers // 2] * skips.pop()
        mix = w[f"{p}.resid_mix"]
        x = mix[0] * x + mix[1] * x0
        x = x + w[f"{p}.ssm_scale"] * mamba2(rms(x), w, f"{p}.ssm", config)
        if f"{p}.mlp_scale" in w:
            x = x + w[f"{p}.mlp_scale"] * feed_forward(rms(x), w, f"{p}.mlp")
        if i < layers // 2:
            skips.append(x)
    h = rms(x)

    rows, table = h, w["token_embed.weight"]
    if "lm_head.weight" in w:
        table = w["lm_head.weight"]
    elif "lm_head_adapter.0.weight" in w:
        rows = gelu(h @ w["lm_head_adapter.0.weight"].T)
    elif "embed_proj_rev.weight" in w:
        rows = h @ w["embed_proj_rev.weight"].T
    table = table + w.get("lm_head_correction", 0.0)
    logits = softcap_reference(rows @ table.T + w["vocab_bias"], config["softcap"], config["softcap_type"])
    lse = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    nll = (lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]).mean()
    ce = nll + 1e-4 * (lse**2).mean()

    z = projector(h, w, "projector")
    losses, rolled = [], z[:, :-1]
    for k in range(1, config["jepa_steps"] + 1):
        hidden = gelu(rolled @ w["predictor.0.weight"].T + w["predictor.0.bias"])
        rolled = projector(hidden @ w["predictor.2.weight"].T + w["predictor.2.bias"], w, "pred_proj")
        target = z[:, k:]
        rolled = rolled[:, : target.shape[1]]
        losses.append(((rolled - target) ** 2).mean())
    jepa = float(np.mean(losses))
    sigreg = float(sigreg_reference(z, A.astype(np.float64), per_timestep=True)[0])
    return {"h": h, "logits": logits, "nll": nll, "ce": ce, "jepa": jepa, "sigreg": sigreg, "loss": ce + jepa + sigreg}
