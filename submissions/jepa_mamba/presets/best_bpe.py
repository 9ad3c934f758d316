"""Candidate of the `full` track: 8 x H100, 600 s, 16,000,000 bytes, FineWeb sp8192.

Command: torchrun --standalone --nproc_per_node=8 submissions/jepa_mamba/train_gpt.py --preset best_bpe --data_path DATA
Cost: 600 s on 8 x H100, scoring with carried state beside it.
Expected: not measured yet.

Chosen from what stronger entries reported and what small runs showed (LOG.md), not from a search at this size: no
latent objectives, feed-forward in every block, two attention layers, slower heads from the start, longer windows, a
long warmdown, higher momentum, int4 training that ends on steps chosen to fill the budget.
"""

PRESET = {
    "tokenizer": "bpe",
    "vocab_size": 8192,
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
    "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "matrix_lr": 0.025,
    "train_seq_len": 2048,
    "train_batch_tokens": 524288,
    "max_wallclock_seconds": 600.0,
    "warmdown_fraction": 0.6,
    "fp_storage": "INT8",
    "free_steps": True,
    "free_qat_fraction": 0.2,
    "val_loss_every": 500,
    "val_max_tokens": 1048576,
    "eval_modes": "carried",
    "eval_lanes": 64,
}
