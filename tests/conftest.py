"""jaxtyping shapes are checked by beartype in the whole suite; one thread, so that runs repeat bit for bit."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from jaxtyping import install_import_hook

hook = install_import_hook("videogen", "beartype.beartype")
