"""The published recipe at the size of the `mini` track (two CPU cores, 600 s, 500,000 bytes): what has to be beaten.

Command: make golf-mini ARGS='--preset seed_mini --compile_model 0'
   or    python submissions/jepa_mamba/train_gpt.py --preset seed_mini --data_path DATA --budget_bytes 0
Cost: 600 s of training on two cores by the clock; some minutes of scoring beside it, 2 GB of memory.
Expected: 1.69 bpb on english-docs.val (three seeds, about 515 steps; scripts/ablations/final_mini.toml).

Every hyperparameter is the published one (seed_bpe.py), and so are the proportions: feed-forward of four times the
width in every second block, embedding of about half the width, three latent steps and SIGReg at weight 1, INT4 and FP8
from the first step, warmdown over the last 15%, windows side by side. Only sizes follow the track: vocabulary, width,
blocks, head and state dimension, window, batch, and the momentum's warmup in proportion to the number of steps.
"""

PRESET = {
    "tokenizer": "bpe",
    "vocab_size": 1024,
    "model_dim": 144,
    "num_layers": 6,
    "d_state": 32,
    "headdim": 24,
    "chunk_size": 32,
    "mlp_every": 2,
    "mlp_mult": 4,
    "activation": "relu2",
    "embed_dim": 76,
    "predictor_hidden_mult": 4,
    "jepa_weight": 1.0,
    "jepa_steps": 3,
    "sigreg_lambda": 1.0,
    "train_seq_len": 512,
    "train_batch_tokens": 8192,
    "micro_batch_tokens": 8192,
    "max_wallclock_seconds": 600.0,
    "warmup_steps": 1,
    "warmdown_fraction": 0.15,
    "muon_momentum_warmup_steps": 40,
    "quant_bits": 4,
    "fp_storage": "FP8",
    "temp_calib_tokens": 16384,
    "val_loss_every": 0,
    "val_batch_size": 8192,
    "train_log_every": 10,
    "checkpoint_every": 100,
    "eval_modes": "standard",
}
