"""The step: which kernels it uses and why, that it never waits for the device, and how it is captured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.cpu import compile_obstacle
from common.errors import ConfigError
from submissions.jepa_mamba import train_gpt
from submissions.jepa_mamba.train_gpt import (
    CapturedStep,
    Interruption,
    Kernels,
    Progress,
    Ranks,
    Run,
    StepBatch,
    StepPlan,
    Trainer,
    parse_command,
    select_kernels,
)
from tests.submissions.jepa_mamba.conftest import flags, losses_of, run_entry, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALONE = Ranks(0, 1, CPU)


def batch_of(config: train_gpt.Config, seed: int = 0) -> StepBatch:
    generator = torch.Generator().manual_seed(seed)
    shape = (config.train_batch_tokens // config.train_seq_len, config.train_seq_len)
    x_BT, y_BT = (torch.randint(0, config.vocab_size, shape, generator=generator) for _ in range(2))
    ids_BT = (torch.rand(shape, generator=generator) < 0.1).cumsum(1).int()
    return StepBatch(x_BT, y_BT, ids_BT, {})


def on_device(batch: StepBatch, device: torch.device) -> StepBatch:
    return StepBatch(batch.x_BT.to(device), batch.y_BT.to(device), batch.document_ids_BT.to(device), {})


# Compiled


@pytest.mark.parametrize(
    "options",
    [
        {"attn_layers": "1", "document_reset": True, "jepa_weight": 0.0, "sigreg_lambda": 0.0, "mlp_every": 1},
        {"activation": "leaky_relu2", "tie_embeddings": 3, "sigreg_form": "covariance", "logit_softcap": 0.0},
    ],
    ids=["attention", "jepa"],
)
def test_the_whole_loss_is_one_graph_of_the_same_numbers(options, monkeypatch):
    # A run before this test has tuned the process: on some processors attention then leaves the graph (common/cpu.py).
    monkeypatch.setattr("common.cpu._products_by_onednn", False)
    config = tiny(train_batch_tokens=128, **options)
    model = train_gpt.TrainingModel(config, select_kernels("torch", CPU))
    batch = batch_of(config)
    inputs = (batch.x_BT, batch.y_BT, batch.document_ids_BT, 1.0 if config.jepa_on else None, None, 1.0)
    found = []
    for loss_of in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        loss, parts = loss_of(*inputs)
        loss.backward()
        gradients = {f"d {name}": p.grad for name, p in model.named_parameters()}
        found.append({k: v.detach().clone() for k, v in (parts | gradients).items() if v is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def test_without_a_compiler_the_run_says_so_and_goes_on(byte_data: Path, tmp_path: Path):
    where = flags(data_path=byte_data, runs_dir=tmp_path, iterations=2, compile_model=True, run_id="run")
    done = run_entry(*where, CXX="no-such-compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "loss not compiled: InductorError: InvalidCxxCompiler" in done.stdout
    assert json.loads((tmp_path / "run/summary.json").read_text())["compiled"] is False


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_again(byte_data: Path, tmp_path: Path):
    if compile_obstacle(CPU):
        pytest.skip(f"no compiler here: {compile_obstacle(CPU)}")
    said = {}
    for run, compiled in (("plain", False), ("a", True), ("b", True)):
        where = flags(data_path=byte_data, runs_dir=tmp_path, compile_model=compiled, warmup_steps=1, run_id=run)
        run_entry(*where)
        said[run] = json.loads((tmp_path / run / "summary.json").read_text())
    assert [said[run]["compiled"] for run in said] == [False, True, True]
    assert said["a"]["artifact_sha256"] == said["b"]["artifact_sha256"]
    assert losses_of(tmp_path / "a") == losses_of(tmp_path / "b")
    assert said["a"]["float_val_bpb"] == pytest.approx(said["plain"]["float_val_bpb"], abs=0.02)


# Which kernels


def machine(monkeypatch: pytest.MonkeyPatch, triton_lacks: str, packages: bool) -> None:
    monkeypatch.setattr(train_gpt, "triton_obstacle", lambda device: triton_lacks)
    monkeypatch.setattr(train_gpt.importlib.util, "find_spec", lambda name: object() if packages else None)


@pytest.mark.parametrize(
    ("device", "triton_lacks", "packages", "name", "reason"),
    [
        (CUDA, "", True, "mamba_ssm", "auto: packages installed; --kernels triton has yet to be shown on a GPU"),
        (CUDA, "", False, "torch",
         "auto: mamba_ssm, causal_conv1d not installed; --kernels triton has yet to be shown on a GPU"),
        (CUDA, "triton is not installed", True, "mamba_ssm", "auto: packages installed; triton is not installed"),
        (CUDA, "x", False, "torch", "auto: mamba_ssm, causal_conv1d not installed; x"),
        (CPU, "", True, "torch", "auto: device is cpu, not cuda"),
    ],
)
def test_auto_says_what_it_chose_and_why(device, triton_lacks, packages, name, reason, monkeypatch):
    machine(monkeypatch, triton_lacks, packages)
    kernels = select_kernels("auto", device)
    assert (kernels.name, kernels.reason) == (name, reason)


@pytest.mark.parametrize("choice", ["triton", "mamba_ssm"])
def test_explicit_choice_that_cannot_be_had_is_an_error(choice, monkeypatch):
    machine(monkeypatch, "triton is not installed", packages=False)
    with pytest.raises(ConfigError, match=f"--kernels {choice}: .*not installed"):
        select_kernels(choice, CUDA)


def test_explicit_choices_are_taken_and_differ_in_every_form(monkeypatch):
    machine(monkeypatch, "", packages=True)
    chosen = {choice: select_kernels(choice, CUDA) for choice in ("triton", "mamba_ssm", "torch")}
    assert all(kernels.name == choice for choice, kernels in chosen.items())
    forms = [field for field in Kernels._fields if field not in ("name", "reason")]
    assert all(getattr(chosen["triton"], field) != getattr(chosen["torch"], field) for field in forms)


def test_log_says_which_kernels_ran(byte_data, tmp_path):
    command = parse_command(flags(data_path=byte_data, runs_dir=tmp_path, run_id="r", kernels="auto"), {})
    Run(command, ALONE)
    assert "kernels: torch (auto: device is cpu, not cuda); device cpu" in (tmp_path / "r" / "train.log").read_text()


def test_triton_and_torch_forms_take_the_same_step(kernel_device):
    config = tiny(
        num_layers=1, model_dim=16, embed_dim=16, d_state=16, train_batch_tokens=32, train_seq_len=16, sigreg_knots=3,
        jepa_steps=1, predictor_hidden_mult=1, document_reset=True, sigreg_timesteps=4, micro_batch_tokens=32,
    )  # fmt: skip
    device = torch.device(kernel_device)
    batch = on_device(batch_of(config), device)
    found = {}
    for choice in ("torch", "triton"):
        trainer = Trainer(config, select_kernels(choice, device), Ranks(0, 1, device))
        trainer.masters.publish(True)
        losses = trainer.step(batch, Progress(0, 0.0))
        found[choice] = losses, trainer.masters
    rtol, atol = (1e-4, 1e-5) if device.type == "cpu" else (2e-2, 2e-3)
    torch.testing.assert_close(found["triton"][0], found["torch"][0], rtol=rtol, atol=atol)
    if device.type == "cpu":  # in bfloat16 a code may fall to the other side
        for name, master in found["torch"][1].master.items():
            torch.testing.assert_close(found["triton"][1].master[name], master, rtol=1e-3, atol=2e-4, msg=name)


# Staying on the device


@pytest.mark.parametrize(
    "options",
    [
        {"document_reset": True, "attn_layers": "1", "ema_decay": 0.9, "ema_start_fraction": 0.0, "bigram_buckets": 64},
        {"jepa_stride": 2, "jepa_shuffle": True, "projector_type": "mlp", "tie_embeddings": 3, "dt_apart": True},
    ],
    ids=["attention", "jepa"],
)
def test_a_step_never_mixes_devices(options, monkeypatch):
    """A GPU refuses to add what lies elsewhere; so do these tensors of another device, which have no numbers."""
    away = torch.device("meta")
    config = tiny(num_layers=2, train_batch_tokens=128, **options)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)  # tensors without numbers cannot move
    with FakeTensorMode():
        with away:
            trainer = Trainer(config, select_kernels("torch", CPU), Ranks(0, 1, away))
        for optimizer in trainer.optimizers.values():
            for group in optimizer.param_groups:
                group.update(fused=False)
        batch = on_device(batch_of(config), away)
        losses = trainer.step(batch, Progress(0, 0.0))
        assert {t.device for t in (*losses.values(), *trainer.masters.ema.values())} == {away}
        x_BT, y_BT, ids_BT = batch.x_BT, batch.y_BT.cpu(), batch.document_ids_BT
        with pytest.raises(RuntimeError, match="device"):  # so the test can fail
            trainer.step(StepBatch(x_BT, y_BT, ids_BT, {}), Progress(1, 0.0))


# Waiting for the device


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: reading a value of a tensor, or a shape that depends on values."""

    OPERATORS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.unique", "aten.masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(self.OPERATORS):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{}, {"document_reset": True, "attn_layers": "1"}, {"ema_decay": 0.9, "ema_start_fraction": 0.0}],
)
def test_a_step_never_waits_for_the_device(options):
    config = tiny(**options)
    trainer = Trainer(config, select_kernels("torch", CPU), ALONE)
    with Waits() as waits:
        for step in range(2):
            losses = trainer.step(batch_of(config, step), Progress(step, 0.0))
    assert waits.found == []
    with waits:
        float(losses["loss"])
    assert waits.found == ["aten._local_scalar_dense.default"]  # so the test can fail


