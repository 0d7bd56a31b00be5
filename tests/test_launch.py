"""Jobs for clusters: each template is filled in, read by the rules of its system, and the shell ones are run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import jsonschema
import pytest
import yaml

from videogen.errors import InvalidRequest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
CONFIG = "configs/train/tiny_dit.yaml"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{name}", LAUNCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = script("render")


def filled(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert render.main([*argv]) == 0
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


MINE = {
    "slurm.sbatch": ["--time", "2-00:00:00"],
    "torchrun.sh": ["--master", "node-1"],
    "kubernetes.yaml": ["--image", "registry.example/videogen:1", "--claim", "runs"],
}


@pytest.mark.parametrize("template", MINE, ids=str)
def test_nothing_is_left_open_and_every_name_is_known(template: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(MINE) == sorted(render.TEMPLATES)
    text = filled(capsys, template, CONFIG, "fit.steps=10", *MINE[template], "--nodes", "3", "--gpus", "4")
    assert "{{" not in text
    assert "}}" not in text
    assert CONFIG in text
    assert "fit.steps=10" in text
    if template != "kubernetes.yaml":
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


# ---- Slurm ----------------------------------------------------------------------------------------------------------

# Of sbatch's manual page: the options used here and what they may be.
SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"([a-z][\w.]*:)?\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d{1,2}(:\d\d){0,2}|\d+",
    "signal": r"([BR]:)?(\d+|[A-Z]+\d?)(@\d+)?",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"\S+",
}


def test_the_batch_file_follows_sbatch(capsys: pytest.CaptureFixture[str]) -> None:
    text = filled(capsys, "slurm.sbatch", CONFIG, "--nodes", "3", "--gpus", "4", *MINE["slurm.sbatch"])
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(line) < first_command for line in directives)  # sbatch reads no further
    found = {}
    for line in directives:
        option = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
        assert option, line
        name, value = option.groups()
        assert name in SBATCH, name
        assert re.fullmatch(SBATCH[name], value) if SBATCH[name] else value is None, line
        found[name] = value
    assert (found["nodes"], found["ntasks-per-node"], found["gpus-per-node"]) == ("3", "4", "4")
    assert found["signal"] == "USR1@300"
    assert "requeue" in found


FAKES = {
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\n"; else echo "$@" >> told; fi',
    # Two tasks, as srun would start them; the highest exit code is its own.
    "srun": """shift; worst=0
for id in 0 1; do SLURM_PROCID=$id SLURM_LOCALID=$id SLURM_NTASKS=2 "$@"; c=$?; [ $c -gt $worst ] && worst=$c; done
exit $worst""",
    "python": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $OMP_NUM_THREADS $*" >> ran; exit $CODE',
    "torchrun": 'printf "%s\\n" "$@" > ran; echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > timeout',
}


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with Slurm's programs, which write down what they are told."""
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submit(text: str, cluster: Path, **environment: str) -> int:
    path = f"{cluster}:{os.environ['PATH']}"
    environment |= {"PATH": path, "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n[1-2]"}
    return subprocess.run(["bash", "-c", text], cwd=cluster, env=environment, check=False, timeout=60).returncode


