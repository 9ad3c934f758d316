"""Options of the recipe search, each against a plain form of itself; the clock; test-time training; cost of scoring."""

from __future__ import annotations

import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from common.quant.grid import GridSpec
from common.text.loader import TokenLoader
from submissions.jepa_mamba import train_gpt
from submissions.jepa_mamba.train_gpt import (
    Documents,
    Pace,
    Progress,
    Ranks,
    StepBatch,
    Trainer,
    TrainingModel,
    adapted_nll,
    batch_tokens_at,
    check_evaluation,
    covariance_penalty,
    gain_by_position,
    jepa_scale_at,
    layer_statistics,
    main,
    parse_command,
    seconds_now,
    select_kernels,
    seq_len_at,
    sigreg_lambda_at,
    storage_spec,
    token_nll,
    tokens_to_compute,
)
from tests.submissions.jepa_mamba.conftest import flags, tiny
from tests.submissions.jepa_mamba.test_model import randomised

ALONE = Ranks(0, 1, torch.device("cpu"))
KERNELS = select_kernels("torch", ALONE.device)


def batch_of(config, seed: int = 0) -> StepBatch:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train_batch_tokens // config.train_seq_len, config.train_seq_len)
    x, y = (torch.randint(0, 250, shape, generator=generator) for _ in range(2))
    return StepBatch(x, y, torch.zeros(shape, dtype=torch.int32), {})


# Architecture


def test_dt_apart_is_the_same_function_and_has_its_own_grid() -> None:
    joined, apart = randomised(tiny()), randomised(tiny(dt_apart=True))
    state = joined.state_dict()
    for i in range(3):
        whole = state.pop(f"blocks.{i}.mixer.in_proj.weight")
        heads = apart.blocks[i].mixer.dt_proj.weight.shape[0]
        state[f"blocks.{i}.mixer.in_proj.weight"], state[f"blocks.{i}.mixer.dt_proj.weight"] = whole.split(
            [len(whole) - heads, heads]
        )
    apart.load_state_dict(state, strict=True)
    ids = torch.randint(0, 250, (2, 20))
    torch.testing.assert_close(apart.encode(ids)[0], joined.encode(ids)[0], atol=1e-6, rtol=1e-5)
    assert sum(apart.blocks[0].mixer.row_splits()) == len(apart.blocks[0].mixer.in_proj.weight)
    assert storage_spec("blocks.0.mixer.dt_proj.weight", torch.zeros(4, 32), tiny()) == GridSpec("int", bits=8)
    # it starts as the rows of in_proj would have
    start = [TrainingModel(tiny(dt_apart=a), KERNELS).lm.state_dict() for a in (False, True)]
    rows = torch.cat([start[1][f"blocks.2.mixer.{name}.weight"] for name in ("in_proj", "dt_proj")])
    assert torch.equal(rows, start[0]["blocks.2.mixer.in_proj.weight"])


def test_repeated_blocks_are_blocks_with_shared_weights() -> None:
    repeated = randomised(tiny(repeat_blocks="1,2", attn_layers="1"))
    assert repeated.order == (0, 1, 2, 1, 2)
    written_out = randomised(tiny(num_layers=5, attn_layers="1,3"))
    state = {}
    for name in written_out.state_dict():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts[1] = str((0, 1, 2, 1, 2)[int(parts[1])])
        state[name] = repeated.state_dict().get(".".join(parts))
    missing = [name for name, value in state.items() if value is None]
    assert not missing or all(".mlp" in name for name in missing)
    # block 3 of five has no feed-forward where block 1 of three has none either; block 4 has one, as block 2
    written_out.load_state_dict({n: v for n, v in state.items() if v is not None}, strict=not missing)
    ids = torch.randint(0, 250, (2, 20))
    torch.testing.assert_close(repeated.encode(ids)[0], written_out.encode(ids)[0], atol=1e-6, rtol=1e-5)
    assert len(repeated.encode(ids)[1].layers) == 5  # a state for each time that a block runs


