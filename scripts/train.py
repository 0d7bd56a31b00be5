"""Train what a file says: `python scripts/train.py CONFIG [key=value ...]`, or the same under torchrun.

torchrun --nproc-per-node 2 scripts/train.py configs/train/tiny_dit.yaml
"""

import sys

from videogen.training.run import main

if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2:]))
