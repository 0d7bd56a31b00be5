from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether the kernels for CUDA can be compiled; without Triton the general form of each runs there too."""
    return find_spec("triton") is not None
