"""Options: where they come from, and what is refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from common.errors import ConfigError
from submissions.jepa_mamba import train_gpt
from submissions.jepa_mamba.train_gpt import Config, parse_command, read_preset

PRESETS = sorted(p.stem for p in (Path(train_gpt.__file__).parent / "presets").glob("*.py"))


def test_flag_beats_environment_beats_preset_beats_default(tmp_path: Path) -> None:
    preset = tmp_path / "mine.py"
    preset.write_text('"""Mine."""\n\nPRESET = {"num_layers": 3, "d_state": 16, "model_dim": 128}\n')
    environ = {"D_STATE": "32", "MODEL_DIM": "192", "HOME": "/root"}
    config = parse_command(["--preset", str(preset), "--model_dim", "256"], environ).config
    assert (config.num_layers, config.d_state, config.model_dim, config.d_conv) == (3, 32, 256, 4)
    assert config.run_id == "mine-seed42"


@pytest.mark.parametrize(
    ("argv", "environ", "says"),
    [
        (["--modle_dim", "3"], {}, "did you mean --model_dim"),
        (["--model_dim", "many"], {}, "give an integer"),
        (["--document_reset", "maybe"], {}, "switch"),
        (["--activation", "gelu"], {}, "relu2, leaky_relu2, swiglu"),
        (["--model_dim", "100"], {}, "headdim must divide"),
        (["--attn_layers", "10"], {}, "attn_layers are block numbers.*below num_layers"),
        (["--eval_modes", "slide"], {}, "eval_modes"),
        (["--seed", "-1"], {}, "seed is -1; it must be finite and at least 0"),
        (["--headdim", "0"], {}, "headdim is 0.*at least 1"),
        (["--train_seq_len", "0"], {}, "train_seq_len is 0.*at least 1"),
        (["--attn_layers", "two"], {}, "attn_layers are block numbers"),
        (["--matrix_lr", "nan"], {}, "matrix_lr is nan"),
        (["--eval_modes", "sliding", "--sliding_eval_stride", "2000"], {}, "may not exceed the scoring window"),
        (["--preset", "nowhere"], {}, "presets here: .*seed_bpe"),
        ([], {"MODEL_DIMS": "512"}, "looks like MODEL_DIM.*GOLF_IGNORE_ENV=MODEL_DIMS"),
        ([], {"ITERATION": "5"}, "looks like ITERATIONS"),
        ([], {"MATRIX_LR": "fast"}, "environment variable MATRIX_LR.*give a number"),
        (["--tokenizer", "byte"], {}, "vocabulary of 256"),
        (["--warmdown_by", "time", "--max_wallclock_seconds", "0"], {}, "needs max_wallclock_seconds"),
    ],
)
def test_refusals_teach(argv: list[str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_command(argv, environ)


def test_near_miss_can_be_declared_foreign() -> None:
    assert (
        parse_command([], {"MODEL_DIMS": "512", "GOLF_IGNORE_ENV": "MODEL_DIMS"}).config == parse_command([], {}).config
    )


def test_ordinary_environments_are_not_near_misses() -> None:
    ordinary = [
        "PATH",
        "HOME",
        "SHELL",
        "LANG",
        "LC_ALL",
        "PWD",
        "OLDPWD",
        "USER",
        "LOGNAME",
        "TERM",
        "HOSTNAME",
        "DISPLAY",
        "EDITOR",
        "PAGER",
        "PYTHONPATH",
        "VIRTUAL_ENV",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "CUDA_VISIBLE_DEVICES",
        "CUDA_HOME",
        "NCCL_DEBUG",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "GROUP_RANK",
        "LOCAL_WORLD_SIZE",
        "ROLE_RANK",
        "TORCHELASTIC_RUN_ID",
        "TOKENIZERS_PARALLELISM",
        "HF_HOME",
        "CI",
        "TMPDIR",
        "SLURM_JOB_ID",
        "XDG_RUNTIME_DIR",
        "SSH_CONNECTION",
        "LD_LIBRARY_PATH",
        "CC",
        "CXX",
        "CFLAGS",
        "MAKEFLAGS",
        "MAKELEVEL",
        "GOLF_GOLDEN",
    ]
    assert parse_command([], dict.fromkeys(ordinary, "x")).config.model_dim == Config().model_dim


@pytest.mark.parametrize(
    "content", ["PRESET = {'model_dimm': 3}", "import os\nPRESET = os.environ", "x = 1", "PRESET = {"]
)
def test_bad_presets_are_refused_and_never_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.py"):
        read_preset(str(tmp_path / "bad.py"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_say_what_they_cost(name: str) -> None:
    parse_command(["--preset", name], {})
    text = (Path(train_gpt.__file__).parent / "presets" / f"{name}.py").read_text()
    assert all(word in text for word in ("Command:", "Cost:", "Expected:"))


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_command(["--help"], {})
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(Config):
        assert f"--{f.name} " in text
        assert " ".join(f.metadata["doc"].split()[:3]) in text


def test_defaults_are_the_published_run() -> None:
    published = read_preset("seed_bpe")
    differing = {k for k, v in published.items() if getattr(Config(), k) != v}
    assert differing <= {"val_loss_every", "eval_modes"}


@pytest.mark.parametrize("flag", ["--device", "--tokens=many", "-hx", "--overwrite=1"])
def test_flags_that_argparse_would_refuse_with_its_usage_are_named(flag: str, capsys) -> None:
    with pytest.raises(ConfigError, match="--help lists all"):
        parse_command([flag], {})
    assert capsys.readouterr() == ("", "")
