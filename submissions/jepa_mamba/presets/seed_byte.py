"""The published byte configuration: 256 byte values, d768 x 10 layers, windows of 8,192 bytes.

Command: torchrun --standalone --nproc_per_node=8 submissions/jepa_mamba/train_gpt.py --preset seed_byte \\
             --data_path DATA (FineWeb byte shards)
Cost: 600 s on 8 x H100.
Expected: the published run gives no figure that could be checked; not yet run here.

Faithful in every hyperparameter; the faults mended are those listed in seed_bpe.py.
"""

PRESET = {
    "tokenizer": "byte",
    "vocab_size": 256,
    "model_dim": 768,
    "num_layers": 10,
    "d_state": 64,
    "d_conv": 4,
    "expand": 1,
    "headdim": 64,
    "mlp_every": 2,
    "mlp_mult": 3,
    "activation": "relu2",
    "embed_dim": 256,
    "predictor_hidden_mult": 4,
    "projector_type": "linear",
    "tie_embeddings": 1,
    "logit_softcap": 15.0,
    "softcap_type": "poly",
    "jepa_weight": 1.0,
    "jepa_steps": 3,
    "ce_weight": 1.0,
    "sigreg_lambda": 1.0,
    "sigreg_schedule": False,
    "detach_targets": False,
    "train_seq_len": 8192,
    "train_batch_tokens": 524288,
    "iterations": 10000,
    "warmup_steps": 10,
    "warmdown_fraction": 0.15,
    "max_wallclock_seconds": 600.0,
    "matrix_lr": 0.02,
    "scalar_lr": 0.01,
    "embed_lr": 0.01,
    "muon_momentum": 0.95,
    "muon_backend_steps": 3,
    "muon_wd": 0.04,
    "adam_wd": 0.05,
    "grad_clip_norm": 1.0,
    "quant_bits": 4,
    "fp_storage": "FP8",
    "qat_fraction": 1.0,
    "val_loss_every": 0,
    "train_log_every": 1000,
    "eval_modes": "standard,sliding",
    "sliding_eval_stride": 128,
    "seed": 42,
    "data_path": "./data/datasets/fineweb10B_bytes",
}
