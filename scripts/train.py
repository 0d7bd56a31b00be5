"""`videogen train CONFIG [key=value ...]` as a script, which torchrun can start in many processes.

torchrun --nproc-per-node 2 scripts/train.py configs/train/tiny_dit.yaml
"""

import sys

from videogen.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
