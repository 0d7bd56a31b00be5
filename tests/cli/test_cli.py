"""The command line: paths on stdout, people on stderr, exit codes, and nothing heavy before a request is valid."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import videogen
from videogen.cli import build, main
from videogen.cli.generate import slug
from videogen.data.video import Video, read_recipe, read_video, write_video
from videogen.errors import Cancelled, NumericalError
from videogen.progress import Event, Progress, duration
from videogen.request import Request
from videogen.runtime.memory import PLANS

FILES = {
    "model_index.json": {"_class_name": "CogVideoXPipeline"},
    "transformer/config.json": {
        "in_channels": 32,
        "num_attention_heads": 3,
        "sample_height": 4,
        "sample_width": 6,
        "sample_frames": 9,
        "use_rotary_positional_embeddings": True,
    },
    "vae/config.json": {},
    "scheduler/scheduler_config.json": {"_class_name": "CogVideoXDDIMScheduler"},
    "videogen.json": {"name": "stub", "conditions": ["text", "first_frame", "last_frame", "keyframes"], "fps": 8},
}


class Stub:
    """A pipeline that paints gray clips: it has the signature of the real one, and remembers what it was asked."""

    def __init__(self) -> None:
        self.loaded: list[dict] = []
        self.asked: list[Request] = []
        self.fail: BaseException | None = None

    def load(self, model: str, **options) -> Stub:
        self.loaded.append({"model": model, **options})
        return self

    def windows(self, request: Request) -> list:
        return []

    def generate(self, prompt=None, **keywords) -> Video:
        request = Request(prompt, **keywords)
        self.asked.append(request)
        frames, height, width = request.size
        for step in range(1, 21):
            if request.on_step:
                request.on_step(Event("denoise", step, 20, eta=20.0 - step))
        if self.fail:
            raise self.fail
        chunks, recipe = iter([np.full((frames, height, width, 3), 99, np.uint8)]), request.recipe()
        return Video(request.out(chunks, request.fps or 8, recipe=recipe), request.fps or 8, request.seed, recipe)


@pytest.fixture
def stub(monkeypatch) -> Stub:
    stub = Stub()
    monkeypatch.setitem(vars(videogen), "load", stub.load)
    return stub


@pytest.fixture
def model(tmp_path, monkeypatch) -> str:
    for name, values in FILES.items():
        path = tmp_path / "stub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    monkeypatch.chdir(tmp_path)
    return "stub"


@pytest.fixture
def image(tmp_path) -> str:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "start.png")
    return "start.png"


def refused(capsys, *argv: str, code: int = 2) -> list[str]:
    """Run, expect failure, and give the lines of the error, which stand on stderr alone."""
    assert main([*argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.strip().splitlines()[-3:]
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "try"], err
    return lines


def test_a_clip_from_a_prompt(stub, model, capsys):
    assert main(["text-to-video", "A red circle!", "--model", model, "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    (path,) = map(Path, out.splitlines())
    assert re.fullmatch(r"outputs/\d{8}-\d{6}_a-red-circle_s7\.mp4", str(path))
    assert read_video(path)[0].shape == (9, 32, 48, 3)
    assert read_recipe(path)["prompt"] == "A red circle!"
    assert "denoise 20/20" in err
    assert stub.loaded[0].pop("memory") in PLANS.values(), "what it is to make is known: it is planned for"
    assert stub.loaded == [
        {"model": model, "offline": False, "compile": False}
        | dict.fromkeys(("device", "dtype", "kernel"), "auto")
        | dict.fromkeys(("lora", "verify", "quantize", "base", "variant", "merge_lora"))
    ]


def test_a_clip_of_windows_says_so_even_if_quiet(stub, model, capsys, monkeypatch):
    monkeypatch.setattr(Stub, "windows", lambda self, request: [(0, 2), (1, 3)])
    monkeypatch.setattr(Stub, "card", SimpleNamespace(native_frames=9, name="stub"), raising=False)
    assert main(["t2v", "a", "b", "--model", model, "--quiet"]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert notes == ["note: more than stub makes at once: overlapping windows of 9 frames; it may drift"]


def test_snap_says_once_on_stderr_what_it_changed(stub, model, capsys):
    flags = ["--frames", "10", "--snap", "--use-dynamic-cfg", "sat"]
    assert main(["t2v", "a", "b", "--model", model, *flags]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == ["note: snap: num_frames 10 became 9, as stub was made for"]
    assert {(asked.num_frames, asked.use_dynamic_cfg) for asked in stub.asked} == {(9, "sat")}
    assert stub.asked[0].snap == {"num_frames": 10}


def test_flags_are_the_keywords(stub, model, image, capsys):
    flags = """
        --negative blurry --frames 17 --steps 5 --guidance 3 --size 64x32 --fps 12 --sampler heun --seed 3 --fit pad
        --use-dynamic-cfg --last-frame-until 0.5 --first-frame start.png --last-frame start.png --keyframe 8=start.png
    """.split()  # noqa: SIM905
    assert main(["i2v", "a", "--model", model, "--quiet", *flags]) == 0
    assert capsys.readouterr().err == ""
    asked = stub.asked[0]
    assert asked.size == (17, 32, 64)
    assert (asked.negative_prompt, asked.num_inference_steps, asked.guidance_scale) == ("blurry", 5, 3.0)
    assert (asked.fps, asked.sampler, asked.seed, asked.fit) == (12, "heun", 3, "pad")
    assert asked.use_dynamic_cfg
    assert asked.last_frame_until == 0.5
    assert list(asked.images) == [0, 8, 16]


def test_every_keyword_a_shell_can_say_has_a_flag():
    _, commands = build()
    for_python = {"prompt", "prompt_embeds", "negative_prompt_embeds", "latents", "on_step", "output", "keyframes"}
    flags = {"--" + f.replace("_", "-") for f in set(Request.__dataclass_fields__) - for_python - {"_"}}
    assert flags <= set(commands["image-to-video"].names())


def test_json_and_several_prompts(stub, model, capsys):
    (Path("prompts.txt")).write_text("two\n\nthree\n")
    assert main(["t2v", "one", "@prompts.txt", "--model", model, "--json", "--out", "clips"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["settings"]["prompt"] for row in rows] == ["one", "two", "three"]
    assert all(set(row) == {"path", "seed", "settings", "seconds"} and Path(row["path"]).exists() for row in rows)
    assert len(stub.loaded) == 1, "the model is loaded once"


def test_names_that_exist_count_on(stub, model, monkeypatch, capsys):
    monkeypatch.setattr("time.strftime", lambda form: "20261122-152233")
    assert main(["t2v", "a cat", "a cat", "--model", model]) == 0
    assert main(["t2v", "a cat", "--model", model]) == 0
    names = [Path(line).stem for line in capsys.readouterr().out.splitlines()]
    assert names == [f"20261122-152233_a-cat_s0{suffix}" for suffix in ("", "-2", "-3")]


def test_an_existing_file_is_refused_before_loading(stub, model, capsys):
    Path("old.mp4").write_bytes(b"precious")
    refused(capsys, "t2v", "a", "--model", model, "--out", "old.mp4", code=6)
    assert Path("old.mp4").read_bytes() == b"precious"
    assert stub.loaded == []
    assert main(["t2v", "a", "--model", model, "--out", "old.mp4", "--overwrite", "--no-metadata"]) == 0
    assert read_recipe("old.mp4") is None


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        ("t2v a --frames 20", "--frames 17 or --frames 25"),
        ("t2v a --size 65x33", "--size 64x32"),
        ("t2v a --steps 0", "--steps"),
        ("t2v a --guidance nan", "--guidance"),
        ("t2v a --sampler dmp", "--sampler dpm"),
        ("t2v a --stpes 5", "did you mean --steps?"),
        ("t2v a --see 5", "did you mean --seed?"),
        ("t2v a --video start.png", "--model"),
        ("t2v a --size 64", "--help"),
        ("t2v a --size 64x64 --width 64", "--size alone"),
        ("t2v a --seed x", "--help"),
        ("t2v a --crf 99", "--crf 17"),
        ("t2v a --dtype float8", "bfloat16"),
        ("t2v a --kernel fast", "sdpa"),
        ("t2v a --quantize int4", "int8"),
        ("t2v a --memory tight", "low"),
        ("t2v a --device mps", "cuda"),
        ("t2v a b --out c.mp4", "--out FOLDER"),
        ("t2v a --out c.avi", "c.mp4"),
        ("t2v @gone.txt", "check the path"),
        ("t2v", "videogen t2v"),
        ("t2x a", "did you mean t2v?"),
        ("--verison", "did you mean --version?"),
        ("", "--help"),
        ("i2v a", "--first-frame"),
        ("i2v a --first-frame gone.png", "check the path"),
        ("i2v a --first-frame https://example.org/a.png", "download it"),
        ("i2v a --keyframe 8", "--help"),
        ("i2v a --keyframe 5=start.png", "--keyframe 4"),
        ("i2v a --keyframe 4=start.png --keyframe 4=start.png", "leave one out"),
        ("t2v a --config gone.yaml", "check the path"),
    ],
)
def test_refused_in_three_lines_before_loading(stub, model, image, capsys, argv, hint):
    words = argv.split()
    lines = refused(capsys, *words, *(["--model", model] if words[:1] in (["t2v"], ["i2v"]) else []))
    assert hint in lines[-1], lines
    assert stub.loaded == []


def test_missing_models(capsys):
    assert "hf download no/model" in refused(capsys, "t2v", "a", "--model", "no/model", "--offline", code=3)[-1]
    refused(capsys, "info", "nowhere", code=3)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumericalError("nan", why="x", hint="y"), 5),
        (MemoryError("too much"), 4),
        (OSError(28, "No space left on device"), 6),
        (ZeroDivisionError("division by zero"), 1),
        (Cancelled(why="x", hint="y"), 130),
    ],
)
def test_exit_codes(stub, model, capsys, error, code):
    stub.fail = error
    refused(capsys, "t2v", "a", "--model", model, "--quiet", code=code)
    assert not list(Path().rglob("*.mp4*")), "no partial file"


def test_interrupting_leaves_no_file(stub, model, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("videogen.data.video._into_place", interrupted)
    assert main(["t2v", "a", "--model", model, "--out", "here"]) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert "interrupted" in err
    assert list(Path("here").iterdir()) == []


def test_sigterm_ends_as_an_interrupt_does(stub, model, capsys, monkeypatch):
    monkeypatch.setattr("videogen.data.video._into_place", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["t2v", "a", "--model", model, "--out", "here"]) == 143
    assert "interrupted" in capsys.readouterr().err
    assert list(Path("here").iterdir()) == []


def test_debug_shows_the_traceback(stub, model, capsys):
    assert main(["t2v", "a", "--model", model, "--frames", "20"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["t2v", "a", "--model", model, "--frames", "20", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_config_file_then_pairs_then_flags(stub, model, image, capsys):
    Path("a.yaml").write_text(
        f"model: {model}\nseed: 1\nnum_inference_steps: 3\nsize: 64x32\nuse_dynamic_cfg: true\nquiet: true\n"
        "first_frame: start.png\nkeyframes: {4: start.png}\n"
    )
    assert main(["i2v", "a", "--steps", "9", "--config", "a.yaml", "seed=2", "fps=12"]) == 0
    asked = stub.asked[0]
    assert (asked.seed, asked.num_inference_steps, asked.fps, asked.size) == (2, 9, 12, (9, 32, 64))
    assert asked.use_dynamic_cfg
    assert list(asked.images) == [0, 4]
    capsys.readouterr()
    assert "did you mean --seed?" in refused(capsys, "i2v", "a", "--config", "a.yaml", "sede=2")[-1]
    assert "before --config" in refused(capsys, "i2v", "--config", "a.yaml", "a prompt")[-1]


@pytest.mark.parametrize(
    ("text", "code"),
    [("prompt: 5", 2), ("prompt: [a, 5]", 2), ("prompt: -night", 2), ("prompt:", 0)],
)
def test_a_config_file_of_other_kinds(stub, model, capsys, text, code):
    Path("a.yaml").write_text(text)
    assert main(["t2v", "a", "--model", model, "--config", "a.yaml", "--quiet"]) == code
    assert ("error:" in capsys.readouterr().err) == bool(code)


def test_info_of_a_model_and_of_a_clip(model, capsys):
    assert main(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == "stub"
    assert facts["conditions"][:2] == ["text", "first_frame"]
    assert (facts["width"], facts["height"], facts["num_frames"], facts["transformer"]["num_layers"]) == (48, 32, 9, 30)
    write_video("clip.mp4", np.zeros((9, 32, 48, 3), np.uint8), 8, recipe={"prompt": "a", "seed": 7})
    assert main(["info", "clip.mp4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["num_frames"], facts["fps"], facts["recipe"]) == (9, 8.0, {"prompt": "a", "seed": 7})
    assert main(["info", "clip.mp4"]) == 0
    assert re.search(r"^  seed +7$", capsys.readouterr().out, re.MULTILINE)


def test_info_says_what_matters_first_and_in_json_all(capsys):
    assert main(["info", "tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["name", "licence", "sizes", "frames"]
    assert len(lines) < 40
    assert main(["info", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"]


def test_info_of_latents_and_of_a_published_model_that_is_not_here(tmp_path, monkeypatch, capsys):
    import torch

    from videogen.data.latents import save_latents

    path = save_latents(tmp_path / "clip.mp4", torch.zeros(3, 16, 4, 6), {"prompt": "a", "seed": 7})
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["latents"], facts["recipe"]) == ([3, 16, 4, 6], {"prompt": "a", "seed": 7})
    monkeypatch.setattr("videogen.weights.hub.cache_folder", lambda: tmp_path / "hub")
    assert main(["info", "CogVideoX-5b", "--offline", "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert (facts["licence"], facts["sizes"], facts["folder"]) == ("CogVideoX License", "720x480", None)
    assert err.startswith("note: zai-org/CogVideoX-5b is not here")
    assert "not in the local cache" in refused(capsys, "info", "some/body", "--offline", code=3)[0]
    gone = refused(capsys, "info", str(tmp_path / "gone.safetensors"), code=3)
    assert gone[0].endswith("gone.safetensors does not exist.")


def test_commands_in_commands_have_their_own_options(capsys):
    assert "did you mean --json?   (videogen models list --help" in refused(capsys, "models", "list", "--jsno")[-1]
    assert "did you mean --offline?" in refused(capsys, "lora", "inspect", "a", "--offlne")[-1]
    assert "--overwrite" not in refused(capsys, "lora", "inspect", "a", "--overwrit")[-1]
    assert main(["models", "pull", "no model", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["videogen"] == videogen.__version__
    assert facts["libraries"]["torch"]


def test_progress_rewrites_one_line_on_a_terminal_and_else_says_tenths(capsys):
    events = [Event("denoise", i, 50, eta=0.5 * (50 - i)) for i in range(1, 51)] + [
        Event("decode", 1, 2),
        Event("decode", 2, 2),
    ]
    plain = Progress()
    for event in events:
        plain(event)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 + 2
    assert lines[1] == "denoise 5/50, 22 s left"
    assert lines[-1].startswith("decode 2/2, ")

    written: list[str] = []
    live = Progress(SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None))  # type: ignore[arg-type]
    for event in events:
        live(event)
    live.close()
    assert "".join(written).count("\n") == 2, "one line for each stage"
    assert all(text == "\n" or text.startswith("\r") for text in written)


def test_words_for_people():
    assert slug("A red circle!") == "a-red-circle"
    assert slug("雪が降る") == "雪が降る"
    assert slug("x" * 80) == "x" * 40
    assert slug("...") == "clip"
    assert len(slug("a small red circle moves right on a navy background")) <= 40
    assert [duration(s) for s in (0.84, 42, 185, 3720)] == ["0.8 s", "42 s", "3:05 min", "1:02 h"]


@pytest.mark.parametrize("argv", [["--help"], ["text-to-video", "a", "--frames", "20"], ["t2v", "a", "--stpes", "5"]])
def test_help_and_refusals_are_quick_and_import_no_torch(model, argv):
    if "--frames" in argv:
        argv = [*argv, "--model", model]
    code = (
        "import sys; from videogen.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'transformers', 'av', 'numpy'} & set(sys.modules), 'heavy'"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True)
    # 0.1 s on an idle machine; the bound leaves room for a busy one, and none for torch (2 s).
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.8


def test_it_runs_as_a_module():
    run = subprocess.run([sys.executable, "-m", "videogen", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"videogen {videogen.__version__}"
    assert subprocess.run([sys.executable, "-m", "videogen", "t2x"], capture_output=True, check=False).returncode == 2


def test_demo_calls_its_function(monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, "videogen.demo", SimpleNamespace(run=lambda: calls.append("demo")))  # type: ignore
    assert main(["demo"]) == 0
    assert calls == ["demo"]
