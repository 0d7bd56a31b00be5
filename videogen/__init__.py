"""videogen: text- and image-to-video diffusion in the CogVideoX family. The public names, loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from videogen.data.video import Video
    from videogen.pipeline import Pipeline, generate, load
    from videogen.request import Request

_HOME = {
    "load": "videogen.pipeline",
    "generate": "videogen.pipeline",
    "Pipeline": "videogen.pipeline",
    "Video": "videogen.data.video",
    "Request": "videogen.request",
}
__all__ = ["Pipeline", "Request", "Video", "__version__", "generate", "load"]


def __getattr__(name: str) -> Any:
    """Import torch and friends only when they are needed: `import videogen` takes under 0.1 s."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'videogen' has no attribute {name!r}")