def test_parallel_residual_reads_one_input() -> None:
    lm = randomised(tiny(parallel_residual=True, x0_mix=False))
    block, x = lm.blocks[0], torch.randn(1, 12, 32)
    normed = torch.nn.functional.rms_norm(x, (32,), eps=1e-6)
    expected = x + block.mixer_scale * block.mixer(normed, None, None)[0] + block.mlp_scale * block.mlp(normed)
    torch.testing.assert_close(block(x, x, None, None)[0], expected, atol=1e-5, rtol=1e-5)
    sequential = randomised(tiny(x0_mix=False)).blocks[0]
    assert not torch.allclose(sequential(x, x, None, None)[0], expected, atol=1e-3)


def test_pairs_of_tokens_are_embedded_by_their_hash() -> None:
    config = tiny(bigram_buckets=61, bigram_dim=8, document_reset=True)
    lm = randomised(config)
    ids = torch.tensor([[4, 7, 7, 250, 7], [9, 4, 7, 7, 7]])
    documents = torch.tensor([[0, 0, 0, 1, 1], [3, 3, 3, 3, 4]], dtype=torch.int32)
    before = [[None, 4, 7, None, 250], [None, 9, 4, 7, None]]
    added = torch.zeros(2, 5, 32)
    for b, t in itertools.product(range(2), range(5)):
        last = config.vocab_size if before[b][t] is None else before[b][t]
        row = lm.bigrams.table.weight[(36313 * last + 27191 * int(ids[b, t])) % 61]
        added[b, t] = lm.bigrams.proj.weight @ (row / row.square().mean().sqrt())
    found = lm.bigrams(ids, Documents(documents, None), None)
    torch.testing.assert_close(found, added, atol=1e-6, rtol=1e-5)
    whole = lm.bigrams.buckets(ids, None, None)
    assert torch.equal(whole[:, 3:], lm.bigrams.buckets(ids[:, 3:], None, ids[:, 2]))  # carried from before
    assert not torch.equal(whole[:, 3:], lm.bigrams.buckets(ids[:, 3:], None, None))
    # without them the model starts the same: what it has beside them draws the same, and they add nothing at first
    start, plain = (TrainingModel(replace(config, bigram_buckets=n), KERNELS).lm for n in (61, 0))
    assert all(torch.equal(start.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert torch.equal(start.encode(ids, documents)[0], plain.encode(ids, documents)[0])


def test_statistics_of_pairs_are_their_counts_and_gradients() -> None:
    config = tiny(bigram_buckets=61, num_layers=1, jepa_weight=0.0, sigreg_lambda=0.0)
    lm, batch = randomised(config), batch_of(config)
    rows = batch.x_BT.shape[0]
    found = layer_statistics(lm, batch.x_BT, batch.y_BT, batch.document_ids_BT, rows, ALONE)["bigrams.table.weight"]
    tokens = batch.x_BT.numel()
    counts = torch.bincount(lm.bigrams.buckets(batch.x_BT, None, None).reshape(-1), minlength=61).double()
    np.testing.assert_allclose(found.sensitivity_R, (counts.numpy() + 0.1) / tokens, rtol=1e-6)
    seen: list[torch.Tensor] = []
    handle = lm.bigrams.table.register_forward_hook(lambda module, inputs, output: seen.append(output))
    head = lm.head(lm.encode(batch.x_BT, batch.document_ids_BT)[0])
    handle.remove()
    options = {"cap": config.logit_softcap, "kind": lm.softcap_kind, "z_weight": 0.0}
    mean, _, _ = lm.kernels.softcap_xent(*head, batch.y_BT.reshape(-1), **options)
    (g_BTE,) = torch.autograd.grad(mean * tokens, seen)
    g_NE = g_BTE.flatten(0, 1).double()
    np.testing.assert_allclose(found.hessian_CC, (g_NE.T @ g_NE).numpy() / tokens, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("options", [{"muon_normalize_rows": False}, {"muon_polynomial": "polar_express"}], ids=str)
def test_muon_options_change_the_step(options: dict) -> None:
    moved = []
    for changes in ({}, options):
        trainer = Trainer(tiny(**changes), KERNELS, ALONE)
        trainer.step(batch_of(trainer.config), Progress(0, 0.0))
        moved.append(trainer.masters.master["lm.blocks.0.mixer.in_proj.weight"].detach().clone())
    assert not torch.equal(*moved)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"repeat_blocks": "2,1"}, "repeat_blocks"), ({"repeat_blocks": "0,2"}, "repeat_blocks"),
        ({"repeat_blocks": "3"}, "repeat_blocks"), ({"repeat_blocks": "x"}, "repeat_blocks"),
        ({"seq_len_start": 12}, "power of two"), ({"seq_len_start": 64}, "power of two"),
        ({"batch_tokens_start": 96}, "power of two"), ({"batch_tokens_start": 16}, "must divide"),
        ({"batch_full_at": 1.5}, "fractions"),
        ({"jepa_stride": 11}, "jepa_steps"), ({"jepa_layer": 4}, "jepa_layer"), ({"jepa_until": 1.5}, "fractions"),
        ({"clock_from": "r"}, "clock_from needs"), ({"clock": "sun"}, "wall, cpu"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        train_gpt.check_config(tiny(**options))


# Schedules


def test_windows_grow_and_hold_the_same_tokens() -> None:
    config = tiny(seq_len_start=8, seq_len_full_at=0.5, iterations=100)
    assert [seq_len_at(Progress(s, 0.0), config) for s in (0, 24, 25, 49, 50, 99)] == [8, 8, 16, 16, 32, 32]
    batch = batch_of(config)
    short = Trainer(config, KERNELS, ALONE).step(batch, Progress(0, 0.0))
    eight = tiny(train_seq_len=8, attn_window=32)
    pieces = StepBatch(*(t.view(-1, 8) for t in batch[:3]), {})
    whole = Trainer(eight, KERNELS, ALONE).step(pieces, Progress(0, 0.0))
    assert float(short["ce"]) == float(whole["ce"])
    assert float(short["grad_norm"]) == float(whole["grad_norm"])


def test_a_batch_is_skipped_whole_at_every_window() -> None:
    config = tiny(seq_len_start=8, seq_len_full_at=0.5, iterations=100)
    trainer = Trainer(config, KERNELS, ALONE)
    for step in (0, 30, 60):
        batch = batch_of(config, seed=step)
        trainer.skip_unless(
            torch.tensor(False), *(t.view(-1, seq_len_at(Progress(step, 0.0), config)) for t in batch[:2])
        )
        assert trainer.skipped_batch is not None
        assert all(torch.equal(kept, given) for kept, given in zip(trainer.skipped_batch[2:], batch[:2], strict=True))
        trainer.step(batch, Progress(step, 0.0))  # a good step of another length keeps what was bad
        assert torch.equal(trainer.skipped_batch[2], batch[0])
    assert int(trainer.masters.skipped) == 3


def test_batches_grow_by_whole_batches_of_the_loader(byte_data: Path) -> None:
    config = tiny(batch_tokens_start=64, batch_full_at=0.5)
    assert config.drawn_tokens == 64
    tokens = [batch_tokens_at(Progress(s, 0.0), config) for s in (0, 4, 5, 9, 10, 19)]
    assert tokens == [64, 64, 128, 128, 256, 256]
    assert batch_tokens_at(Progress(0, 0.0), tiny()) == tiny().train_batch_tokens

    def loader() -> TokenLoader:
        shards = train_gpt.list_shards(str(byte_data / "*_train_*.bin"))
        return TokenLoader(shards, seq_len=32, batch_sequences=2, seed=3, bos_id=None, vocab_size=256)

    drawing, plain = train_gpt.Prefetcher(loader(), ALONE.device, depth=3), loader()
    for parts in (1, 1, 2, 4):
        found, wanted = drawing.next(parts), [plain.next_batch() for _ in range(parts)]
        for name in ("x_BT", "y_BT", "document_ids_BT"):
            joined = np.concatenate([getattr(batch, name) for batch in wanted])
            assert np.array_equal(getattr(found, name).numpy(), joined), name
        assert found.loader_state == plain.state()
    drawing.close()


def test_a_run_of_growing_batches_counts_its_tokens_and_resumes(byte_data: Path, tmp_path: Path) -> None:
    arguments = flags(
        data_path=byte_data, runs_dir=tmp_path, run_id="run", batch_tokens_start=64, checkpoint_every=8,
        temp_calib_tokens=128,
    )  # fmt: skip
    assert main(arguments) == 0

    def told() -> tuple[list[tuple[int, int, float]], int, bytes]:
        events = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        steps = [(e["step"], e["tokens"], e["ce"]) for e in events if e["event"] == "step"]
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        return steps, summary["tokens"], (tmp_path / "run/model.artifact").read_bytes()

    whole = told()
    assert [tokens for _, tokens, _ in whole[0]] == list(itertools.accumulate([64] * 5 + [128] * 5 + [256] * 10))
    assert whole[1] == 3520
    (tmp_path / "run/summary.json").unlink()  # as if killed behind step 8, where batches are 128
    (tmp_path / "run/checkpoints/step_00000016.safetensors").unlink()
    assert main(arguments) == 0
    assert told() == whole


def test_a_skipped_batch_is_kept_whole_while_batches_grow() -> None:
    config = tiny(batch_tokens_start=64)
    trainer = Trainer(config, KERNELS, ALONE)
    whole = batch_of(config)
    for rows in (2, 8, 4):
        x_BT, y_BT = whole.x_BT[-rows:] + rows, whole.y_BT[-rows:]
        trainer.skip_unless(torch.tensor(False), x_BT, y_BT)
        trainer.skip_unless(torch.tensor(True), whole.x_BT[:2], whole.y_BT[:2])
        assert trainer.skipped_batch is not None
        _, windows, x_kept, y_kept = trainer.skipped_batch
        assert int(windows) == rows
        assert torch.equal(x_kept[:rows], x_BT)
        assert torch.equal(y_kept[:rows], y_BT)


def test_latent_objectives_fade() -> None:
    config = tiny(jepa_until=0.5, iterations=100, sigreg_lambda=2.0)
    assert [jepa_scale_at(Progress(s, 0.0), config) for s in (0, 25, 50, 80)] == [1.0, 0.5, 0.0, 0.0]
    assert sigreg_lambda_at(Progress(25, 0.0), config) == 1.0
    trainer = Trainer(config, KERNELS, ALONE)
    assert {"jepa", "sigreg"} <= trainer.step(batch_of(config), Progress(25, 0.0)).keys()
    assert not {"jepa", "sigreg"} & trainer.step(batch_of(config), Progress(60, 0.0)).keys()


# Latent objectives


def test_prediction_targets() -> None:
    """stride, rollout, stopped gradients and the placebo, against loops."""
    torch.manual_seed(0)
    z = torch.randn(3, 12, 32, requires_grad=True)
    for options in ({"jepa_stride": 4, "jepa_steps": 2}, {"jepa_stride": 2, "jepa_steps": 1, "jepa_shuffle": True}):
        config = tiny(**options)
        head = TrainingModel(config, KERNELS).jepa
        assert head is not None
        torch.nn.init.normal_(head.predictor_out.weight, std=0.2)
        source = z.roll((1, 6), (0, 1)) if config.jepa_shuffle else z
        errors = []
        for k in range(1, config.jepa_steps + 1):
            ahead = k * config.jepa_stride
            parts = []
            for t in range(12 - ahead):
                guess = z[:, t]
                for _ in range(k):
                    guess = head.predict(guess[:, None])[:, 0]
                parts.append((guess - source[:, t + ahead]).square().mean())
            errors.append(torch.stack(parts).mean())
        expected = torch.stack(errors).mean()
        torch.testing.assert_close(head.prediction_loss(z, config), expected, atol=1e-6, rtol=1e-5)
        stopped = replace(config, detach_targets=True)
        one, other = (torch.autograd.grad(head.prediction_loss(z, c), z)[0] for c in (config, stopped))
        assert not torch.allclose(one, other)


def test_latents_of_a_middle_layer() -> None:
    config = tiny(jepa_layer=2)
    model = TrainingModel(config, KERNELS)
    ids, seen = torch.randint(0, 250, (2, 16)), []
    model.lm.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    _, z = model.latents(ids, None)
    assert model.jepa is not None
    expected = model.jepa.projector(torch.nn.functional.rms_norm(seen[0], (32,), eps=1e-6))
    torch.testing.assert_close(z, expected, atol=1e-6, rtol=1e-5)


def test_covariance_penalty_is_its_formula_and_sits_at_its_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(40, 3, 8, generator=generator)
    expected = []
    for t in range(3):
        moment, mean = z[:, t].T @ z[:, t] / 40, z[:, t].mean(0)
        expected.append(((moment - torch.eye(8)).square().sum() + mean.square().sum()) / 8)
    torch.testing.assert_close(covariance_penalty(z), torch.stack(expected).mean())
    many = torch.randn(64, 400, 8, generator=generator)
    assert float(covariance_penalty(many)) == pytest.approx(10 / 64, rel=0.05)
    assert float(covariance_penalty(torch.ones(64, 4, 8))) > 7  # collapsed
    config = tiny(sigreg_form="covariance", sigreg_mode="pooled")
    losses = Trainer(config, KERNELS, ALONE).step(batch_of(config), Progress(0, 0.0))
    assert float(losses["sigreg"] - losses["sigreg_excess"]) == pytest.approx(34 / 128)  # 4 windows of 32 a micro-batch


def test_measured_gradients_are_those_of_the_parts_and_teach_nothing() -> None:
    config = tiny(micro_batch_tokens=256, jepa_weight=0.5, sigreg_lambda=0.0)
    trainer = Trainer(config, KERNELS, ALONE)
    trainer.step(batch_of(config), Progress(0, 0.0))
    before = {name: p.detach().clone() for name, p in trainer.masters.master.items()}
    gradient = trainer.masters.flat_gradient.clone()
    found = trainer.measure_latents(batch_of(config, 1), Progress(1, 0.0))
    assert torch.equal(gradient, trainer.masters.flat_gradient)
    assert all(torch.equal(before[name], p) for name, p in trainer.masters.master.items())
    assert all(p.grad is None for p in trainer.model.parameters())
    norms = {}
    for name, weights in (("jepa", {"ce_weight": 0.0}), ("ce", {"jepa_weight": 0.0})):
        trainer.model.config = replace(config, **weights)
        loss, _ = trainer.model(*batch_of(config, 1)[:2], None, None, None)
        grads = torch.autograd.grad(loss, list(trainer.model.lm.parameters()), allow_unused=True)
        norms[name] = math.sqrt(sum(float(g.square().sum()) for g in grads if g is not None))
    assert found["jepa_gradient_over_ce"] == pytest.approx(norms["jepa"] / norms["ce"], rel=1e-4)
    assert {"jepa_r2_over_copy", "z_temporal_variance"} <= found.keys()
    assert "sigreg_gradient_over_ce" not in found


def test_modules_of_one_arm_draw_from_generators_of_their_own() -> None:
    before = torch.get_rng_state()
    starts = [TrainingModel(tiny(**arm), KERNELS) for arm in ({}, {"jepa_weight": 0.0, "sigreg_lambda": 0.0})]
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.lm.state_dict() for model in starts]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    losses = [Trainer(m.config, KERNELS, ALONE).step(batch_of(m.config), Progress(0, 0.0)) for m in starts]
    assert float(losses[0]["ce"]) == float(losses[1]["ce"])


# The clock


def test_processor_time_leaves_waiting_out() -> None:
    began = {kind: seconds_now(kind) for kind in ("wall", "cpu")}
    time.sleep(0.3)
    took = {kind: seconds_now(kind) - start for kind, start in began.items()}
    assert took["wall"] >= 0.3
    assert took["cpu"] < took["wall"] - 0.1


def test_a_run_by_the_clock_of_another_is_that_run(byte_data: Path, tmp_path: Path, monkeypatch) -> None:
    """Same steps, same schedule, same bits, however long a step takes the second time; latents measured on the way."""
    options = {
        "data_path": byte_data, "runs_dir": tmp_path, "iterations": 100000, "max_wallclock_seconds": 1.0,
        "clock": "cpu", "warmup_steps": 1, "checkpoint_every": 0, "warmdown_fraction": 0.7, "latent_log_every": 3,
        "ema_decay": 0.5, "qat_fraction": 0.5, "jepa_diagnostics": False,
    }  # fmt: skip
    now = itertools.count()
    monkeypatch.setattr(train_gpt, "seconds_now", lambda clock: next(now) / 16)  # two readings a step
    assert main(flags(run_id="first", **options)) == 0
    monkeypatch.setattr(train_gpt, "seconds_now", lambda clock: next(now) / 4)  # another machine
    assert main(flags(run_id="second", clock_from=tmp_path / "first", **options)) == 0
    first, second = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("first", "second"))
    assert 4 < first["steps"] < 16
    for name in ("steps", "val_bpb", "float_val_bpb", "artifact_sha256", "temperature"):
        assert first[name] == second[name], name
    assert first["train_s"] <= 1.0 < 3 * first["train_s"] < second["train_s"]
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in
            ("first", "second")]  # fmt: skip
    for event, keys in (("step", ("loss", "grad_norm")), ("latents", ("jepa_gradient_over_ce", "sigreg_excess"))):
        one, other = ([[e[k] for k in keys] for e in log if e["event"] == event] for log in logs)
        assert one
        assert one == other
    assert sum(e["event"] == "clock" for e in logs[0]) == first["steps"] + 1


