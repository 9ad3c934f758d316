"""Candidate of the `mini` track: two CPU cores, 600 s, an artifact of at most 500,000 bytes, lossless BPE 1024.

Command: make golf-mini CORPUS=FOLDER
   or    python submissions/jepa_mamba/train_gpt.py --preset best_mini --data_path DATA --compile_model 1
Cost: 600 s of training on two cores by the clock; some minutes of scoring beside it, 2 GB of memory.
Expected: 1.243 bpb on english-docs.val (three seeds, about 3,500 steps, compiled; uncompiled 2,500 steps and 1.32),
read back from an artifact of 440 kB (0.94M weights, of them 0.80M int4 and 0.13M FP8).

Against seed_mini: no latent objectives, feed-forward in every block, two attention layers, slower heads from the
start, the parts of in_proj orthogonalised apart, documents isolated, a long warmdown, scored in one pass with carried
state; and, found by scripts/ablations/scout_mini.toml, small batches of short windows, half of Muon's step
size, and no softcap. What single changes to it do: RECIPE.md; the winners at 200 steps win nothing at 600.
"""

PRESET = {
    "tokenizer": "bpe",
    "vocab_size": 1024,
    "model_dim": 128,
    "num_layers": 5,
    "d_state": 32,
    "headdim": 32,
    "a_init_min": 0.1,
    "a_init_max": 4.0,
    "attn_layers": "1,3",
    "attn_headdim": 32,
    "chunk_size": 32,
    "mlp_every": 1,
    "mlp_mult": 3,
    "activation": "leaky_relu2",
    "embed_dim": 0,
    "logit_softcap": 0.0,
    "document_reset": True,
    "jepa_weight": 0.0,
    "sigreg_lambda": 0.0,
    "muon_split_in_proj": True,
    "train_seq_len": 128,
    "train_batch_tokens": 2048,
    "micro_batch_tokens": 2048,
    "max_wallclock_seconds": 600.0,
    "warmup_steps": 1,
    "matrix_lr": 0.009,
    "warmdown_fraction": 0.65,
    "muon_momentum_warmup_steps": 100,
    "temp_calib_tokens": 16384,
    "val_loss_every": 0,
    "val_batch_size": 8192,
    "train_log_every": 10,
    "checkpoint_every": 100,
    "eval_modes": "carried",
    "eval_lanes": 8,
}
