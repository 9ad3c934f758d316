"""Groups, grids, the clock's rehearsal, checkpoints, resumption and ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.artifact.container import load_artifact, save_artifact
from common.errors import CheckpointError, ConfigError, StorageError, TrainingError
from common.quant.plan import FREE_STEP_GRID, TRELLIS_GRID, plan_model
from common.softcap_xent.torch_impl import softcap_torch
from common.text.tokenizer import load_tokenizer
from submissions.jepa_mamba import train_gpt
from submissions.jepa_mamba.train_gpt import (
    FeedForward,
    Interruption,
    Masters,
    Preempted,
    Progress,
    Ranks,
    Run,
    StepBatch,
    Trainer,
    TrainingModel,
    build_optimizers,
    checkpoint_digest,
    export_artifact,
    learning_rate_scale,
    load_checkpoint,
    load_model,
    optimizer_group,
    parse_command,
    read_checkpoint,
    select_kernels,
)
from tests.submissions.jepa_mamba.conftest import ENTRY, flags, losses_of, run_entry, tiny

ALONE = Ranks(0, 1, torch.device("cpu"))
KERNELS = select_kernels("torch", ALONE.device)
EVERYTHING = {
    "attn_layers": "1", "ema_decay": 0.9, "muon_split_in_proj": True, "document_reset": True, "bigram_buckets": 200,
}  # fmt: skip


def batch_of(config, seed: int = 0) -> StepBatch:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train_batch_tokens // config.train_seq_len, config.train_seq_len)
    x, y = (torch.randint(0, 250, shape, generator=generator) for _ in range(2))
    return StepBatch(x, y, torch.zeros(shape, dtype=torch.int32), {})


@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": 0}, {"tie_embeddings": 2}, {"tie_embeddings": 3}, EVERYTHING], ids=str
)
def test_every_parameter_is_in_exactly_one_group_and_moves(options: dict) -> None:
    config = tiny(**options)
    trainer = Trainer(config, KERNELS, ALONE)
    owners: dict[int, list[str]] = {}
    for kind, optimizer in trainer.optimizers.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owners.setdefault(id(parameter), []).append(kind)
    masters = trainer.masters.master
    assert set(masters) == {name for name, _ in trainer.model.named_parameters()}
    assert all(owners[id(p)] == [optimizer_group(name, p)] for name, p in masters.items())
    before = {name: p.detach().clone() for name, p in masters.items()}
    trainer.masters.publish(True)
    for step in range(3):  # zero-initialised outputs let some gradients through only from the second step on
        trainer.step(batch_of(config, step), Progress(step, 0.0))
    still = {name for name, p in masters.items() if torch.equal(p, before[name])}
    assert not still
    assert any("conv_weight" in name for name in masters), "the convolution is trained"


def test_scan_scalars_and_scales_do_not_decay() -> None:
    config = tiny()
    model = TrainingModel(config, KERNELS)
    optimizers = build_optimizers(model, Masters(model, config, torch.float32), config)
    assert all(group["weight_decay"] == 0 for group in optimizers["scalar"].param_groups)
    assert all(group["weight_decay"] == config.adam_wd for group in optimizers["embed"].param_groups)
    assert all(group["weight_decay"] == config.muon_wd for group in optimizers["muon"].param_groups)


def test_masters_are_float32_and_small_updates_are_kept() -> None:
    """bf16 storage froze dt_bias: an update below half a bf16 ulp of 4 must move a master."""
    trainer = Trainer(tiny(), KERNELS, ALONE)
    assert all(p.dtype == torch.float32 for p in trainer.masters.master.values())
    master = next(p for name, p in trainer.masters.master.items() if name.endswith("dt_bias"))
    with torch.no_grad():
        master.fill_(-4.5)
        for _ in range(10):
            master += 1e-3
    assert torch.allclose(master, torch.tensor(-4.49))


@pytest.mark.parametrize("bits", [4, 5, 6])
@pytest.mark.parametrize("storage", ["FP8", "INT8", "BF16"])
def test_training_export_and_scoring_hold_the_same_weights_bit_for_bit(bits: int, storage: str, tmp_path: Path) -> None:
    config = tiny(quant_bits=bits, fp_storage=storage, model_dim=64, headdim=32)
    trainer = Trainer(config, KERNELS, ALONE)
    trainer.masters.publish(True)
    trainer.step(batch_of(config), Progress(0, 0.0))
    held = {name: p.detach().clone() for name, p in trainer.model.lm.state_dict().items()}
    export_artifact(tmp_path / "model.artifact", trainer.masters, config, load_tokenizer("byte"), 1.0)
    fresh, _, _ = load_model(tmp_path / "model.artifact", "torch", ALONE)
    loaded = fresh.state_dict()
    assert held.keys() == loaded.keys()
    assert all(torch.equal(held[name], loaded[name]) for name in held)
    tensors, _ = load_artifact(tmp_path / "model.artifact")
    assert not any("projector" in name or "predictor" in name or "pred_proj" in name for name in tensors)
    codes = np.unique(tensors["blocks.0.mixer.in_proj.weight"][0])
    assert len(codes) <= 2**bits - 1


@pytest.mark.parametrize("trellis", [False, True])
def test_free_steps_fill_their_budget_and_scoring_holds_what_shipped(tmp_path: Path, trellis: bool) -> None:
    free = {"free_steps": True, "trellis": trellis, "statistics_tokens": 512, "model_dim": 64, "headdim": 32}
    config = tiny(**EVERYTHING, **free, ema_start_fraction=0.0)
    trainer, tokenizer = Trainer(config, KERNELS, ALONE), load_tokenizer("byte")
    trainer.step(batch_of(config), Progress(0, 0.0))
    statistics = trainer.statistics([batch_of(config, 1), batch_of(config, 2)])
    matrices = {name for name, p in trainer.model.lm.named_parameters() if optimizer_group(name, p) != "scalar"}
    assert set(statistics) == matrices
    assert all((layer.sensitivity_R >= 0).all() and layer.sensitivity_R.max() > 0 for layer in statistics.values())
    before = {name: p.detach().clone() for name, p in trainer.model.lm.named_parameters()}

    budget_bytes = 60_000
    plan, _ = trainer.plan(statistics, tokenizer, budget_bytes, to_ship=False)
    assert plan.expected_nats.keys() == matrices
    # training on these steps: every compute weight lies on its grid, masters keep their float values
    trainer.masters.train_on(
        {name: torch.from_numpy(plan.tensors[name].scales) for name in plan.expected_nats}, plan.loss_nats
    )
    trainer.step(batch_of(config, 3), Progress(1, 0.0))
    for name in matrices:
        scales, weight = plan.tensors[name].scales, trainer.model.lm.state_dict()[name].numpy()
        step_RC = scales[: len(weight), None] * scales[None, len(weight) :]
        np.testing.assert_allclose(weight / step_RC, np.rint(weight / step_RC), atol=1e-3)
        assert not torch.equal(trainer.masters.master[f"lm.{name}"], before[name])
    # the end: codes for the weights as they are now, on the same steps but for one factor
    last, _ = trainer.plan(statistics, tokenizer, budget_bytes, to_ship=True)
    assert {q.spec for name, q in last.tensors.items() if name in matrices} == {
        TRELLIS_GRID if trellis else FREE_STEP_GRID
    }
    for name in matrices:
        ratio = last.tensors[name].scales[:3] / plan.tensors[name].scales[:3]
        np.testing.assert_allclose(ratio, ratio[0], rtol=0.01)
    # what is fitted to the grid is the moving average, which does not lie on the grid that training ran on
    average = {name: trainer.masters.ema[f"lm.{name}"].numpy() for name in matrices}
    assert not any(np.array_equal(average[n], trainer.masters.master[f"lm.{n}"].detach().numpy()) for n in matrices)
    refit = plan_model(average, statistics, {}, last.loss_nats, config.rate, trainer.masters.trained_steps(), trellis)
    assert all(np.array_equal(refit.tensors[name].codes, last.tensors[name].codes) for name in matrices)
    trainer.masters.rounded = {name: last.tensors[name] for name in last.expected_nats}
    report = export_artifact(tmp_path / "model.artifact", trainer.masters, config, tokenizer, 0.99)
    assert 0.995 * budget_bytes <= report.file_bytes <= budget_bytes
    fresh, _, _ = load_model(tmp_path / "model.artifact", "torch", ALONE)
    with trainer.masters.as_shipped(training_on_grid=True):
        held = trainer.model.lm.state_dict()
        assert all(torch.equal(held[name], loaded) for name, loaded in fresh.state_dict().items())


@pytest.mark.parametrize("activation", ["relu2", "leaky_relu2", "swiglu"])
def test_a_watched_feed_forward_is_the_same_function(activation) -> None:
    network = FeedForward(tiny(activation=activation), KERNELS)
    torch.nn.init.normal_(network.down.weight)
    x_BTD = torch.randn(2, 3, network.down.out_features)
    fused_BTD = network(x_BTD)
    network.watched = True
    torch.testing.assert_close(network(x_BTD), fused_BTD)


def test_statistics_predict_the_loss_of_a_small_change() -> None:
    """Fisher statistics are those of the loss: per-token gradient moments, checked against autograd by hand."""
    config = tiny(free_steps=True, statistics_tokens=256, num_layers=1, jepa_weight=0.0, sigreg_lambda=0.0)
    trainer = Trainer(config, KERNELS, ALONE)
    batch = batch_of(config)
    found = trainer.statistics([batch])["blocks.0.mlp.down.weight"]
    trainer.masters.publish(False)  # statistics are of the float weights
    lm = trainer.model.lm
    module = lm.get_submodule("blocks.0.mlp.down")
    seen: dict[str, torch.Tensor] = {}

    def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["x"], seen["y"] = inputs[0].detach().flatten(0, 1), output
        output.retain_grad()

    network = lm.get_submodule("blocks.0.mlp")
    assert isinstance(network, FeedForward)
    assert not network.watched
    network.watched = True
    handle = module.register_forward_hook(keep)
    rows, weight, bias = lm.head(lm.encode(batch.x_BT, batch.document_ids_BT)[0])
    logits = softcap_torch(torch.nn.functional.linear(rows, weight) + bias, config.logit_softcap, lm.softcap_kind)
    torch.nn.functional.cross_entropy(logits, batch.y_BT.reshape(-1), reduction="sum").backward()
    handle.remove()
    tokens = batch.x_BT.numel()
    assert seen["y"].grad is not None
    gradient_NR = seen["y"].grad.flatten(0, 1).double()
    np.testing.assert_allclose(found.sensitivity_R, gradient_NR.square().sum(0).numpy() / tokens, rtol=1e-4)
    x_NC = seen["x"].double()
    np.testing.assert_allclose(found.hessian_CC, (x_NC.T @ x_NC).numpy() / tokens, rtol=1e-4, atol=1e-9)


def test_rehearsal_restores_everything_bit_for_bit() -> None:
    config = tiny(**EVERYTHING, ema_start_fraction=0.0)
    trainer = Trainer(config, KERNELS, ALONE)
    trainer.masters.publish(True)
    trainer.step(batch_of(config, 1), Progress(0, 0.0))

    def picture() -> dict[str, torch.Tensor]:
        out = {f"compute/{n}": p.detach().clone() for n, p in trainer.model.named_parameters()}
        out |= {f"master/{n}": p.detach().clone() for n, p in trainer.masters.master.items()}
        out |= {f"ema/{n}": t.clone() for n, t in trainer.masters.ema.items()}
        for kind, optimizer in trainer.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                out |= {f"{kind}/{i}/{k}": torch.as_tensor(v).clone() for k, v in state.items()}
        return out

    before, at = picture(), Progress(1, 0.0)
    with trainer.rehearsal(at):
        trainer.step(batch_of(config, 2), at)
        assert any(not torch.equal(a, b) for a, b in zip(before.values(), picture().values(), strict=True))
    after = picture()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_warmup_changes_no_loss(byte_data: Path, tmp_path: Path) -> None:
    for name, warmup in (("cold", 0), ("warm", 2)):
        run_entry(*flags(data_path=byte_data, runs_dir=tmp_path, run_id=name, warmup_steps=warmup, iterations=6))
    assert losses_of(tmp_path / "cold") == losses_of(tmp_path / "warm")


def test_schedules() -> None:
    config = tiny(iterations=100, warmdown_fraction=0.4, lr_warmup_steps=10)
    scale = [learning_rate_scale(Progress(step, 0.0), config) for step in (0, 4, 9, 30, 60, 80, 99, 100)]
    assert scale == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.025, 0])
    timed = tiny(iterations=1000, warmdown_fraction=0.5, max_wallclock_seconds=10.0)
    assert learning_rate_scale(Progress(5, 7.5), timed) == pytest.approx(0.5)
    assert learning_rate_scale(Progress(5, 8.0, reserved_s=2.0), timed) == 0.0  # the search's seconds are not for steps
    by_steps = tiny(iterations=100, warmdown_fraction=0.5, max_wallclock_seconds=10.0, warmdown_by="steps")
    assert learning_rate_scale(Progress(75, 0.0), by_steps) == pytest.approx(0.5)


def test_run_folder_and_summary(byte_data: Path, tmp_path: Path) -> None:
    arguments = flags(
        data_path=byte_data,
        runs_dir=tmp_path,
        run_id="whole",
        eval_modes="carried,standard,sliding",
        val_loss_every=10,
        temp_scaling=True,
        document_reset=True,
        sliding_eval_stride=8,
    )
    done = run_entry(*arguments)
    run = tmp_path / "whole"
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "log.jsonl",
        "train.log",
        "checkpoints",
        "model.artifact",
        "summary.json",
    }
    summary = json.loads((run / "summary.json").read_text())
    wanted = [
        "val_bpb",
        "val_loss",
        "val_tokens",
        "val_bytes",
        "eval_mode",
        "float_val_bpb",
        "artifact_bytes",
        "code_bytes",
        "total_bytes",
        "params",
        "steps",
        "tokens",
        "train_s",
        "eval_s",
        "seed",
        "config",
        "git",
    ]
    assert all(key in summary for key in wanted)
    val = np.fromfile(next(byte_data.glob("*_val_*")), dtype="<u2")[512:]
    assert summary["val_tokens"] == len(val) - 1
    assert summary["val_bytes"] == int((val[1:] != 255).sum())
    assert summary["val_bpb"] == pytest.approx(
        summary["val_loss"] * summary["val_tokens"] / np.log(2) / summary["val_bytes"]
    )
    assert summary["artifact_bytes"] == (run / "model.artifact").stat().st_size
    assert summary["steps"] == 20
    assert summary["tokens"] == 20 * 256
    assert summary["scores"]["carried"]["computed_per_token"] < 1.2
    assert {"jepa_cosine", "jepa_r2_over_copy", "z_temporal_variance", "lm_top5", "probe_bpb"} <= set(
        summary["jepa_diagnostics"]
    )
    log = (run / "train.log").read_text()
    assert ENTRY.read_text()[:500] in log
    assert "common/ssd/torch_impl.py" in log
    assert "kernels: torch" in done.stdout
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "validation"] == [10]

    # The same numbers in a fresh process, from the artifact alone.
    scored = json.loads(
        run_entry("--score", str(run / "model.artifact"), "--val", str(byte_data / "*_val_*.bin")).stdout
    )
    assert scored["val_bpb"] == summary["val_bpb"]
    assert scored["scores"].keys() == summary["scores"].keys()
    assert all(scored["scores"][m]["bpb"] == summary["scores"][m]["bpb"] for m in scored["scores"])
    text = run_entry("--generate", str(run / "model.artifact"), "--prompt", "abc", "--tokens", "20").stdout
    assert text.startswith("abc")

    refused = run_entry(*arguments, check=False)
    assert refused.returncode == 2
    assert "is finished" in refused.stderr
    assert summary == json.loads((run / "summary.json").read_text())
    assert run_entry(*arguments, "--overwrite").returncode == 0


def test_wall_clock_is_never_exceeded_and_counts_the_temperature_search(
    byte_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = {"s": 100.0}
    for name, seconds in (("step", 1.0), ("temperature", 2.0)):
        real = getattr(Trainer, name)

        def slow(self: Trainer, *words: object, real=real, seconds: float = seconds) -> object:
            now["s"] += seconds
            return real(self, *words)

        monkeypatch.setattr(Trainer, name, slow)
    monkeypatch.setattr(train_gpt, "seconds_now", lambda clock: now["s"])
    options = {"data_path": byte_data, "runs_dir": tmp_path, "iterations": 100000, "max_wallclock_seconds": 12.0}
    assert train_gpt.main(flags(run_id="clock", warmup_steps=1, train_log_every=50, **options)) == 0
    summary = json.loads((tmp_path / "clock/summary.json").read_text())
    # Twice the search is kept free, and room for one more step: the eighth could end at 12, with no second to spare.
    assert (summary["steps"], summary["train_s"]) == (7, 9.0)


def test_over_budget_is_an_error(byte_data: Path, tmp_path: Path) -> None:
    done = run_entry(
        *flags(data_path=byte_data, runs_dir=tmp_path, run_id="fat", iterations=1, budget_bytes=20_000), check=False
    )
    assert done.returncode == 2
    assert "20,000" in done.stderr
    assert not (tmp_path / "fat/summary.json").exists()
    assert (tmp_path / "fat/model.artifact").exists()


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ENTRY.parents[2])}
    return subprocess.Popen(
        [sys.executable, str(ENTRY), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    log = run / "log.jsonl"
    while not log.exists() or f'"step": {step},' not in log.read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def artifacts_equal(a: Path, b: Path) -> bool:
    return (a / "model.artifact").read_bytes() == (b / "model.artifact").read_bytes()


@pytest.mark.slow  # the fault campaign in miniature does so with two ranks
def test_killed_run_resumes_bitwise(byte_data: Path, tmp_path: Path) -> None:
    options = {**EVERYTHING, "iterations": 40, "checkpoint_every": 4, "ema_start_fraction": 0.2, "data_path": byte_data}
    run_entry(*flags(**options, runs_dir=tmp_path / "a", run_id="run"))
    arguments = flags(**options, runs_dir=tmp_path / "b", run_id="run")
    for step in (6, 19, 31):
        process = start(*arguments)
        wait_for_step(tmp_path / "b/run", step, process)
        process.kill()
        process.communicate()
    assert any((tmp_path / "b/run/checkpoints").iterdir())
    run_entry(*arguments)
    assert losses_of(tmp_path / "a/run") == losses_of(tmp_path / "b/run")
    assert artifacts_equal(tmp_path / "a/run", tmp_path / "b/run")


def test_termination_saves_and_a_damaged_checkpoint_is_passed_over(byte_data: Path, tmp_path: Path) -> None:
    options = {"iterations": 40, "checkpoint_every": 4, "data_path": byte_data}
    run_entry(*flags(**options, runs_dir=tmp_path / "a", run_id="run"))
    arguments = flags(**options, runs_dir=tmp_path / "b", run_id="run")
    process = start(*arguments)
    wait_for_step(tmp_path / "b/run", 10, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "goes on from here" in process.communicate()[0]
    newest, before = sorted((tmp_path / "b/run/checkpoints").glob("*.safetensors"), reverse=True)[:2]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    done = run_entry(*arguments)
    assert f"{newest.name} is damaged" in done.stdout
    assert before.name < newest.name
    assert artifacts_equal(tmp_path / "a/run", tmp_path / "b/run")


@pytest.mark.parametrize(("asked", "ends_with"), [(True, Preempted), (False, TrainingError)])
def test_a_rank_that_was_asked_to_stop_does_not_blame_the_one_that_left_first(monkeypatch, asked, ends_with) -> None:
    def lost(command: object, ranks: Ranks) -> Run:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7585")

    monkeypatch.setattr(train_gpt, "join_ranks", lambda choice, environ: Ranks(1, 2, torch.device("cpu")))
    monkeypatch.setattr(train_gpt, "Run", lost)
    monkeypatch.setattr(train_gpt.dist, "destroy_process_group", lambda: None)
    interruption = Interruption()
    interruption.asked = asked
    with pytest.raises(ends_with):
        train_gpt.serve(parse_command(flags(), {}), interruption)


def test_checkpoints_notice_any_change(byte_data: Path, tmp_path: Path) -> None:
    run = Run(parse_command(flags(data_path=byte_data, runs_dir=tmp_path, run_id="run"), {}), ALONE)
    run.trainer.step(batch_of(run.config), Progress(0, 0.0))
    run.at = Progress(1, 0.5)
    run.save()
    path = run.folder.checkpoint_of(1)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    sound, (header, tensors) = path.read_bytes(), read_checkpoint(path)
    assert header["step"] == 1
    generator = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(sound)
        data[generator.integers(len(data))] ^= 1 << generator.integers(8)
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="damaged"):
            read_checkpoint(path)
    # A checkpoint with a fitting checksum, of another model: refused by name, too.
    state = json.dumps(header)
    for change in ({"master/lm.token_embed.weight": torch.zeros(3)}, {}):
        others = {**tensors, **change} if change else {k: v for k, v in tensors.items() if "embed" not in k}
        save_file(others, path, metadata={"state": state, "blake2b": checkpoint_digest(state, others)})
        with pytest.raises(CheckpointError, match="does not fit this model"):
            load_checkpoint(run.folder, run.trainer.masters, run.trainer.optimizers)


def test_a_checkpoint_that_does_not_read_back_is_not_saved(byte_data: Path, tmp_path: Path, monkeypatch) -> None:
    run = Run(parse_command(flags(data_path=byte_data, runs_dir=tmp_path, run_id="run"), {}), ALONE)
    run.save()
    before = run.folder.checkpoint_of(0).read_bytes()
    digest = train_gpt.checkpoint_digest
    answers = iter(["0" * 32])  # what is on disk is not what was written
    monkeypatch.setattr(train_gpt, "checkpoint_digest", lambda *a: next(answers, None) or digest(*a))
    run.at = Progress(1, 0.0)
    with pytest.raises(StorageError, match="not saved"):
        run.save()
    assert [p.name for p in run.folder.checkpoints.iterdir()] == ["step_00000000.safetensors"]
    assert run.folder.checkpoint_of(0).read_bytes() == before


def test_a_gradient_that_is_not_finite_counts_as_zero(monkeypatch) -> None:
    trainers = [Trainer(tiny(), KERNELS, ALONE) for _ in range(2)]
    gradients = Trainer.gradients
    for trainer, value in zip(trainers, (math.nan, 0.0), strict=True):
        trainer.masters.publish(True)
        trainer.step(batch_of(trainer.config), Progress(0, 0.0))

        def replaced(self, *arguments, value=value):
            losses = gradients(self, *arguments)
            self.masters.flat_gradient[5 if math.isnan(value) else slice(None)] = value
            return losses

        monkeypatch.setattr(Trainer, "gradients", replaced)
        trainer.step(batch_of(trainer.config, 1), Progress(1, 0.0))
        monkeypatch.undo()
        trainer.step(batch_of(trainer.config, 2), Progress(2, 0.0))
    assert [int(trainer.masters.skipped) for trainer in trainers] == [1, 0]
    poisoned, zero = (trainer.masters.master for trainer in trainers)
    assert all(torch.equal(poisoned[name], zero[name]) for name in zero)
    step, _, x_BT, _ = trainers[0].skipped_batch or (None,) * 4
    assert step is not None
    assert int(step) == 1
    assert torch.equal(x_BT, batch_of(trainers[0].config, 1).x_BT)


@pytest.mark.parametrize("damage", [b"", b"[" * 100_000, b"{}", b'{"config": 3}', b"\xff\xfe"])
def test_a_damaged_record_of_the_configuration_is_named(byte_data: Path, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Run(parse_command(flags(data_path=byte_data, runs_dir=tmp_path, run_id="run"), {}), ALONE)


def test_a_resumed_log_holds_what_the_checkpoint_knew(byte_data: Path, tmp_path: Path) -> None:
    run = Run(parse_command(flags(data_path=byte_data, runs_dir=tmp_path, run_id="run"), {}), ALONE)
    run.folder.event(event="step", step=1)
    run.at = Progress(1, 0.0)
    run.save()
    run.folder.event(event="diagnostics", step=1)  # of an end that did not come
    with open(run.folder.path / "log.jsonl", "ab") as file:
        file.write(b'{"event": "st')
    again = Run(parse_command(flags(data_path=byte_data, runs_dir=tmp_path, run_id="run"), {}), ALONE)
    assert again.at.step == 1
    assert (run.folder.path / "log.jsonl").read_text() == '{"event": "step", "step": 1}\n'
    assert not list(run.folder.path.rglob("*.tmp"))


@pytest.mark.slow
def test_killed_run_on_free_steps_resumes_bitwise(byte_data: Path, tmp_path: Path) -> None:
    options = {
        **EVERYTHING, "iterations": 24, "checkpoint_every": 3, "ema_start_fraction": 0.2, "data_path": byte_data,
        "free_steps": True, "free_qat_fraction": 0.5, "statistics_tokens": 512, "artifact_bytes": 20_000,
        "trellis": True,
    }  # fmt: skip
    run_entry(*flags(**options, runs_dir=tmp_path / "a", run_id="run"))
    arguments = flags(**options, runs_dir=tmp_path / "b", run_id="run")
    for step in (10, 18):
        process = start(*arguments)
        wait_for_step(tmp_path / "b/run", step, process)
        process.kill()
        process.communicate()
    run_entry(*arguments)
    assert losses_of(tmp_path / "a/run") == losses_of(tmp_path / "b/run")
    assert artifacts_equal(tmp_path / "a/run", tmp_path / "b/run")
    assert 19_900 <= (tmp_path / "a/run/model.artifact").stat().st_size <= 20_000


def test_another_configuration_does_not_resume(byte_data: Path, tmp_path: Path) -> None:
    process = start(*flags(data_path=byte_data, runs_dir=tmp_path, run_id="run", iterations=100000))
    wait_for_step(tmp_path / "run", 6, process)
    process.kill()
    process.communicate()
    done = run_entry(*flags(data_path=byte_data, runs_dir=tmp_path, run_id="run", matrix_lr=0.5), check=False)
    assert done.returncode == 2
    assert "matrix_lr was 0.02, is 0.5" in done.stderr


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"sigreg_mode": "pooled", "attn_layers": "2", "document_reset": True}, marks=pytest.mark.slow)],
    ids=["seed", "pooled"],
)
def test_two_ranks_train_as_one(byte_data: Path, tmp_path: Path, options: dict) -> None:
    # One micro-batch a rank: SIGReg's statistic is over a micro-batch of all ranks together.
    common = {**options, "data_path": byte_data, "temp_scaling": True, "micro_batch_tokens": 256, "qat_fraction": 0.0}
    run_entry(*flags(**common, runs_dir=tmp_path, run_id="one"))
    run_entry(*flags(**common, runs_dir=tmp_path, run_id="two"), ranks=2)
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert one.keys() == two.keys() == set(range(1, 21))
    assert max(abs(one[s] - two[s]) for s in one) <= 1e-5
    scores = [json.loads((tmp_path / name / "summary.json").read_text())["val_bpb"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)  # a weight may round to the neighbouring code


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"entry": "another"}, "not an artifact of this entry"),
        ({"model": {"model_dim": "wide"}}, "model_dim is 'wide'; expected int"),
        ({"model": {"num_layers": 10**9}}, "describes 1000000000 layers"),
        ({"model": {"model_dim": 64 * 10**6}}, "tensors do not fit"),
        ({"model": {"bigram_buckets": 100}}, "tensors do not fit"),
        ({"model": {"bigram_buckets": 2**52, "bigram_dim": 2**40}}, "no memory could hold"),
        ({"model": {"headdim": 0}}, "headdim is 0"),
        ({"model": {"seed": 3}}, "not an artifact of this entry"),
        ({"model": None}, "not an artifact of this entry"),
        ({"tokenizer": {"kind": []}}, "not an artifact of this entry"),
        ({"tokenizer": {"kind": [], "sha256": ""}}, "tokenizer is"),
        ({"temperature": 0}, "not an artifact of this entry"),
    ],
)
def test_artifacts_that_lie_about_themselves_are_refused(change: dict, says: str, tmp_path: Path) -> None:
    config = tiny()
    trainer = Trainer(config, KERNELS, ALONE)
    path = tmp_path / "model.artifact"
    export_artifact(path, trainer.masters, config, load_tokenizer("byte"), 1.0)
    _, meta = load_artifact(path)
    model = {**meta["model"], **change.pop("model", {})} if change.get("model", {}) is not None else change.pop("model")
    save_artifact(path, trainer.masters.quantized(), {**meta, "model": model, **change})
    with pytest.raises(ConfigError, match=says):
        load_model(path, "torch", ALONE)