def test_the_loop_waits_only_where_it_logs(byte_data, tmp_path, monkeypatch):
    options = {"iterations": 5, "train_log_every": 3, "checkpoint_every": 0, "temp_scaling": False, "run_id": "r"}
    run = Run(parse_command(flags(data_path=byte_data, runs_dir=tmp_path, **options), {}), ALONE)
    logging, inside, outside = [False], [], []

    def watched(name: str, original: Callable) -> Callable:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            (inside if logging[0] else outside).append((run.at.step, name))
            return original(self, *args, **kwargs)

        return call

    def log(*args: Any) -> None:
        logging[0] = True
        Run.log(run, *args)
        logging[0] = False

    monkeypatch.setattr(run, "log", log)
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
    run.drive(Interruption())
    assert outside == [(5, "__int__")]  # behind the last step: were too many gradients not finite?
    assert {step for step, _ in inside} == {1, 3}


# Capture


class Recording:
    """Stands in for a CUDA graph on a CPU: knows the buffers it was captured on, replays the work on them."""

    def __init__(self, work: Callable, plan: StepPlan, static: list, outputs: dict) -> None:
        self.work, self.plan, self.static, self.outputs, self.replays = work, plan, static, outputs, 0

    def replay(self) -> None:
        self.replays += 1
        for name, value in self.work(self.plan, *self.static).items():
            self.outputs[name].copy_(value)


