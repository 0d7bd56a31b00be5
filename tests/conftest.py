"""jaxtyping shapes are checked by beartype in the whole suite; one thread, so that runs repeat bit for bit."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from jaxtyping import install_import_hook

hook = install_import_hook("videogen", "beartype.beartype")


def pytest_collection_modifyitems(items):
    """GPU tests run where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
