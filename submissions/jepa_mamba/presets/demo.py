"""The whole pipeline in minutes on two CPU cores: 1024-token BPE, d192 x 5 layers, JEPA + SIGReg on, INT4/FP8.

Command: make demo
   or    python submissions/jepa_mamba/train_gpt.py --preset demo --data_path data/stdlib-bpe1024
Cost: 200 s of training by the clock; about 5 minutes with text preparation and scoring, 3 GB of memory.
Expected: about 1.44 bpb on the standard library's text, read back from a 0.85 MB artifact (more steps on faster cores).

Differs from the published run where two cores and a few hundred steps ask for it: feed-forward in every block, a long
warmdown, slower decay rates at the start, one attention layer, the parts of in_proj orthogonalised apart, documents
isolated, small batches of many short windows, small weights on the latent objectives, and one pass with carried state
as the score.
"""

PRESET = {
    "tokenizer": "bpe",
    "vocab_size": 1024,
    "model_dim": 192,
    "num_layers": 5,
    "d_state": 32,
    "headdim": 32,
    "a_init_min": 0.1,
    "a_init_max": 4.0,
    "attn_layers": "3",
    "chunk_size": 32,
    "mlp_every": 1,
    "mlp_mult": 3,
    "embed_dim": 128,
    "predictor_hidden_mult": 2,
    "document_reset": True,
    "jepa_weight": 0.1,
    "jepa_steps": 1,
    "sigreg_lambda": 0.1,
    "sigreg_timesteps": 32,
    "muon_split_in_proj": True,
    "matrix_lr": 0.01,
    "train_seq_len": 128,
    "train_batch_tokens": 2048,
    "micro_batch_tokens": 2048,
    "iterations": 100000,
    "max_wallclock_seconds": 200.0,
    "warmup_steps": 1,
    "warmdown_fraction": 0.6,
    "muon_momentum_warmup_steps": 50,
    "temp_calib_tokens": 8192,
    "val_loss_every": 120,
    "val_batch_size": 4096,
    "train_log_every": 5,
    "checkpoint_every": 100,
    "eval_modes": "carried",
    "eval_seq_len": 512,
    "eval_lanes": 8,
}
