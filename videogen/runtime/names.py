"""What `load` knows for device, dtype, kernel and 8-bit format, so that a wrong word is refused without torch."""

from __future__ import annotations

from videogen.errors import InvalidRequest
from videogen.runtime.memory import Plan, choose_plan

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16", "float64")
KERNELS = ("auto", "sdpa", "cudnn", "fa3", "flash", "efficient", "math", "xformers", "sage", "int8")
FORMATS = ("fp8", "int8")


def check_names(*, device: object, dtype: object, memory: str | Plan, kernel: str, quantize: str | None) -> None:
    """Raises InvalidRequest for a name that nothing has; what is there and works is found out later."""
    check_device(device)
    check_dtype(dtype)
    choose_plan(memory)
    if kernel not in KERNELS:
        raise no_kernel(kernel)
    if quantize is not None and quantize not in FORMATS:
        raise no_format(quantize)


def check_device(device: object) -> None:
    if str(device).partition(":")[0] not in ("auto", *DEVICES):
        raise InvalidRequest(
            f"there is no device {str(device)!r}.",
            why=f"models run on {' or '.join(DEVICES)}.",
            hint="cpu, cuda or cuda:1",
            param="device",
        )


def check_dtype(dtype: object) -> None:
    """A name, or one of torch's dtypes."""
    if (dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")) not in ("auto", *DTYPES):
        raise InvalidRequest(
            f"{dtype!r} is not a dtype a model can run in.",
            why="it is one of the floating-point types of torch.",
            hint="float32, bfloat16, float16 or float64",
            param="dtype",
        )


def no_kernel(name: object) -> InvalidRequest:
    names = ", ".join(KERNELS)
    return InvalidRequest(
        f"there is no attention kernel {name!r}.",
        why="it is a row of docs/dit_speed.md, or int8.",
        hint=f"one of {names}",
        param="kernel",
    )


def no_format(name: object) -> InvalidRequest:
    why = "weights and activations are put into a format that is known."
    return InvalidRequest(
        f"there is no 8-bit format {name!r}.", why=why, hint=f"one of {', '.join(FORMATS)}", param="quantize"
    )
