"""`videogen rerun CLIP`: the clip again from the recipe inside it, or one that differs in what the flags say."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from videogen import __version__
from videogen.cli import generate
from videogen.distributed import launched, one_voice
from videogen.errors import InvalidRequest, ModelNotFound
from videogen.recipe import PICTURES, checked, request_of, sha256_of, unknown_settings
from videogen.request import FILES, Request
from videogen.runtime.memory import PLANS
from videogen.weights.lora import open_loras

WORDS = ("original_prompt", "enhanced_prompt", "enhanced_by", "style")
KEPT = {
    "dtype": "auto",
    "memory": "auto",
    "kernel": "auto",
    "quantize": None,
    "compile": False,
    "merge_lora": None,
}  # or as a flag says


def add_command(subparsers: Any) -> None:
    command = subparsers.add_parser("rerun", help="make a clip again from the recipe inside it, or vary it")
    command.add_argument("clip", help="a clip that carries its recipe (mp4, gif, webp, folder of PNGs)")
    command.add_argument("--prompt", help="another prompt")
    generate.add_request_flags(command, default=argparse.SUPPRESS)
    generate.add_image_flags(command, default=argparse.SUPPRESS)
    generate.add_habit_flags(command)
    generate.add_run_flags(command)
    command.add_argument("--images", type=Path, metavar="DIR", help="where the originals are that it was given")
    command.set_defaults(run=run, model=None)


@one_voice()
def run(args: argparse.Namespace) -> None:
    """Read the recipe, compare the model and the pictures with it, apply the flags, make the clip."""
    generate.check_run_flags(args)
    recipe = recipe_in(args.clip)
    refuse_extended(recipe)
    changes = generate.keywords(args) | ({"prompt": args.prompt} if args.prompt is not None else {})
    model, same_model = args.model or model_of(recipe), args.model is None
    args.model = model
    try:
        card = generate.card_of_model(args)
    except ModelNotFound as error:
        if not same_model:
            raise
        raise ModelNotFound(
            f"the model of this clip, {model!r}, is not here.", why=error.what, hint="--model FOLDER", param="model"
        ) from error
    is_other = card.name != recipe.get("model")
    if is_other:
        generate.say(args, f"note: made by {recipe.get('model')}, now by {card.name}: another clip")
    if unknown := unknown_settings(recipe):
        generate.say(args, f"note: the recipe says what this version does not know: {', '.join(unknown)}")

    replaced = {name: None for name in FILES if name in changes}  # what is given anew need not be found
    changes |= generate.frames_of(args, card, recipe.get("fps"))
    request, item = request_of({k: v for k, v in recipe.items() if k not in replaced}, args.images)
    request = changed(request, changes)
    notes = {} if "prompt" in changes else {name: recipe[name] for name in WORDS if name in recipe}
    if not {"fit", "height", "width", *PICTURES} & set(changes):  # known by the same names as before
        notes |= {name: recipe[name] for name in (*PICTURES, "images", "snap") if name in recipe}
    if args.style or args.enhance:
        request, notes = reworded(request, notes, item, args)
    requests, all_notes = generate.several([(request.checked(card), notes)], args.num)
    names = [replace(r, prompt=prompt_of(r, item), seed=seed_of(r, item)) for r in requests]
    paths = generate.outputs(args, names)

    if not is_other:
        transformer = card.transformer_sha256
        require_same_weights(recipe, card.name, transformer, None)
    has_other_loras = with_recipe(args, recipe)
    if not is_other:  # of what is here by now, whole: some of the files would have another fingerprint
        require_same_weights(recipe, card.name, None, generate.weights_of(generate.card_of_model(args, weights=True)))
    pipe = generate.open_model(args, card, requests)
    if not (changes or is_other or has_other_loras) and (differing := differences(recipe, pipe.made_with())):
        generate.say(args, f"note: equal frames are not promised: {', '.join(differing)}")
    for request, path, note in zip(requests, paths, all_notes, strict=True):
        made = generate.make_clip(pipe, generate.Job(request=request, path=path, notes=note, item=item), args)
        if launched()[0] == 0:
            print(json.dumps(made) if args.json else made["path"], flush=True)


def recipe_in(clip: str) -> dict[str, Any]:
    from videogen.data.video import read_recipe

    recipe = read_recipe(clip)
    if recipe is None or not ("prompt" in recipe or "prompt_embeds" in recipe):
        raise InvalidRequest(
            f"{clip} carries no recipe.",
            why="it was made by another program, with --no-metadata, or saved again since.",
            hint="videogen text-to-video, with the settings you remember",
            param="clip",
        )
    return checked(recipe)


def refuse_extended(recipe: dict[str, Any]) -> None:
    """A clip that was extended is no single request."""
    if "extends" in recipe:
        raise InvalidRequest(
            "this clip was extended.",
            why="its beginning is another clip, of which the recipe has the sha256 alone.",
            hint="videogen extend CLIP PROMPT, with that one",
            param="clip",
        )


def model_of(recipe: dict[str, Any]) -> str:
    """What `--model` would have said: the name, at its commit if it came from the Hub."""
    name, revision = recipe.get("model") or "tiny", recipe.get("revision")
    return f"{name}@{revision}" if revision and "/" in name else name


def require_same_weights(recipe: dict[str, Any], model: str, transformer: str | None, weights: str | None) -> None:
    """Refuse other weights under the same name: the clip would be another one."""
    for name, here in (("transformer_sha256", transformer), ("weights", weights)):
        there = recipe.get(name)
        if there and here and there != here:
            raise InvalidRequest(
                f"{model} here is not the {model} that made this clip.",
                why=f"its weights differ ({name} {here[:12]}…, in the recipe {there[:12]}…).",
                hint="--model FOLDER with those weights, or text-to-video with the settings of `videogen info CLIP`",
                param="model",
            )


def changed(request: Request, changes: dict[str, Any]) -> Request:
    """The request with the flags in place of its own; in a batch, of every clip."""
    for name in ("prompt", "seed"):
        if name in changes and isinstance(getattr(request, name), list):
            changes = changes | {name: [changes[name]] * request.batch_size}
    if {"height", "width"} & set(changes):
        changes = {"height": None, "width": None} | changes
    return replace(request, **changes)


def reworded(
    request: Request, notes: dict[str, Any], item: int | None, args: argparse.Namespace
) -> tuple[Request, dict[str, Any]]:
    """In a style, or enhanced: from the prompt as it was before, if the recipe has that."""
    words = notes.get("original_prompt", prompt_of(request, item))
    negative = request.negative_prompt
    if isinstance(negative, list) and item is not None:
        negative = negative[item]
    plain = replace(request, prompt=words, negative_prompt=negative, seed=seed_of(request, item))
    ((said, note),) = generate.reworded([plain], args.enhance, args.style, args.styles)
    return changed(request, {"prompt": said.prompt, "negative_prompt": said.negative_prompt}), notes | note


def prompt_of(request: Request, item: int | None) -> Any:
    return request.prompt[item] if isinstance(request.prompt, list) and item is not None else request.prompt


def seed_of(request: Request, item: int | None) -> Any:
    return request.seed[item] if isinstance(request.seed, list) and item is not None else request.seed


def with_recipe(args: argparse.Namespace, recipe: dict[str, Any]) -> bool:
    """Run as the recipe says, where no flag says otherwise; as many threads as then, since they order the sums.

    Whether the model is another one by its LoRAs.
    """
    made_with = recipe.get("made_with") or {}
    for name, unsaid in KEPT.items():
        if getattr(args, name) == unsaid:
            said = [x for x in (recipe.get(name), made_with.get(name)) if x is not None]
            setattr(args, name, said[0] if said else unsaid)
    if args.memory not in ("auto", *PLANS):  # a plan of somebody's own: what matters of it are the sums of guidance
        args.memory = "balanced" if made_with.get("guidance_in_two") else "fast"
    if made_with.get("device") == "cpu" and args.device in ("auto", "cpu"):
        import torch

        args.device = "cpu"  # also where there is a GPU by now
        torch.set_num_threads(made_with.get("threads") or torch.get_num_threads())
    if args.lora is None and recipe.get("lora"):
        args.lora = [_found(lora, args.images) for lora in recipe["lora"]]
    return [lora.recipe for lora in open_loras(args.lora)] != (recipe.get("lora") or [])


def _found(lora: dict[str, Any], folder: Path | None) -> tuple[str, Any]:
    """The LoRA file of that sha256 in the folder, and how much it counts."""
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        if sha256_of(path) == lora.get("sha256"):
            return str(path), lora.get("scale", 1)
    raise InvalidRequest(
        f"the LoRA {lora.get('file')} of this clip is not here.",
        why=f"the recipe has only its name and sha256:{str(lora.get('sha256'))[:12]}….",
        hint="--images FOLDER, where the file is, or --lora FILE",
        param="lora",
    )


def differences(recipe: dict[str, Any], now: dict[str, Any]) -> Iterable[str]:
    """What equal numbers depend on and is not as it was: "torch 2.12.0, now 2.13.0"."""
    then = {"videogen": recipe.get("videogen")} | (recipe.get("made_with") or {})
    now = {"videogen": __version__} | now
    return [f"{name} {then.get(name)}, now {now.get(name)}" for name in now if then.get(name) != now.get(name)]
