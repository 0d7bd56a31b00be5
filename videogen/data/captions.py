"""Captions by a model that sees: any vision-language model of transformers, or any OpenAI-compatible endpoint.

They go to `captions.jsonl`, a line for each clip with who wrote it, and stand beside the captions that were there: a
training draws one of them by weight (DALL-E 3 drew the long ones 95 times of 100, its report says). Imports no torch.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from videogen.data.manifest import add_line, json_lines
from videogen.data.sources import Dropped, Pictures, Sample, samples
from videogen.errors import FileError, InvalidRequest, ModelNotFound, RemoteError

Frames = list[UInt8[np.ndarray, "_H _W 3"]]
KEY = "VIDEOGEN_CAPTION_KEY"  # the only variable that is sent to an endpoint
TIMEOUT = 120  # seconds
LARGEST = 2**20  # bytes of an answer
LONGEST = 4000  # characters of a caption
SHOWN = 8  # frames of a clip that a vision-language model is shown
SIDE = 512  # px of their long side
FAILURES = 3  # in a row end a run: the endpoint is down
INSTRUCTION = (
    "These are frames of one video clip, in order. Describe the clip in English in 60 to 120 words, as one paragraph: "
    "the subject and what it does over time, the scene, the light, and how the camera moves. Say only what can be "
    "seen, in plain words, and begin with the subject."
)
OPENERS = re.compile(
    r"^(in|throughout) (the|this) (video|clip|footage|scene|sequence|image)[, ]+(we (can )?see |there (is|are) )?"
    r"|^(the|this) (video|clip|footage|scene|sequence|image) "
    r"(shows|features|depicts|captures|presents|displays|begins with|opens with|starts with) ",
    re.IGNORECASE,
)


@runtime_checkable
class Captioner(Protocol):
    """Says what `shown` frames, evenly over a clip, show. `name` is what its captions have as their source."""

    name: str
    shown: int

    def __call__(self, frames: Frames, fps: float | int | None) -> str: ...


def captioner(how: str) -> Captioner:
    """ "local:FOLDER" (a transformers model), or "http(s)://HOST/v1[#MODEL]" (OpenAI-compatible)."""
    if how.startswith("local:"):
        return LocalModel(how.removeprefix("local:"))
    if how.startswith(("http://", "https://")):
        return Endpoint(how)
    raise InvalidRequest(
        f"there is no captioner {how!r}.",
        why="it is local:FOLDER or an address.",
        hint="--with http://localhost:8000/v1#MODEL",
        param="with",
    )


def caption_source(
    source: str | Path,
    by: Captioner,
    out: str | Path,
    *,
    weight: float | int = 1.0,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, int]:
    """Caption every clip of a source that `out` has no caption of by this captioner; counts of what was done.

    weight  how often the new captions are drawn beside others, which have 1 unless they say otherwise
    """
    done: set[tuple[str, str]] = set()
    if Path(out).is_file():
        lines = (values for _, values in json_lines(out, torn=True))
        done = {(str(line.get("name")), str(line.get("sha256"))) for line in lines if line.get("source") == by.name}
    counts, failed = {"captioned": 0, "there already": 0, "failed": 0, "dropped": 0}, 0
    for sample in samples(source):
        if isinstance(sample, Dropped):
            counts["dropped"] += 1
            continue
        try:
            sha = sample.sha256()
            if (sample.name, sha) in done:
                counts["there already"] += 1
                continue
            text = caption_of(sample, by)
        except FileError as error:
            counts["dropped"] += 1
            say(f"{sample.name}: {error.what}")
            continue
        except RemoteError as error:
            counts["failed"], failed = counts["failed"] + 1, failed + 1
            say(f"{sample.name}: {error.why}")
            if failed == FAILURES:
                raise
            continue
        failed = 0
        line = {"name": sample.name, "sha256": sha, "text": text, "source": by.name, "weight": weight}
        add_line(out, line | {"instruction": getattr(by, "instruction", "")})
        counts["captioned"] += 1
    return counts


def caption_of(sample: Sample, by: Captioner) -> str:
    with sample.stream() as (fps, _, pictures):
        frames = spread(pictures, by.shown)
    return tidy(by(frames, fps), by.name)


def spread(pictures: Pictures, count: int) -> Frames:
    """`count` frames evenly over a clip whose length is not known before its end, or all of a shorter one."""
    kept, every = [], 1
    for index, picture in enumerate(pictures):
        if index % every == 0:
            kept.append(picture)
        if len(kept) > 4 * count:
            kept, every = kept[::2], 2 * every
    places = np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int)
    return [kept[place] for place in places]


def tidy(text: str, name: str) -> str:
    """One paragraph without a thinking part, quotes, control characters, or an opener such as "The video shows"."""
    text = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL)
    text = "".join(c if c.isprintable() else " " for c in text)
    text = re.sub(r"\s+", " ", text).strip().strip('"“”').strip()
    text = OPENERS.sub("", text)[:LONGEST].strip()
    if not text:
        raise RemoteError(f"{name} gave no caption.", why="its answer is empty.", hint="another model.", param="with")
    return text[:1].upper() + text[1:]


class Endpoint:
    """An OpenAI-compatible chat endpoint that takes pictures. Frames leave, only to the address given; no redirect is
    followed. `#MODEL` names the model; a key is read from the variable VIDEOGEN_CAPTION_KEY."""

    instruction, shown = INSTRUCTION, SHOWN

    def __init__(self, url: str) -> None:
        address, _, self.model = url.partition("#")
        self.url = address.rstrip("/")
        if not self.url.endswith("/chat/completions"):
            self.url += "/chat/completions"
        self.name = self.model or "endpoint"  # not the address: captions travel

    def __call__(self, frames: Frames, fps: float | int | None) -> str:
        from urllib.request import HTTPRedirectHandler, Request, build_opener

        class Stay(HTTPRedirectHandler):
            def redirect_request(self, *args: Any, **kwargs: Any) -> None:
                return None  # urllib then raises the redirect as an error: frames and key go nowhere else

        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(x)}} for x in frames]
        content.append({"type": "text", "text": self.instruction})
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 400}
        body |= {"model": self.model} if self.model else {}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        try:
            request = Request(self.url, json.dumps(body).encode(), headers)
            with build_opener(Stay).open(request, timeout=TIMEOUT) as answer:
                text = json.loads(answer.read(LARGEST))["choices"][0]["message"]["content"]
            if not isinstance(text, str):
                raise ValueError("the answer holds no text")
        except Exception as error:  # no network, no such host, 401, not JSON, other JSON
            raise RemoteError(
                f"{self.url} gave no caption.",
                why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                hint=f"check the address, #MODEL and the variable {KEY}.",
                param="with",
            ) from error
        return text


class LocalModel:
    """A vision-language model of transformers in a folder here: safetensors alone, no code of the folder, greedy words.

    Any that `AutoModelForImageTextToText` opens and whose processor has a chat template: Qwen-VL, GLM-V, InternVL,
    LLaVA and others.
    """

    instruction, shown = INSTRUCTION, SHOWN

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.name = f"local:{self.folder.name}"
        self.parts: tuple[Any, Any] | None = None
        missing = [name for name in ("config.json", "*.safetensors") if not any(self.folder.glob(name))]
        if missing:
            raise ModelNotFound(
                f"{folder} is no vision-language model.",
                why=f"it has no {' and no '.join(missing)}." if self.folder.is_dir() else "no such folder.",
                hint="--with local:FOLDER with config.json, a processor and *.safetensors.",
                param="with",
            )

    def open(self) -> tuple[Any, Any]:
        """Processor and model, opened once."""
        if self.parts is None:
            import torch
            from transformers import AutoModelForImageTextToText, AutoProcessor

            safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
            try:
                processor: Any = AutoProcessor.from_pretrained(self.folder, **safe)
                safe |= {"use_safetensors": True, "dtype": "auto"}
                model: Any = AutoModelForImageTextToText.from_pretrained(self.folder, **safe).eval()
                if not getattr(processor, "chat_template", None):
                    raise ValueError("its processor has no chat template")
            except Exception as error:  # transformers raises a dozen kinds
                raise ModelNotFound(
                    f"the model {self.folder.name} cannot be opened.",
                    why=(str(error).strip().splitlines() or [type(error).__name__])[0],
                    hint="a folder saved by transformers with safetensors; models that bring code are not opened.",
                    param="with",
                ) from error
            self.parts = processor, model.to("cuda" if torch.cuda.is_available() else "cpu")
        return self.parts

    def __call__(self, frames: Frames, fps: float | int | None) -> str:
        import torch

        processor, model = self.open()
        content = [{"type": "image"} for _ in frames] + [{"type": "text", "text": self.instruction}]
        said = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[said], images=[picture_of(frame) for frame in frames], return_tensors="pt")
        inputs = inputs.to(model.device)
        with torch.no_grad():
            answer = model.generate(**inputs, max_new_tokens=250, do_sample=False)
        return processor.batch_decode(answer[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def picture_of(frame: UInt8[np.ndarray, "_H _W 3"]) -> Any:
    """A frame as a picture of at most `SIDE` pixels a side."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(frame))
    picture.thumbnail((SIDE, SIDE))
    return picture


def data_url(frame: UInt8[np.ndarray, "_H _W 3"]) -> str:
    data = io.BytesIO()
    picture_of(frame).save(data, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
