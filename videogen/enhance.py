"""Short prompts made rich before a model reads them: by a template, a local chat model, or an endpoint of the user's.

Published models were trained on long captions, so a line of five words is far from what they know. Imports no torch.
"""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from videogen.config import read_yaml
from videogen.errors import InvalidRequest, ModelNotFound, RemoteError

KEY = "VIDEOGEN_ENHANCE_KEY"  # the only variable that is sent to an endpoint
TIMEOUT = 60  # seconds
LARGEST = 1 << 20  # bytes of an answer
LONGEST = 2000  # characters of an enhanced prompt
INSTRUCTION = (
    "Rewrite the user's text as one caption for a video model, in English, in 60 to 120 words, as one paragraph. "
    "Keep every subject, number, colour and action of the text; invent nothing that contradicts it. Say in this order: "
    "camera, light, subject and what it does, the scene, the mood. Answer with the caption alone."
)


@runtime_checkable
class Enhancer(Protocol):
    """Makes a prompt richer; the same prompt and seed give the same text where the means allow it."""

    name: str

    def __call__(self, prompt: str, *, seed: int = 0) -> str: ...


def enhancer(how: str = "template") -> Enhancer:
    """ "template", "local:FOLDER" (a transformers chat model), or "http(s)://HOST/v1[#MODEL]" (OpenAI-compatible).

    Raises InvalidRequest for anything else, ModelNotFound if the folder holds no such model.
    """
    if how == "template":
        return Template()
    if how.startswith("local:"):
        return LocalChat(how.removeprefix("local:"))
    if how.startswith(("http://", "https://")):
        return Endpoint(how)
    raise InvalidRequest(
        f"there is no enhancer {how!r}.",
        why="it is template, local:FOLDER or an address.",
        hint="--enhance=template, with the = sign; the prompt stands before it.",
        param="enhance",
    )


class Template:
    """Camera, light, the prompt, motion, mood: phrases of `enhance.yaml` drawn by the seed. What is said, stays said.

    >>> Template()("A cat on the grass", seed=7) == Template()("A cat on the grass", seed=7)
    True
    """

    name = "template"

    def __init__(self, file: str | Path | None = None) -> None:
        self.aspects = read_yaml(file or Path(__file__).with_suffix(".yaml"))

    def __call__(self, prompt: str, *, seed: int = 0) -> str:
        text = prompt.strip().rstrip(".")
        words = set(re.findall(r"[\w-]+", text.lower()))
        drawn = random.Random(f"{seed}")  # a text seeds alike on every platform
        said = {}
        for aspect, phrases in self.aspects.items():
            choice = drawn.choice(phrases["choices"])  # drawn also where it is not used: no aspect shifts the next
            said[aspect] = "" if words & set(phrases["said_by"]) else choice
        setting = ", ".join(filter(None, (said.get("camera"), said.get("light"))))
        subject = ", ".join(filter(None, (text, said.get("motion"), said.get("mood"))))
        setting = setting[:1].upper() + setting[1:]
        return f"{setting}: {subject}." if setting and subject else (subject or setting) + "."


class LocalChat:
    """A chat model of transformers in a folder here: safetensors alone, no code of the folder, greedy words."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.name = f"local:{self.folder.name}"
        missing = [name for name in ("config.json", "*.safetensors") if not any(self.folder.glob(name))]
        if missing:
            raise ModelNotFound(
                f"{folder} is no chat model.",
                why=f"it has no {' and no '.join(missing)}." if self.folder.is_dir() else "no such folder.",
                hint="--enhance=local:FOLDER with config.json, a tokenizer and *.safetensors.",
                param="enhance",
            )

    def __call__(self, prompt: str, *, seed: int = 0) -> str:
        """Loaded for the call and freed after it: the memory is the video model's."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, **safe)
            safe |= {"use_safetensors": True, "dtype": "auto"}
            model: Any = AutoModelForCausalLM.from_pretrained(self.folder, **safe).eval()
        except Exception as error:  # transformers raises a dozen kinds
            raise ModelNotFound(
                f"the chat model {self.folder.name} cannot be opened.",
                why=(str(error).strip().splitlines() or [type(error).__name__])[0],
                hint="a folder saved by transformers with safetensors; models that bring code are not opened.",
                param="enhance",
            ) from error
        if tokenizer.chat_template:
            said = tokenizer.apply_chat_template(_messages(prompt), tokenize=False, add_generation_prompt=True)
        else:
            said = f"{INSTRUCTION}\n\nText: {prompt}\nCaption:"
        ids = tokenizer(said, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)["input_ids"]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with torch.no_grad():
            answer = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False, pad_token_id=pad
            )
        return _clean(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True), self.name)


class Endpoint:
    """An OpenAI-compatible chat endpoint. Only the prompt leaves, only to the address given; no redirect is followed.

    `#MODEL` at the end of the address names the model. A key is read from the variable VIDEOGEN_ENHANCE_KEY.
    """

    def __init__(self, url: str) -> None:
        address, _, self.model = url.partition("#")
        self.url = address.rstrip("/")
        if not self.url.endswith("/chat/completions"):
            self.url += "/chat/completions"
        self.name = self.model or "endpoint"  # not the address: a recipe travels

    def __call__(self, prompt: str, *, seed: int = 0) -> str:
        from urllib.request import HTTPRedirectHandler, Request, build_opener

        class Stay(HTTPRedirectHandler):
            def redirect_request(self, *args: Any, **kwargs: Any) -> None:
                return None  # urllib then raises the redirect as an error: the key goes nowhere else

        body = {"messages": _messages(prompt), "seed": seed, "temperature": 0.7, "max_tokens": 400}
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
                f"{self.url} did not enhance the prompt.",
                why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
                hint=f"check the address, #MODEL and the variable {KEY}; or --enhance=template",
                param="enhance",
            ) from error
        return _clean(text, self.name)


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]


def _clean(text: str, name: str) -> str:
    """One paragraph without a thinking part, quotes or control characters."""
    text = re.sub(r"<think>.*?</think>", " ", text, flags=re.DOTALL)
    text = "".join(c if c.isprintable() else " " for c in text)
    text = re.sub(r"\s+", " ", text).strip().strip('"“”').strip()[:LONGEST]
    if not text:
        raise RemoteError(
            f"{name} gave no text.", why="its answer is empty.", hint="--enhance=template", param="enhance"
        )
    return text
