"""The one loop: learning, exact resume, refusal of foreign runs, devices, frozen parts, co-trained action codes."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from common.errors import CheckpointError, ConfigError
from tests.worldmodel.small import DYNAMICS, LAM, OPTIM, TOKENIZER, MemorySource, game_clips, train_config
from worldmodel.config import MeshConfig
from worldmodel.train.checkpoint import Checkpoints
from worldmodel.train.loop import initial_state, make_objective, make_step, train
from worldmodel.train.objectives import DynamicsObjective
from worldmodel.train.restore import load_dynamics, load_tokenizer
from worldmodel.train.state import Functional, make_mesh, state_shardings, values_of


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("tokenizer") / "run")
    config = train_config("tokenizer", path)
    train(config, source=MemorySource(config))
    return path


def fit(config, **options):
    return train(config, source=MemorySource(config), **options)


def saved_state(run_dir: str) -> dict[str, np.ndarray]:
    checkpoints = Checkpoints(run_dir, keep=1, read_only=True)
    assert checkpoints.latest is not None
    state = checkpoints._read(checkpoints.latest, "state", ocp.args.StandardRestore())
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    assert len(a) > 10
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class Crash(Exception):
    """Stands for a kill that nothing can catch in time."""


@pytest.mark.parametrize("stage", [pytest.param("tokenizer", marks=pytest.mark.slow), "dynamics"])
def test_n_steps_equal_half_killed_and_resumed_bitwise(stage, tmp_path, tokenizer_run):
    changes = {"tokenizer_run": tokenizer_run} if stage == "dynamics" else {}
    optim = dataclasses.replace(OPTIM, ema=0.9)
    configs = {
        name: train_config(stage, str(tmp_path / name), optim=optim, **changes) for name in ("whole", "signal", "crash")
    }
    fit(configs["whole"])

    def terminate(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def crash(step: int) -> None:
        if step == 7:
            raise Crash

    stopped = fit(configs["signal"], on_step=terminate)
    assert (stopped["status"], stopped["steps"]) == ("stopped", 3)
    assert fit(configs["signal"])["status"] == "finished"
    with pytest.raises(Crash):
        fit(configs["crash"], on_step=crash)  # the checkpoint of step 4 is the last one
    assert fit(configs["crash"])["seconds_from_step"] == 4
    whole = saved_state(configs["whole"].run_dir)
    assert_same(whole, saved_state(configs["signal"].run_dir))
    assert_same(whole, saved_state(configs["crash"].run_dir))
    losses = [
        [(e["step"], e["loss"]) for e in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())]
        for name in configs
    ]
    assert losses[0] == losses[2]
    assert [step for step, _ in losses[0]] == [2, 4, 6, 8]


@pytest.mark.slow  # the fault campaign in miniature compares runs bit for bit all the time
def test_two_equal_runs_are_bitwise_equal_and_another_seed_is_not(tmp_path):
    runs = [train_config("lam", str(tmp_path / name), seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    for config in runs:
        fit(config)
    a, b, c = (saved_state(config.run_dir) for config in runs)
    assert_same(a, b)
    assert any((a[name] != c[name]).any() for name in a)


def test_a_finished_run_is_left_alone_and_another_configuration_refused(tmp_path):
    config = train_config("tokenizer", str(tmp_path / "run"))
    first = fit(config)
    assert fit(config, on_step=lambda step: pytest.fail("trained again")) == first
    with pytest.raises(CheckpointError, match=r"seed: saved 0, now 1.*--overwrite"):
        fit(dataclasses.replace(config, seed=1))
    assert fit(dataclasses.replace(config, log_every=4)) == first
    assert fit(dataclasses.replace(config, seed=1), overwrite=True)["status"] == "finished"


def test_old_checkpoints_go_and_milestones_stay(tmp_path):
    config = train_config("tokenizer", str(tmp_path / "run"), checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    fit(config)
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {3, 6, 7, 8}


def test_a_folder_that_is_no_run_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not a run folder"):
        fit(train_config("tokenizer", str(tmp_path)), overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    config = train_config("tokenizer", str(tmp_path / "run"), steps=8)

    def crash(step: int) -> None:
        if step == 6:
            raise Crash

    with pytest.raises(Crash):
        fit(config, on_step=crash)
    state = tmp_path / "run" / "checkpoints" / "4" / "state"
    for path in state.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoints/4"):
        fit(config)


def test_train_log_opens_with_our_source(tmp_path):
    fit(train_config("tokenizer", str(tmp_path / "run")))
    text = (tmp_path / "run" / "train.log").read_text()
    source = Path(train.__code__.co_filename).read_text().rstrip()
    assert source in text
    assert text.index("# hardware") < text.index(source) < text.index("\nstep 8 loss ")
    assert "jax==" in text


@pytest.mark.parametrize("mesh", [pytest.param(MeshConfig(data=8), marks=pytest.mark.slow), MeshConfig(data=2, fsdp=4)])
def test_eight_devices_give_the_loss_of_one_and_their_checkpoint_fits_one(mesh, tmp_path, tokenizer_run, monkeypatch):
    monkeypatch.setattr("worldmodel.train.state.FSDP_MIN_VALUES", 16)  # split even these tiny arrays
    one = train_config("dynamics", str(tmp_path / "one"), tokenizer_run=tokenizer_run)
    many = dataclasses.replace(one, run_dir=str(tmp_path / "many"), mesh=mesh)
    fit(one)

    def crash(step: int) -> None:
        if step == 7:
            raise Crash

    with pytest.raises(Crash):
        fit(many, on_step=crash)
    entries = [
        {e["step"]: e["loss"] for e in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())}
        for name in ("one", "many")
    ]
    for step in (2, 4, 6):
        assert entries[1][step] == pytest.approx(entries[0][step], rel=2e-4)
    for tree in values_of(load_dynamics(many.run_dir, 3)[1]):
        assert {len(x.devices()) for x in jax.tree.leaves(tree)} <= {1}
    on_one = dataclasses.replace(many, mesh=MeshConfig())
    assert fit(on_one)["seconds_from_step"] == 4
    resumed = {
        e["step"]: e["loss"] for e in map(json.loads, (tmp_path / "many" / "log.jsonl").read_text().splitlines())
    }
    assert resumed[8] == pytest.approx(entries[0][8], rel=1e-3)


def test_arrays_are_split_over_fsdp_where_they_can_be():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    state = {"big": np.zeros((130, 256)), "odd": np.zeros((129, 257)), "small": np.zeros((4,))}
    shardings = state_shardings(state, mesh)
    assert shardings["big"].spec == PartitionSpec(None, "fsdp")
    assert shardings["odd"].is_fully_replicated
    assert shardings["small"].is_fully_replicated
    with pytest.raises(ConfigError, match="needs 64 devices"):
        make_mesh(MeshConfig(data=64))


def test_frozen_parts_have_no_optimizer_state_and_do_not_move(tmp_path, tokenizer_run):
    config = train_config("dynamics", str(tmp_path / "run"), tokenizer_run=tokenizer_run)
    before = saved_state(tokenizer_run)
    summary = fit(config)
    state = saved_state(config.run_dir)
    assert not any("tokenizer" in name or "quantizer" in name for name in state)
    trained = sum(v.size for n, v in state.items() if n.startswith("params/"))
    assert summary["parameters"] == trained
    assert summary["optimizer_values"] <= 2 * trained + 8
    assert_same(before, saved_state(tokenizer_run))


def one_step(config, tokenizer_run, clips):
    objective = DynamicsObjective(config, load_tokenizer(tokenizer_run), num_actions=3)
    functional, state = initial_state(config, objective, clips)
    return objective, functional, state


def test_co_trained_action_codes_get_their_own_gradient(tmp_path, tokenizer_run):
    clips = game_clips(8, 4, seed=3)
    grads = {}
    for weight in (0.0, 1.0):
        dynamics = dataclasses.replace(DYNAMICS, action_source="latent", vq_weight=weight)
        config = train_config("dynamics", str(tmp_path), dynamics=dynamics, tokenizer_run=tokenizer_run)
        objective, functional, state = one_step(config, tokenizer_run, clips)

        def loss(params, functional=functional, state=state, objective=objective):
            model = functional.merge(params, state["stats"])
            return objective.loss(model, objective.frozen, clips, jax.random.key(0))[0]

        grads[weight] = jax.jit(jax.grad(loss))(state["params"])["lam"]
    assert not grads[0.0]["quantizer"]["codebook"].any()  # the published fault: codes that never learn
    assert float(np.abs(grads[1.0]["quantizer"]["codebook"]).max()) > 1e-6
    assert float(np.abs(grads[1.0]["latent_out"]["kernel"]).max()) > 1e-6


def test_co_training_resets_dead_action_codes(tmp_path, tokenizer_run):
    dynamics = dataclasses.replace(DYNAMICS, action_source="latent")
    lam = dataclasses.replace(LAM, quantizer=dataclasses.replace(LAM.quantizer, kmeans_init=False))
    config = train_config("dynamics", str(tmp_path / "run"), dynamics=dynamics, lam=lam, tokenizer_run=tokenizer_run)
    objective, functional, state = one_step(config, tokenizer_run, game_clips(8, 4, seed=3))
    far = np.zeros((6, 4), np.float32)
    far[:, 0] = 1.0
    state["params"]["lam"]["quantizer"]["codebook"] = jax.numpy.asarray(far)  # six equal codes: five are never chosen
    mesh = make_mesh(config.mesh)
    step = make_step(config, objective, functional, mesh, state)
    for index in range(2 * LAM.quantizer.dead_after_steps):
        batch = {k: jax.numpy.asarray(v) for k, v in game_clips(8, 4, seed=index).items()}
        state, _ = step(state, objective.frozen, batch)
    quantizer = state["params"]["lam"]["quantizer"], state["stats"]["lam"]["quantizer"]
    codebook = np.asarray(quantizer[0]["codebook"])
    assert (np.abs(codebook - far).max(axis=1) > 1e-4).all()  # used codes moved, dead ones were replaced
    assert int(quantizer[1]["idle_V"].max()) < LAM.quantizer.dead_after_steps


def test_frozen_latent_actions_come_from_their_run_and_stay(tmp_path, tokenizer_run):
    lam_config = train_config("lam", str(tmp_path / "lam"))
    fit(lam_config)
    dynamics = dataclasses.replace(DYNAMICS, action_source="latent-frozen")
    config = train_config(
        "dynamics", str(tmp_path / "run"), dynamics=dynamics, tokenizer_run=tokenizer_run, lam_run=lam_config.run_dir
    )
    fit(config)
    lam, trained = saved_state(lam_config.run_dir), saved_state(config.run_dir)
    names = [n for n in lam if n.startswith("params/actions/")]
    assert len(names) > 5
    for name in names:
        np.testing.assert_array_equal(lam[name], trained[name.replace("params/actions/", "stats/lam/")], err_msg=name)
    assert not any("/lam/" in name and not name.startswith("stats/") for name in trained)  # no optimizer state


def test_stages_learn_the_game(tmp_path):
    optim = dataclasses.replace(OPTIM, warmup_steps=5, decay_steps=20, learning_rate=5e-3)
    tokenizer = train_config("tokenizer", str(tmp_path / "t"), optim=optim, steps=40, eval_every=40)
    assert fit(tokenizer)["metrics"]["val_psnr_db"] > 30
    changes = {"optim": optim, "steps": 150, "batch_size": 16, "eval_every": 150, "tokenizer_run": tokenizer.run_dir}
    recorded = fit(train_config("dynamics", str(tmp_path / "d"), **changes))["metrics"]
    assert recorded["val_full_mask_accuracy"] > 0.9  # the next place follows from frame and action


def test_a_run_of_another_kind_or_model_is_refused(tmp_path, tokenizer_run):
    with pytest.raises(CheckpointError, match="stage tokenizer, expected dynamics"):
        load_dynamics(tokenizer_run, 3)
    other = dataclasses.replace(TOKENIZER, encoder=dataclasses.replace(TOKENIZER.encoder, dim=32))
    with pytest.raises(CheckpointError, match="fields encoder differ"):
        load_tokenizer(tokenizer_run, expected=other)
    with pytest.raises(ConfigError, match="tokenizer_run"):
        make_objective(train_config("dynamics", str(tmp_path)), 3)


def test_functional_models_round_trip():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    _, params, _ = nnx.split(model, nnx.Param, ...)
    pure = nnx.to_pure_dict(params)
    merged = Functional(model).merge(jax.tree.map(lambda x: x + 1, pure), {})
    np.testing.assert_array_equal(merged.kernel[...], model.kernel[...] + 1)