@pytest.fixture
def recorded(monkeypatch) -> None:
    """CUDA graphs by stand-in: capturing runs nothing, so what the outputs hold before a replay is garbage."""

    def record(self: CapturedStep, plan: StepPlan, static: list) -> tuple:
        names = ("jepa", "sigreg", "sigreg_excess", "ce", "z_loss", "loss", "grad_norm")
        outputs = {name: torch.full((), float("nan")) for name in names}
        return Recording(self.work, plan, static, outputs), static, outputs

    monkeypatch.setattr(CapturedStep, "record", record)


def test_captured_steps_are_the_eager_steps(recorded):
    options = {"sigreg_schedule": True, "iterations": 8, "warmdown_fraction": 0.5, "lr_warmup_steps": 3}
    eager, captured = (
        Trainer(tiny(cuda_graphs=graphs, **options), select_kernels("torch", CPU), ALONE) for graphs in (False, True)
    )
    for trainer in (eager, captured):
        trainer.masters.publish(True)
    for step in range(6):
        batch = batch_of(eager.config, seed=step)
        wanted, found = (trainer.step(batch, Progress(step, 0.0)) for trainer in (eager, captured))
        torch.testing.assert_close({k: found[k] for k in wanted}, wanted, rtol=2e-4, atol=1e-5)
    assert captured.captured is not None
    # Step 0 has no SIGReg yet; the other plan ran once eagerly and was then replayed.
    assert [graph.replays for graph, _, _ in captured.captured.graphs.values()] == [4]


def test_another_plan_is_another_graph_and_new_tensors_drop_all(recorded):
    config = tiny(cuda_graphs=True, qat_fraction=0.5, iterations=8, ema_decay=0.9, ema_start_fraction=0.75)
    trainer = Trainer(config, select_kernels("torch", CPU), ALONE)
    captured = trainer.captured
    assert captured is not None
    for step in range(8):
        trainer.step(batch_of(config, step), Progress(step, 0.0))
    plans = {(key[0].on_grid, key[0].averaging) for key in captured.graphs}
    assert plans == {(False, False), (True, False), (True, True)}
    assert trainer.masters.ema
    with trainer.rehearsal(Progress(0, 0.0)):
        pass
    assert not captured.graphs
    assert not captured.met


def test_capture_needs_a_gpu(byte_data, tmp_path):
    command = parse_command(flags(data_path=byte_data, runs_dir=tmp_path, run_id="r", cuda_graphs=True), {})
    with pytest.raises(ConfigError, match="cuda_graphs"):
        Run(command, ALONE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_steps_on_a_gpu_are_the_eager_steps():
    found = {}
    for graphs in (False, True):
        config = tiny(device="cuda", cuda_graphs=graphs)
        trainer = Trainer(config, select_kernels("auto", CUDA), Ranks(0, 1, CUDA))
        trainer.masters.publish(True)
        losses = []
        for step in range(6):
            batch = on_device(batch_of(config, step), CUDA)
            losses.append({name: float(value) for name, value in trainer.step(batch, Progress(step, 0.0)).items()})
        found[graphs] = losses
    for eager, captured in zip(found[False], found[True], strict=True):
        assert captured == pytest.approx(eager, rel=2e-2, abs=1e-3)
