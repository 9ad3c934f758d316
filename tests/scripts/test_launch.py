"""scripts/launch: the files are what their tools accept, and what they start is the entry with options that it knows.

Tools that are not installed skip their test by name. `make launch-check` installs SkyPilot and the Kubernetes schemas;
Slurm's dry run needs Debian's slurmctld and slurm-client, JobSet's check the CRD file of its release (JOBSET_CRD=FILE).
"""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from containers.entrypoint import command_line

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "scripts" / "launch"
SLURM = LAUNCH / "slurm" / "train.sbatch"
SKYPILOT = LAUNCH / "skypilot" / "train.yaml"
KUBERNETES = LAUNCH / "kubernetes" / "train.yaml"
WORLD_SLURM = LAUNCH / "slurm" / "worldmodel.sbatch"
WORLD_SKYPILOT = LAUNCH / "skypilot" / "worldmodel.yaml"
ENTRY = "submissions/jepa_mamba/train_gpt.py"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def job_of(jobset: dict[str, Any]) -> dict[str, Any]:
    """The replicated job of a JobSet as a Job of its own."""
    [replicated] = jobset["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, "spec": replicated["template"]["spec"]}


def test_options_of_the_launch_files_are_known():
    train_gpt = pytest.importorskip("submissions.jepa_mamba.train_gpt", exc_type=ImportError)
    container = job_of(read(KUBERNETES))["spec"]["template"]["spec"]["containers"][0]
    assert container["args"][0] == "torchrun"
    line = command_line("torchrun", container["args"][1:], ROOT, "PY", frozenset({"torch"}))
    config = train_gpt.parse_command(line[line.index(str(ROOT / ENTRY)) + 1 :], {}).config
    assert (config.data_path, config.runs_dir) == ("/data", "/out")
    # What a launcher puts into the environment must not look like a mistyped option of the entry.
    names = [*read(SKYPILOT)["envs"], *(variable["name"] for variable in container["env"])]
    names += re.findall(r"\b(?:SLURM|SKYPILOT)_\w+", SLURM.read_text("utf-8") + SKYPILOT.read_text("utf-8"))
    assert train_gpt.environment_options(dict.fromkeys([*names, "MASTER_PORT", "PYTHON"], "x")) == {}
    words = (
        read(SKYPILOT)["run"].split(ENTRY)[1].replace('"$PRESET_NAME"', read(SKYPILOT)["envs"]["PRESET_NAME"]).split()
    )
    assert train_gpt.parse_command(words, {}).config.data_path == "/data"
    # Two nodes of eight: a step's windows divide among them.
    assert config.train_batch_tokens // config.train_seq_len % 16 == 0


def test_the_world_models_files_start_its_processes():
    pytest.importorskip("jax")
    from worldmodel.train.processes import members

    # Slurm: a process a GPU, named as srun names them.
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", WORLD_SLURM.read_text("utf-8"), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    count = int(asked["nodes"]) * int(asked["ntasks-per-node"])
    assert f"--mesh.data {count}" in WORLD_SLURM.read_text("utf-8")
    slurm = {"SLURM_NTASKS": str(count), "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "node[1-2]"}
    assert members(slurm) == (None, count, 3)
    # SkyPilot: a process a node; `python` here tells what the script started and with which variables.
    run = read(WORLD_SKYPILOT)["run"].replace(".venv/bin/python", "tell")
    tell = 'tell() { echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID $*"; }\n'
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    envs = {name: value or "" for name, value in read(WORLD_SKYPILOT)["envs"].items()}
    done = subprocess.run(
        ["bash", "-euc", tell + run.replace("exec ", "")], env=envs | nodes | {"SKYPILOT_NUM_GPUS_PER_NODE": "8"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    address, processes, index, *line = done.stdout.split()
    named = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": processes, "JAX_PROCESS_ID": index}
    assert members(named) == ("10.0.0.1:8476", 2, 1)
    assert line[:4] == ["-m", "worldmodel", "train", "gpu-tokenizer"]
    assert line[line.index("--mesh.data") + 1] == "16"
    assert line[line.index("--run-dir") + 1] == "runs/worldmodel"


def test_pods_run_closed():
    pod = job_of(read(KUBERNETES))["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts == {"/data": True, "/out": False, "/tmp": False, "/dev/shm": False}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_nodes_and_processes_agree():
    jobset = read(KUBERNETES)
    job = job_of(jobset)["spec"]
    container = job["template"]["spec"]["containers"][0]
    nodes = int(next(word for word in container["args"] if word.startswith("--nnodes")).split("=")[1])
    processes = int(next(word for word in container["args"] if word.startswith("--nproc_per_node")).split("=")[1])
    assert nodes == job["parallelism"] == job["completions"]
    assert processes == container["resources"]["limits"]["nvidia.com/gpu"]
    name, replicated = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"][0]["name"]
    assert f"--master_addr={name}-{replicated}-0-0.{name}" in container["args"]
    assert "--master_port=29500" in container["args"]
    assert {"containerPort": 29500} in container["ports"]


def test_kubernetes_accepts_the_job():
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    job = job_of(read(KUBERNETES))
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


def closed(schema: Any) -> Any:
    """A structural schema in which unknown fields are errors, as `kubectl --validate=strict` has them."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    open_ended = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if isinstance(made.get("properties"), dict) and made.get("type") == "object" and not open_ended:
        made["additionalProperties"] = False
    return made


def test_jobset_accepts_the_file():
    path = os.environ.get("JOBSET_CRD")
    if not path:
        pytest.skip("JOBSET_CRD does not name JobSet's CRD file (config/components/crd/bases of its repository)")
    jsonschema = pytest.importorskip("jsonschema")
    jobset = read(KUBERNETES)
    [version] = [v for v in read(Path(path))["spec"]["versions"] if jobset["apiVersion"].endswith("/" + v["name"])]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own, not in the CRD
    template = schema["properties"]["spec"]["properties"]["replicatedJobs"]["items"]["properties"]["template"]
    for part in (template, template["properties"]["spec"]["properties"]["template"]):
        part["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(jobset, schema)
    jobset["spec"]["replicatedJob"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, schema)


@pytest.mark.parametrize("path", [SKYPILOT, WORLD_SKYPILOT], ids=["lm", "worldmodel"])
def test_skypilot_accepts_the_task(path):
    pytest.importorskip("sky")
    from sky import exceptions
    from sky.utils import common_utils, schemas

    task = read(path)
    task["envs"]["DATA_URL"] = "s3://bucket/fineweb-sp8192"
    common_utils.validate_schema(task, schemas.get_task_schema(), "")
    common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "")
    with pytest.raises((ValueError, exceptions.InvalidSkyPilotConfigError)):
        common_utils.validate_schema(task | {"num_node": 2}, schemas.get_task_schema(), "")


def test_bash_accepts_the_scripts(tmp_path):
    tasks = [text for path in (SKYPILOT, WORLD_SKYPILOT) for text in (read(path)["setup"], read(path)["run"])]
    for text in (SLURM.read_text("utf-8"), WORLD_SLURM.read_text("utf-8"), *tasks):
        script = tmp_path / "script"
        script.write_text(text, encoding="utf-8")
        assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


# Two nodes of eight GPUs that exist on paper: the controller plans for nodes that it could start.
SLURM_CONF = """
ClusterName=paper
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=600
NodeName=node[1-2] NodeAddr=127.0.0.1 CPUs=64 RealMemory=500000 Gres=gpu:8 State=CLOUD
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


@pytest.fixture
def slurm_environment(tmp_path: Path):
    """A Slurm controller of our own on a free port, planning for two nodes that do not exist."""
    if shutil.which("slurmctld") is None or shutil.which("sbatch") is None:
        pytest.skip("Slurm is not installed (Debian: slurmctld, slurm-client)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "state").mkdir()
    for index in range(8):
        (tmp_path / f"gpu{index}").touch()
    conf = tmp_path / "slurm.conf"
    conf.write_text(SLURM_CONF.format(port=port, user=getpass.getuser(), folder=tmp_path), encoding="utf-8")
    (tmp_path / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={tmp_path}/gpu[0-7]\n", encoding="utf-8")
    environment = os.environ | {"SLURM_CONF": str(conf)}
    log = tmp_path / "slurmctld.log"
    with log.open("wb") as file:
        controller = subprocess.Popen(["slurmctld", "-D"], env=environment, stdout=file, stderr=file)
    try:
        for _ in range(120):
            if subprocess.run(["sinfo"], env=environment, capture_output=True, check=False).returncode == 0:
                break
            assert controller.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.5)
        yield environment
    finally:
        controller.terminate()
        controller.wait()


@pytest.mark.parametrize(
    ("script", "more"),
    [(SLURM, ["--preset", "seed_bpe"]), (WORLD_SLURM, ["gpu-tokenizer", "--mesh.data", "16"])],
    ids=["lm", "worldmodel"],
)
def test_slurm_accepts_the_job(slurm_environment, script, more):
    """Slurm's own dry run: the job could start on the two nodes, and what it could not run is refused."""

    def dry_run(*asked: str) -> subprocess.CompletedProcess[str]:
        line = ["sbatch", "--test-only", *asked, str(script), *more]
        return subprocess.run(line, cwd=ROOT, env=slurm_environment, capture_output=True, text=True, check=False)

    done = dry_run()
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr
    assert "on nodes node[1-2]" in done.stderr
    assert "not available" in dry_run("--gpus-per-node=9").stderr
    assert "unrecognized option" in dry_run("--no-such=1").stderr


FAKES = {
    "scontrol": '#!/bin/bash\n[[ "$*" == "show hostnames node[1-2]" ]] && printf "localhost\\nnode2\\n"\n',
    "srun": '#!/bin/bash\nshift\nexec "$@"\n',
}


@pytest.mark.slow
def test_slurm_job_trains(tmp_path):
    """The batch script itself with stand-ins for srun and scontrol: torchrun, two processes, a tiny run to its end."""
    pytest.importorskip("torch")
    from tests.containers.conftest import write_byte_shards
    from tests.submissions.jepa_mamba.conftest import flags

    for name, text in FAKES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    data = write_byte_shards(tmp_path / "data")
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": "7",
    }
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    where = [f"--data_path={data}", f"--runs_dir={tmp_path}", "--run_id=run"]
    line = ["bash", str(SLURM), *flags(iterations=3), *where]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | slurm | own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
