"""A job for a cluster from a training's settings: what stands in {{…}} in the templates beside this file is filled in.

    python scripts/launch/render.py slurm.sbatch configs/train/cogvideox-5b.yaml --nodes 8 --gpus 8 > job.sbatch
    python scripts/launch/render.py torchrun.sh configs/train/lora-tiny.yaml --nodes 2 --gpus 4 --master node1
    python scripts/launch/render.py kubernetes.yaml configs/train/lora-tiny.yaml --image me/videogen:1 --claim runs

Settings follow as key=value. The file is read and checked, so a job that cannot start is not made. `ray_train.py` needs
no filling in.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from videogen.config import load_training
from videogen.errors import InvalidRequest, VideogenError

HERE = Path(__file__).parent
TEMPLATES = ("slurm.sbatch", "torchrun.sh", "kubernetes.yaml")
NAME = r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?"  # what all three accept


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("template", choices=TEMPLATES)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--name", help="of the job (default: the file's)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node (default: 8)")
    parser.add_argument("--cpus", type=int, default=8, help="per GPU (default: 8)")
    parser.add_argument("--time", default="24:00:00", help="Slurm: the job's limit (default: 24:00:00)")
    parser.add_argument("--grace", type=int, default=300, help="seconds for saving the state (default: 300)")
    parser.add_argument("--master", default="", help="torchrun.sh: the node where the others meet")
    parser.add_argument("--image", default="", help="Kubernetes: with this project in its working folder")
    parser.add_argument("--claim", default="", help="Kubernetes: of the shared storage for runs/")
    parser.add_argument("--workdir", default="/workspace/videogen", help="Kubernetes: that folder")
    args = parser.parse_intermixed_args(argv)
    try:
        print(render(args.template, settings_of(args)), end="")
    except VideogenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What each template may ask for. Raises InvalidRequest for what is missing or cannot work."""
    training = load_training(args.config, args.overrides)
    name = args.name or re.sub(r"[^a-z0-9-]+", "-", Path(args.config).stem.lower()).strip("-")
    if not re.fullmatch(NAME, name):
        raise InvalidRequest(f"a job cannot be called {name!r}.", why="lower case, digits and -.", hint="--name my-run")
    if min(args.nodes, args.gpus, args.cpus, args.grace) < 1:
        raise InvalidRequest("nodes, gpus, cpus and grace are 1 or more.", hint="--nodes 2 --gpus 8")
    if not re.fullmatch(r"(\d+-)?\d{1,2}:\d\d:\d\d|\d+", args.time):
        raise InvalidRequest(f"--time {args.time} is no time.", why="Slurm reads [days-]hours:minutes:seconds.")
    needed = {"torchrun.sh": ["master"], "kubernetes.yaml": ["image", "claim"]}.get(args.template, [])
    for flag in needed:
        if not getattr(args, flag):
            raise InvalidRequest(f"{args.template} needs --{flag}.", hint=f"--{flag} …, see --help", param=flag)
    if args.template == "kubernetes.yaml" and not Path(training.folder).is_relative_to("runs"):
        raise InvalidRequest(
            f"folder is {training.folder}.", why="the shared storage is mounted as runs/.", hint="folder=runs/my-run"
        )
    program = ["scripts/train.py", args.config, *args.overrides]
    return {
        "config": shlex.quote(args.config),
        "name": name,
        "nodes": str(args.nodes),
        "gpus": str(args.gpus),
        "cpus": str(args.cpus),
        "all_cpus": str(args.cpus * args.gpus),
        "time": args.time,
        "grace": str(args.grace),
        "grace_and_more": str(args.grace + 60),
        "master": shlex.quote(args.master),
        "image": json.dumps(args.image),
        "claim": json.dumps(args.claim),
        "workdir": args.workdir,
        "folder": shlex.quote(training.folder),
        "program": shlex.join(program),
        "command": shlex.join(["python", *program]),
        "arguments": json.dumps(program),
    }


def render(template: str, settings: dict[str, str]) -> str:
    """The template with every {{name}} filled in. Raises KeyError for a name that there is not."""
    text = (HERE / template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: settings[found[1]], text)


if __name__ == "__main__":
    sys.exit(main())