@pytest.mark.parametrize(
    ("code", "marked", "again"), [(0, False, False), (85, False, True), (1, False, False), (137, True, True)]
)
def test_the_job_queues_itself_again_when_it_was_told_to_stop(
    code: int, marked: bool, again: bool, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = "runs/it's here"
    text = filled(capsys, "slurm.sbatch", CONFIG, f"folder={folder}", "--gpus", "2", "--cpus", "3")
    if marked:  # another task's code was higher, but the state was saved
        (cluster / folder).mkdir(parents=True)
        (cluster / folder / "requeue").touch()
    assert submit(text, cluster, CODE=str(code)) == code
    told = (cluster / "told").read_text() if (cluster / "told").exists() else ""
    assert told == ("requeue 123\n" if again else "")
    command = f"scripts/train.py {CONFIG} folder={folder}"
    assert (cluster / "ran").read_text().splitlines() == [f"{i}/2 {i} n1:20123 3 {command}" for i in (0, 1)]


def test_torchrun_is_told_nodes_meeting_place_and_time_to_save(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = filled(capsys, "torchrun.sh", CONFIG, "--nodes", "2", "--gpus", "4", "--master", "n1", "--grace", "60")
    assert submit(text, cluster) == 0
    assert (cluster / "timeout").read_text() == "60\n"
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args((cluster / "ran").read_text().splitlines())  # torchrun's own
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2", "4", 3)
    assert (args.rdzv_backend, args.rdzv_endpoint, args.rdzv_id) == ("c10d", "n1:29500", "tiny-dit")
    assert [args.training_script, *args.training_script_args] == ["scripts/train.py", CONFIG]


# ---- Kubernetes -----------------------------------------------------------------------------------------------------


def thing(required: str = "", **properties) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def many(items: dict) -> dict:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 1}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
LABELS = {"type": "object", "additionalProperties": TEXT}
ENV = many(thing("name value", name=TEXT, value={"type": "string"}))
AMOUNT = {"type": "object", "additionalProperties": {"type": ["string", "integer"]}}
POD = thing(
    "containers",
    restartPolicy={"enum": ["Never", "OnFailure"]},  # what a Job allows
    terminationGracePeriodSeconds=COUNT,
    containers=many(
        thing(
            "name image", name=NAME, image=TEXT, volumeMounts=many(thing("name mountPath", name=NAME, mountPath=TEXT))
        )
    ),
    volumes=many(
        thing(
            "name",
            name=NAME,
            persistentVolumeClaim=thing("claimName", claimName=TEXT),
            emptyDir=thing(medium={"enum": ["", "Memory"]}),
        )
    ),
)
JOBSET = thing(
    "replicatedJobs",
    failurePolicy=thing(maxRestarts=COUNT),
    replicatedJobs=many(
        thing(
            "name template",
            name={"const": "node"},
            template=thing(
                "metadata spec",
                metadata=thing(labels=LABELS),
                spec=thing("template", backoffLimit={"type": "integer"}, template=thing("spec", spec=POD)),
            ),
        )
    ),
)
# The fields used here, as the operator's resource definitions of August 2026 have them (trainer.kubeflow.org/v1alpha1).
SCHEMAS = {
    "TrainingRuntime": thing(
        "template", mlPolicy=thing(numNodes=COUNT, torch=thing()), template=thing("spec", spec=JOBSET)
    ),
    "TrainJob": thing(
        "runtimeRef",
        runtimeRef=thing("name", apiGroup={"const": "trainer.kubeflow.org"}, kind=TEXT, name=NAME),
        trainer=thing(
            image=TEXT,
            command=many(TEXT),
            args=many(TEXT),
            env=ENV,
            numNodes=COUNT,
            numProcPerNode=COUNT,
            resourcesPerNode=thing(requests=AMOUNT, limits=AMOUNT),
        ),
    ),
}


def test_the_resources_follow_the_operator(capsys: pytest.CaptureFixture[str]) -> None:
    awkward = ['name="a # test"']
    argv = ["kubernetes.yaml", CONFIG, *awkward, *MINE["kubernetes.yaml"], "--nodes", "3", "--gpus", "4"]
    runtime, job = yaml.safe_load_all(filled(capsys, *argv))
    for resource in (runtime, job):
        assert resource["apiVersion"] == "trainer.kubeflow.org/v1alpha1"
        assert set(resource) == {"apiVersion", "kind", "metadata", "spec"}
        jsonschema.validate(resource["spec"], SCHEMAS[resource["kind"]])
        jsonschema.validate(resource["metadata"], thing("name", name=NAME, labels=LABELS))
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    trainer = job["spec"]["trainer"]
    assert trainer["args"] == ["scripts/train.py", CONFIG, *awkward]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 4)
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == 4
    replicated = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]
    # What makes the operator put the trainer's image and command into this job's container.
    assert replicated["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    pod = replicated["template"]["spec"]["template"]["spec"]
    mounts = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    shutdown = next(e["value"] for e in trainer["env"] if e["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert pod["terminationGracePeriodSeconds"] > int(shutdown)  # torchrun waits for the states before the pod ends


# ---- Ray ------------------------------------------------------------------------------------------------------------


def test_ray_starts_the_same_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: dict = {}

    class Trainer:
        def __init__(self, loop, **settings) -> None:
            made.update(settings, loop=loop)

        def fit(self) -> None:
            made["loop"](made["train_loop_config"])

    train = types.ModuleType("ray.train")
    for name in ("FailureConfig", "RunConfig", "ScalingConfig"):
        setattr(train, name, dict)
    torch = types.ModuleType("ray.train.torch")
    torch.TorchTrainer = Trainer  # type: ignore[attr-defined]
    for name, module in (("ray", types.ModuleType("ray")), ("ray.train", train), ("ray.train.torch", torch)):
        monkeypatch.setitem(sys.modules, name, module)
    ran = []
    monkeypatch.setattr("videogen.training.run.main", lambda config, overrides: ran.append((config, overrides)))
    script("ray_train").main([CONFIG, "--workers", "16", "fit.steps=3"])
    assert ran == [(str(ROOT / CONFIG), ["fit.steps=3"])]
    assert made["scaling_config"] == {"num_workers": 16, "use_gpu": True}
    assert made["run_config"]["failure_config"] == {"max_failures": 3}
    with pytest.raises(InvalidRequest):
        script("ray_train").main([CONFIG, "--workers", "16", "fit.stpes=3"])


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["slurm.sbatch", CONFIG, "fit.stpes=3"], "stpes"),
        (["slurm.sbatch", CONFIG, "--name", "My Run"], "cannot be called"),
        (["slurm.sbatch", CONFIG, "--time", "soon"], "is no time"),
        (["slurm.sbatch", CONFIG, "--nodes", "0"], "1 or more"),
        (["torchrun.sh", CONFIG], "needs --master"),
        (["kubernetes.yaml", CONFIG, "--image", "a"], "needs --claim"),
        (["kubernetes.yaml", CONFIG, *MINE["kubernetes.yaml"], "folder=/tmp/x"], "mounted as runs/"),
    ],
)
def test_a_job_that_cannot_start_is_not_made(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert render.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err


def test_words_of_a_setting_stay_together(capsys: pytest.CaptureFixture[str]) -> None:
    text = filled(capsys, "torchrun.sh", CONFIG, "name=two words; rm -rf /", *MINE["torchrun.sh"])
    last = shlex.split(text.partition("exec ")[2].replace("\\\n", " "))
    assert last[-1] == "name=two words; rm -rf /"
    assert json.loads(json.dumps(last))[-2] == CONFIG
