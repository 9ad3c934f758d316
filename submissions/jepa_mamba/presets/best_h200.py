"""Candidate of the `h200` track: one H200, 600 s, 16,000,000 bytes, lossless BPE 8192.

Command: make golf-h200 CORPUS=FOLDER
   or    python submissions/jepa_mamba/train_gpt.py --preset best_h200 --data_path DATA
Cost: 600 s on one H200, scoring with carried state beside it.
Expected: not measured yet.

`best_bpe` on one GPU: a quarter of its batch, and our kernels in one captured graph.
"""

PRESET = {
    "tokenizer": "bpe",
    "vocab_size": 8192,
    "kernels": "triton",
    "cuda_graphs": True,
    "model_dim": 640,
    "num_layers": 10,
    "a_init_min": 0.1,
    "a_init_max": 4.0,
    "attn_layers": "3,7",
    "attn_window": 1024,
    "mlp_every": 1,
    "mlp_mult": 3,
    "activation": "leaky_relu2",
    "embed_dim": 336,
    "document_reset": True,
    "jepa_weight": 0.0,
    "sigreg_lambda": 0.0,
    "muon_split_in_proj": True,
    "muon_momentum": 0.97,
    "muon_momentum_warmup_steps": 500,
    "train_seq_len": 2048,
    "train_batch_tokens": 131072,
    "micro_batch_tokens": 65536,
    "max_wallclock_seconds": 600.0,
    "warmdown_fraction": 0.6,
    "fp_storage": "INT8",
    "free_steps": True,
    "free_qat_fraction": 0.2,
    "val_loss_every": 500,
    "val_max_tokens": 262144,
    "eval_modes": "carried",
    "eval_lanes": 32,
}