def test_a_clock_that_cannot_be_read_is_named(byte_data: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/log.jsonl").write_text('{"event": "step", "step": 1}\n')
    for run, says in (("none", "does not exist"), ("bare", "no clock readings")):
        arguments = flags(
            data_path=byte_data, runs_dir=tmp_path, run_id="x", max_wallclock_seconds=1.0, clock_from=tmp_path / run
        )
        assert main(arguments) == 2
        assert says in capsys.readouterr().err


# Scoring


def stream(seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    parts = [np.concatenate([[255], generator.integers(0, 250, generator.integers(3, 60))]) for _ in range(9)]
    return np.concatenate(parts).astype(np.uint16)


def ttt(lm, tokens: np.ndarray, ranks: Ranks = ALONE, **options) -> tuple[np.ndarray, int]:
    config = replace(lm.config, ttt_chunk_tokens=48, **options)
    return adapted_nll(lm, tokens, config, bos_id=255, temperature=1.0, ranks=ranks)


@pytest.mark.parametrize("options", [{}, {"document_reset": True, "attn_layers": "1"}], ids=str)
def test_every_token_is_scored_before_it_teaches(options: dict) -> None:
    lm, tokens = randomised(tiny(**options)), stream()
    weights = {name: value.clone() for name, value in lm.state_dict().items()}
    adapted, computed = ttt(lm, tokens)
    assert all(torch.equal(weights[name], value) for name, value in lm.state_dict().items()), "weights come back"
    assert all(p.grad is None for p in lm.parameters())
    carried, _ = token_nll(
        lm, tokens, mode="carried", length=32, stride=1, batch_tokens=64, lanes=1, bos_id=255, temperature=1.0,
        ranks=ALONE,
    )  # fmt: skip
    np.testing.assert_allclose(adapted[:48], carried[:48], atol=1e-5)  # the first chunk has nothing to learn from
    assert not np.allclose(adapted[48:96], carried[48:96], atol=1e-3)
    np.testing.assert_allclose(ttt(lm, tokens, ttt_lr=0.0)[0], carried, atol=2e-5)
    assert computed <= 4 * (len(tokens) - 1)
    for cut in (60, 96, 130):  # inside a chunk and at its edge: what comes later changes nothing earlier
        changed = tokens.copy()
        changed[cut:] = 7
        np.testing.assert_array_equal(ttt(lm, changed)[0][: cut - 1], adapted[: cut - 1])


def test_what_repeats_gets_cheaper_by_learning() -> None:
    lm = randomised(tiny())
    tokens = np.tile(np.arange(97, 113, dtype=np.uint16), 40)
    rows = [ttt(lm, tokens, ttt_lr=lr)[0] for lr in (0.0, 0.1)]
    assert rows[1][-100:].mean() < rows[0][-100:].mean() - 0.5


@pytest.mark.parametrize("mode", ["standard", "sliding", "carried"])
@pytest.mark.parametrize("reset", [False, True])
def test_the_tokens_of_a_mode_are_known_beforehand(mode: str, reset: bool) -> None:
    lm, tokens = randomised(tiny(document_reset=reset)), stream()
    config = replace(lm.config, sliding_eval_stride=8, eval_lanes=3)
    _, computed = token_nll(
        lm, tokens, mode=mode, length=32, stride=8, batch_tokens=64, lanes=3, bos_id=255, temperature=1.0, ranks=ALONE
    )  # fmt: skip
    assert tokens_to_compute(tokens, config, mode, 255, 1) == computed
    if mode == "carried" and not reset:
        assert computed == len(tokens) - 1


def test_a_mode_that_takes_too_long_is_refused(byte_data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"sliding computes 6,000 tokens: 1,000 s at 6 tokens/s .* use carried"):
        check_evaluation("sliding", 6000, 6.0, tiny(eval_seconds=999.0), "as declared")
    check_evaluation("sliding", 6000, 6.0, tiny(eval_seconds=0.0), "as declared")
    arguments = flags(data_path=byte_data, runs_dir=tmp_path, run_id="slow", eval_modes="carried,sliding")
    assert main([*arguments, "--sliding_eval_stride=1", "--eval_tokens_per_s=1000", "--eval_seconds=60"]) == 2
    assert "eval mode sliding" in capsys.readouterr().err
    assert not (tmp_path / "slow").exists(), "refused before anything is trained"
    clock = iter([0.0, 29.0, 31.0])
    monkeypatch.setattr(train_gpt, "seconds_now", lambda kind: next(clock) * torch.get_num_threads())
    pace = Pace("sliding", 100_000, tiny(eval_seconds=600.0), ALONE.device)
    pace.check(10)  # too early to tell
    with pytest.raises(ConfigError, match="as measured here"):
        pace.check(1000)


def test_gain_by_place_in_the_window() -> None:
    standard, carried = np.tile([4.0, 3.0, 2.0, 2.0, 1.0], 3)[:13], np.ones(13)
    rows = gain_by_position(standard * math.log(2), carried * math.log(2), 5)
    assert [(r["first"], r["last"], r["tokens"]) for r in rows] == [(0, 0, 3), (1, 1, 3), (2, 3, 5), (4, 4, 2)]
    assert [r["gain_bits"] for r in rows] == pytest.approx([3.0, 2.0, 1.0, 0.0])


def test_the_new_modes_from_an_artifact(byte_data: Path, tmp_path: Path, capsys) -> None:
    options = {"run_id": "m", "eval_modes": "carried,standard,ttt", "iterations": 2, "checkpoint_every": 0}
    options |= {"data_path": byte_data, "runs_dir": tmp_path, "document_reset": True, "repeat_blocks": "1",
                "parallel_residual": True, "dt_apart": True, "ttt_chunk_tokens": 256}  # fmt: skip
    assert main(flags(**options)) == 0
    summary = json.loads((tmp_path / "m/summary.json").read_text())
    assert summary["scores"]["ttt"]["computed_per_token"] > 2
    assert "learn" in summary["scores"]["ttt"]["context"]
    assert sum(row["tokens"] for row in summary["carried_gain"]) == summary["val_tokens"]
    capsys.readouterr()
    assert main(["--score", str(tmp_path / "m/model.artifact"), "--val", str(byte_data / "*_val_*.bin")]) == 0
    scored = json.loads(capsys.readouterr().out)
    assert scored["scores"]["ttt"]["bpb"] == summary["scores"]["ttt"]["bpb"]
    hook = train_gpt.referee_hook(str(tmp_path / "m/model.artifact"))
    assert hook["learns_while_scoring"] is True
    assert len(hook["nll"](stream(), "ttt")) == len(stream()) - 1


def test_flags_of_the_recipe_parse() -> None:
    config = parse_command(["--repeat_blocks", "2,3", "--eval_modes", "ttt", "--clock", "cpu"], {}).config
    assert config.block_order() == (0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 9)
