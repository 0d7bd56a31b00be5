"""Every attack on videogen that is tried, as data: a threat, what is prepared, and what then is called.

`python tests/security/attacks.py` runs them all in one process and prints a JSON line for each: what came of it, how
long it took, how much memory. `tests/security/test_attacks.py` reads these lines; docs/security.md counts them.

Watched: a marker file that evil code would write, a listening socket, a secret file, and Python's audit events for
processes, connections, unpickling, and files outside of the attack's own folder.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REFUSED, HARMLESS = "refused", "harmless"  # a typed error; or it works, and nothing evil came of it
DIT, VAE, T5 = "transformer/config.json", "vae/config.json", "text_encoder/config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"
TOKENIZER = "tokenizer/tokenizer_config.json"


@dataclass(frozen=True)
class Place:
    """Where an attack is prepared: its own folder with a good model, and what must stay untouched."""

    folder: Path
    marker: Path
    secret: Path
    port: int

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write(self, name: str, data: bytes | str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def edit(self, name: str, **changes: Any) -> None:
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def fifo(self, name: str) -> Path:
        path = self.folder / name
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    @property
    def pickle(self) -> bytes:
        class Evil:
            def __reduce__(self, marker=str(self.marker)):
                return os.system, (f"touch {marker}",)

        return pickle.dumps(Evil())

    @property
    def code(self) -> str:
        return f"import pathlib\npathlib.Path({str(self.marker)!r}).touch()\nclass Evil:\n    pass\n"


@dataclass(frozen=True)
class Attack:
    threat: str
    name: str
    prepare: Callable[[Place], Callable[[], Any]]
    expect: tuple[str, ...] = (REFUSED,)
    child: bool = False  # it reads the file in a process of its own, which imports torch first


# ---- what is called -------------------------------------------------------------------------------------------------


def load(place: Place) -> Callable[[], Any]:
    import videogen

    return lambda: videogen.load(str(place.model), device="cpu")


def edited(file: str, **changes: Any) -> Callable[[Place], Callable[[], Any]]:
    def prepare(place: Place) -> Callable[[], Any]:
        place.edit(file, **changes)
        return load(place)

    return prepare


def written(file: str, data: Any) -> Callable[[Place], Callable[[], Any]]:
    """`data`: bytes, text, or a function of the place that gives them."""

    def prepare(place: Place) -> Callable[[], Any]:
        place.write(f"model/{file}", data(place) if callable(data) else data)
        return load(place)

    return prepare


def instead(file: str, data: Any) -> Callable[[Place], Callable[[], Any]]:
    """The transformer's weights are gone, and this lies in their place."""

    def prepare(place: Place) -> Callable[[], Any]:
        (place.model / WEIGHTS).unlink()
        return written(file, data)(place)

    return prepare


def command(*argv: Any) -> Callable[[Place], Callable[[], Any]]:
    """A command line; callables among its words are given the place."""

    def prepare(place: Place) -> Callable[[], Any]:
        words = [str(word(place)) if callable(word) else str(word) for word in argv]
        return lambda: run_command(words, place)

    return prepare


def run_command(words: list[str], place: Place) -> None:
    """Raises what a refusal is; anything but a typed error of three lines is an error of the test's own."""
    from videogen.cli import main
    from videogen.errors import VideogenError

    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    os.chdir(place.folder)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(words)
    finally:
        os.chdir(before)
    text = out.getvalue() + err.getvalue()
    assert not any(sign in text for sign in ("\x1b", "\x07", "Traceback")), text
    if code:
        assert code in (2, 3, 4, 6, 7), (code, text)
        assert "error: " in text, text
        raise VideogenError(text)


def request(**keywords: Any) -> Callable[[Place], Callable[[], Any]]:
    """A request to the good model, checked; then its pictures are read, as `generate` does."""

    def prepare(place: Place) -> Callable[[], Any]:
        from videogen.data.video import fit_image, read_video
        from videogen.request import Request
        from videogen.weights.card import read_card

        card = read_card(place.model)
        given = {name: value(place) if callable(value) else value for name, value in keywords.items()}

        def call() -> None:
            checked = Request(given.pop("prompt", "a"), **given).checked(card)
            for image in checked.images.values():
                fit_image(image, *checked.size[1:])
            if checked.video is not None:
                read_video(checked.video, limit=checked.size[0])

        return call

    return prepare


def picture(file: str, data: Any, *expect: str, threat: str = "T9") -> Attack:
    return Attack(
        threat,
        f"picture {file}",
        request(first_frame=lambda place: place.write(file, data(place) if callable(data) else data)),
        expect or (REFUSED,),
    )


def clip(name: str, data: Any, *expect: str, threat: str = "T10") -> Attack:
    def path(place: Place) -> Path:
        return place.write(name, data(place) if callable(data) else data)

    return Attack(threat, f"clip {name!r}", request(video=path), expect or (REFUSED,))


def evil(place: Place) -> Callable[[], Any]:
    """What no attack may reach: the watch is tried with it."""

    def call() -> None:
        pickle.loads(place.pickle)
        socket.create_connection(("127.0.0.1", place.port)).close()
        place.secret.read_text()

    return call


# ---- hostile bytes --------------------------------------------------------------------------------------------------


def safetensors(header: Any, data: bytes = b"\0" * 16, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, end: int, shape: tuple = (4,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def png(width: int, height: int, *, chunks: bytes = b"", rows: int | None = None) -> bytes:
    """A 1-bit black PNG, a few kB for any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeeze = zlib.compressobj(9)
    row = b"\0" * (1 + (width + 7) // 8)
    body = b"".join(squeeze.compress(row) for _ in range(height if rows is None else rows)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    data = b"videogen\0\0" + zlib.compress(b" " * 100_000_000, 1)
    return struct.pack(">I", len(data)) + b"zTXt" + data + struct.pack(">I", zlib.crc32(b"zTXt" + data))


def pillow(kind: str, mode: str = "RGB", size: tuple[int, int] = (64, 48), **options: Any) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def animation(count: int, side: int) -> bytes:
    """A GIF of `count` pictures, made of one by repeating its bytes."""
    data = pillow("GIF", "L", (side, side))
    start = data.index(b"\x2c")  # where the first picture begins
    return data[:start] + data[start:-1] * count + b";"


def video(codec: str = "libx264", ending: str = "mp4", **options: Any) -> bytes:
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format=ending) as out:
        stream: Any = out.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, options.get("pix_fmt", "yuv420p")
        out.metadata.update(options.get("metadata", {}))
        for _ in range(12):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            out.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        out.mux(stream.encode())
    return file.getvalue()


def recipe(text: str) -> Callable[[Place], Path]:
    """A clip that carries this text as its recipe."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    def path(place: Place) -> Path:
        info = PngInfo()
        info.add_text("videogen", text)
        file = place.folder / "frames" / "0000.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (48, 32)).save(file, pnginfo=info)
        return file.parent

    return path


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out:
            out.writestr("../../escaped.txt", "x")
            out.writestr("bomb", b"\0" * 10**7)
    else:
        with tarfile.open(fileobj=file, mode="w:gz") as out:
            for name in ("../escaped.txt", "/tmp/escaped.txt"):
                out.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file.getvalue()


def linked(name: str, target: Callable[[Place], Path]) -> Callable[[Place], Callable[[], Any]]:
    """`name` in the model becomes a link."""

    def prepare(place: Place) -> Callable[[], Any]:
        path = place.model / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target(place))
        return load(place)

    return prepare


def elsewhere(part: str) -> Callable[[Place], Path]:
    """A good copy of `part`, beside the model: it would open."""

    def move(place: Place) -> Path:
        outside = place.folder / "outside" / Path(part).name
        outside.parent.mkdir(exist_ok=True)
        # the model's own was removed by `linked`: made again from the pattern all models are copied from
        source = place.folder.parent / "good" / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, outside)
        return outside

    return move


def sharded(**weight_map: str) -> Callable[[Place], Callable[[], Any]]:
    def prepare(place: Place) -> Callable[[], Any]:
        (place.model / WEIGHTS).unlink()
        place.write(f"model/{INDEX}", json.dumps({"metadata": {}, "weight_map": weight_map}))
        return load(place)

    return prepare


def damaged(change: Callable[[bytearray], Any]) -> Callable[[Place], Callable[[], Any]]:
    """A model that carries hashes, with one file changed after it was saved."""

    def prepare(place: Place) -> Callable[[], Any]:
        shutil.copy(place.folder.parent / "videogen.json", place.model)
        path = place.model / "vae/diffusion_pytorch_model.safetensors"
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)
        return load(place)

    return prepare


def flip(data: bytearray) -> None:
    data[-100] ^= 4


def tokens(place: Place, **more: Any) -> str:
    return json.dumps(json.loads((place.model / TOKENIZER).read_text()) | more)


def train(text: Any, *overrides: str) -> Callable[[Place], Callable[[], Any]]:
    """A training file."""

    def prepare(place: Place) -> Callable[[], Any]:
        path = place.write("train.yaml", text(place) if callable(text) else text)
        return lambda: run_command(["train", str(path), *overrides], place)

    return prepare


def resume(place: Place) -> Callable[[], Any]:
    """A state of a training, with what other trainers would unpickle beside it."""
    from torch import nn

    from videogen.training.state import StateWriter, newest_state, tensors_of

    model = nn.Linear(2, 2)
    with StateWriter(place.folder / "run") as writer:
        writer.save(1, tensors_of({"model": model}), {})
    for name in (".metadata", "rng_state.pth", "scheduler.bin", "optimizer.pt", "random_states_0.pkl"):
        (place.folder / "run" / "step_00000001" / name).write_bytes(place.pickle)
    return lambda: newest_state(place.folder / "run")


def written_over(place: Place) -> Callable[[], Any]:
    """`out` is a link to the secret: the link is replaced, not what it points at."""
    import numpy as np

    from videogen.data.video import write_video

    path = place.folder / "out.mp4"
    path.symlink_to(place.secret)
    return lambda: write_video(path, np.zeros((1, 16, 16, 3), np.uint8), 8, overwrite=True)


def out(path: str) -> Callable[[Place], Callable[[], Any]]:
    return request(out=lambda place: path.format(folder=place.folder))


ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [{','.join([f'*{m}'] * 9)}]\n" for m, n in zip("abcdefgh", "bcdefghi", strict=True)
)
SVG = "<svg xmlns='http://www.w3.org/2000/svg' xmlns:x='http://www.w3.org/1999/xlink'><image x:href='{url}'/></svg>"
EPS = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n(%pipe%touch {marker}) (w) file\n"
M3U8 = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}/a.ts\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{secret}'\nfile '{url}/a.mp4'\n"
DASH = (
    "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011' type='static' mediaPresentationDuration='PT1S'>"
    "<Period><AdaptationSet mimeType='video/mp4'><Representation id='1' bandwidth='1'><BaseURL>{url}/a.mp4</BaseURL>"
    "</Representation></AdaptationSet></Period></MPD>"
)
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"


def filled(text: str) -> Callable[[Place], str]:
    return lambda p: text.format(url=p.url, secret=p.secret, marker=p.marker, port=p.port)


def attacks() -> Iterator[Attack]:
    """All of them, by threat."""
    # T1, T2: a pickle in place of weights, or beside them
    for ending in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        stem = "transformer/diffusion_pytorch_model"
        yield Attack("T1", f"weights as {ending}", instead(stem + ending, lambda p: p.pickle))
        yield Attack(
            "T1", f"a file {ending} as the model", command("info", lambda p, e=ending: p.write("x" + e, p.pickle))
        )
    yield Attack("T1", "a pickle called safetensors", written(WEIGHTS, lambda p: p.pickle))
    yield Attack("T1", "a zip with a pickle called safetensors", written(WEIGHTS, lambda p: archive("zip")))
    yield Attack(
        "T1", "a text encoder as pytorch_model.bin", instead("text_encoder/pytorch_model.bin", lambda p: p.pickle)
    )
    for name in ("optimizer.bin", "transformer/random_states_0.pkl", "scheduler/scheduler.bin"):
        yield Attack("T1", f"{name} beside good weights", written(name, lambda p: p.pickle), (HARMLESS,))
    yield Attack(
        "T2", "garbage that no unpickler reads", instead("transformer/diffusion_pytorch_model.bin", b"\x80\x04garbage")
    )
    for name, data in (
        ("no checkpoint", b"\x80\x04g"),
        ("an evil pickle", None),
        ("a zip", archive("zip")),
        ("nothing", b""),
    ):

        def file(place: Place, data: bytes | None = data) -> Path:
            return place.write("x.pt", place.pickle if data is None else data)

        yield Attack(
            "T1" if data is None else "T2", f"convert of {name}", command("convert", file, "--out", "o"), child=True
        )
    yield Attack("T3", "a state of a training with pickles beside it", resume)

    # T4: code in a model folder, or names of it
    for name in ("transformer/evil.py", "pipeline.py", "None.py", "tokenizer/tokenization_t5.py", "__init__.py"):
        yield Attack("T4", f"{name} in the folder", written(name, lambda p: p.code), (HARMLESS,))
    yield Attack("T4", "auto_map of the transformer", edited(DIT, auto_map={"AutoModel": "evil.Evil"}))
    yield Attack("T4", "auto_map of the text encoder", edited(T5, auto_map={"AutoModel": "evil.Evil"}), (HARMLESS,))
    yield Attack("T4", "attention from the Hub", edited(T5, _attn_implementation_internal="evil/kernel"), (HARMLESS,))
    yield Attack("T4", "attention from the Hub, again", edited(T5, attn_implementation="evil/kernel"), (HARMLESS,))
    yield Attack(
        "T4", "a quantiser of the text encoder", edited(T5, quantization_config={"quant_method": "evil"}), (HARMLESS,)
    )
    yield Attack("T4", "trust_remote_code", edited(T5, trust_remote_code=True, custom_code="evil.py"), (HARMLESS,))
    for value in (["evil", "Evil"], "os.system", 5, None, {"a": 1}, "FluxTransformer2DModel"):
        yield Attack("T4", f"transformer of class {value}", edited(DIT, _class_name=value))
        yield Attack("T4", f"pipeline of class {value}", edited("model_index.json", _class_name=value))
        yield Attack("T4", f"tokenizer of class {value}", edited(TOKENIZER, tokenizer_class=value))
        yield Attack(
            "T4", f"part of class {value}", edited("model_index.json", transformer=["evil", value or "os.system"])
        )
    yield Attack("T4", "a part nobody knows", edited("model_index.json", evil=["evil", "Evil"]))
    yield Attack("T4", "an empty part", edited("model_index.json", transformer=[]), (REFUSED, HARMLESS))
    yield Attack("T4", "custom_pipeline", edited("model_index.json", custom_pipeline="evil"), (HARMLESS,))
    for value in ("os.system", ["x"], 7, "SchedulerMixin", "__class__"):
        yield Attack("T4", f"scheduler of class {value!r}", sampled(_class_name=value))

    # T5: paths out of the folder
    for name in (
        "../x.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        "C:\\x.safetensors",
        "x\0.safetensors",
        "",
    ):
        yield Attack("T5", f"a shard called {name!r}", sharded(**{"patch_embed.proj.weight": name}))
    yield Attack("T5", "100,000 shards", sharded(**{f"t{i}": f"{i}.safetensors" for i in range(100_000)}))
    yield Attack("T5", "an index that is a list", instead(INDEX, "[]"))
    yield Attack("T5", "an index of numbers", instead(INDEX, '{"weight_map": {"a": 5}}'))
    for name in ("transformer", "tokenizer", DIT, WEIGHTS, "model_index.json", "videogen.json", "vae/config.json"):
        yield Attack("T5", f"{name} is a link out of the folder", linked(name, elsewhere(name)))
    yield Attack("T5", "a config that is a link to a secret", linked(DIT, lambda p: p.secret))
    yield Attack("T5", "a link to itself", linked(DIT, lambda p: p.model / DIT))
    for name in (DIT, WEIGHTS, "videogen.json", "tokenizer/tokenizer.json"):
        yield Attack("T5", f"{name} is a pipe", piped(name), (REFUSED, HARMLESS))
    for name in ("/dev/zero", "../../secret.json", "a/b/c", "x\0"):
        yield Attack("T5", f"a hash of {name!r}", edited("videogen.json", sha256={name: "0" * 64}))
    for name in ("http://127.0.0.1/x", "file:///etc", "a/b@../../x", "../../etc"):
        yield Attack("T5", f"--model {name}", command("info", name, "--offline"))

    # T6: configs that would allocate
    big: list[tuple[str, dict[str, Any]]] = [
        (DIT, {"num_layers": value})
        for value in (10**6, 10**12, -1, 0, "many", 1e308, True, None, [30], {"a": 1}, 10**4000)
    ]
    big += [
        (DIT, {name: 10**9})
        for name in (
            "num_attention_heads",
            "attention_head_dim",
            "sample_frames",
            "sample_height",
            "in_channels",
            "time_embed_dim",
            "text_embed_dim",
            "max_text_seq_length",
            "patch_size",
            "temporal_compression_ratio",
        )
    ]
    big += [(DIT, {"patch_size": 0}), (DIT, {"norm_eps": "x"}), (DIT, {"activation_fn": "evil"}), (DIT, {"unknown": 1})]
    big += [
        (DIT, {"attention_head_dim": 7}),
        (DIT, {"num_attention_heads": 256, "attention_head_dim": 512, "num_layers": 128}),
    ]
    big += [(VAE, {"block_out_channels": value}) for value in ([10**9] * 4, [8] * 100_000, [], [7, 7, 7, 7], "8")]
    big += [
        (VAE, {name: 10**9}) for name in ("layers_per_block", "latent_channels", "sample_width", "latent_batch_size")
    ]
    big += [(VAE, {"norm_num_groups": 0}), (VAE, {"scaling_factor": 0}), (VAE, {"block_out_channels": [4096] * 8})]
    big += [
        (T5, {name: value})
        for name in (
            "num_layers",
            "d_model",
            "d_ff",
            "d_kv",
            "num_heads",
            "vocab_size",
            "relative_attention_num_buckets",
        )
        for value in (10**9, -3, "x")
    ]
    big += [(T5, {"feed_forward_proj": "evil-evil-evil"}), (T5, {"num_layers": 2.5}), (T5, {"layer_norm_epsilon": "x"})]
    big += [("scheduler/scheduler_config.json", {"num_train_timesteps": value}) for value in (10**12, -1, "x", 0)]
    big += [("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 100_000})]
    big += [
        ("videogen.json", {name: 10**12}) for name in ("height", "width", "num_frames", "num_inference_steps", "fps")
    ]
    big += [
        ("videogen.json", {"conditions": [1, {}]}),
        ("videogen.json", {"sampler": ["x"]}),
        ("videogen.json", {"fps": True}),
    ]
    for file, values in big:
        shown = str(values) if len(str(values)) < 80 else f"{next(iter(values))}, large"
        yield Attack("T6", f"{file}: {shown}", edited(file, **values))
    for file in (DIT, "videogen.json", "scheduler/scheduler_config.json"):
        for name, data in (
            ("100,000 brackets", "[" * 100_000),
            ("deep objects", '{"a":' * 50_000 + "1" + "}" * 50_000),
            ("64 MB of spaces", b" " * 64 * 2**20),
            ("UTF-16", "{}".encode("utf-16")),
            ("nothing", b""),
            ("a list", "[]"),
            ("an LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ):
            yield Attack("T6", f"{file} holds {name}", written(file, data))

    # T6: headers of safetensors
    headers: list[tuple[str, bytes]] = [
        ("no header", b""),
        ("four bytes", b"\0" * 4),
        ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("a length of 2^63", safetensors({}, length=2**63)),
        ("a length beyond the file", safetensors({}, length=10**6)),
        ("a header of 32 MB", safetensors(b'{"a":"' + b" " * 32 * 2**20 + b'"}', b"")),
        ("100,000 tensors of nothing", safetensors({f"t{i}": tensor(0, 0, (0,)) for i in range(100_000)}, b"")),
        ("brackets", safetensors(b"[" * 100_000)),
        ("overlapping tensors", safetensors({"a": tensor(0, 16), "b": tensor(0, 16)})),
        ("a hole", safetensors({"a": tensor(0, 8, (2,)), "b": tensor(12, 16, (1,))})),
        ("negative places", safetensors({"a": tensor(-16, 0)})),
        ("places beyond the file", safetensors({"a": tensor(0, 2**60, (2**58,))})),
        ("shapes that overflow", safetensors({"a": tensor(0, 16, (2**62, 2**62))})),
        ("a shape that lies", safetensors({"a": tensor(0, 16, (400,))})),
        ("a negative shape", safetensors({"a": tensor(0, 16, (-4,))})),
        ("a shape of 1000 ones", safetensors({"a": tensor(0, 16, (1,) * 1000)})),
        ("an unknown type", safetensors({"a": tensor(0, 16, (4,), "EVIL")})),
        (
            "a name twice",
            safetensors(
                b'{"a":' + json.dumps(tensor(0, 16)).encode() + b',"a":' + json.dumps(tensor(0, 16)).encode() + b"}"
            ),
        ),
        ("metadata that are no texts", safetensors({"__metadata__": {"a": [1]}, "a": tensor(0, 16)})),
        ("no object", safetensors(b"null")),
        ("trailing bytes", safetensors({"a": tensor(0, 16)}, b"\0" * 99)),
        ("a name of 1 MB", safetensors({"x" * 2**20: tensor(0, 16)})),
    ]
    for name, data in headers:
        yield Attack("T6", f"safetensors: {name}", written(WEIGHTS, data))

        if len(data) < 2**20:
            yield Attack("T6", f"a single file: {name}", command("info", lambda p, d=data: p.write("m.safetensors", d)))
            yield Attack(
                "T6", f"a LoRA: {name}", command("lora", "inspect", lambda p, d=data: p.write("l.safetensors", d))
            )
    for ending in (".pt", ".bin", ".safetensors"):
        evil = command("lora", "inspect", lambda p, e=ending: p.write(f"l{e}", p.pickle))
        yield Attack("T1", f"a LoRA as {ending} that is a pickle", evil)

    # F4: damage behind valid headers, seen by the hashes
    yield Attack("F4", "a flipped bit", damaged(flip))
    yield Attack("F4", "a file cut short", damaged(lambda data: data.__delitem__(slice(-50, None))))
    yield Attack("F4", "bytes behind the end", damaged(lambda data: data.extend(b"x")))
    yield Attack("F4", "zeros", damaged(lambda data: data.__setitem__(slice(-4096, None), bytes(4096))))

    # T7, T8: YAML
    for name, text in (
        ("_target_", "_target_: os.system\n"),
        ("a tag", "!!python/object/apply:os.system ['touch {marker}']\n"),
        ("a tag inside", "folder: !!python/object/new:os.system ['touch {marker}']\n"),
        ("a module", "folder: !!python/module:os\n"),
        ("brackets", "[" * 50_000),
        ("deep", "a: " + "[" * 100 + "]" * 100),
        ("no mapping", "- 1\n"),
        ("bytes", "\0\1\2"),
        ("1 MB", "a: " + "x" * 2**20),
        ("aliases", ALIASES),
    ):
        yield Attack(
            "T7" if "tar" in name else "T8",
            f"training file: {name}",
            train(lambda p, t=text: t.replace("{marker}", str(p.marker))),
        )
        config = command(
            "t2v",
            "a",
            "--model",
            "model",
            "--config",
            lambda p, t=text: p.write("c.yaml", t.replace("{marker}", str(p.marker))),
        )
        yield Attack("T7" if "tar" in name else "T8", f"--config: {name}", config)
    for text in ("folder: ${oc.env:VIDEOGEN_SECRET}\n", "folder: ${oc.decode:${oc.env:VIDEOGEN_SECRET}}\n"):
        yield Attack("T8", f"training file: {text.strip()}", train(f"task: vae\n{text}"))
        yield Attack(
            "T8", f"--config: {text.strip()}", command("t2v", "a", "--config", lambda p, t=text: p.write("c.yaml", t))
        )
    yield Attack("T8", "--config of a pipe", command("t2v", "a", "--config", lambda p: p.fifo("c.yaml")))

    # T9: pictures
    yield picture("14000.png", lambda p: png(14000, 14000, rows=100))
    yield picture("60000.png", lambda p: png(60000, 60000, rows=10))
    yield picture("claims.png", lambda p: png(2**31 - 1, 2**31 - 1, rows=1))
    yield picture("8000.png", lambda p: png(8000, 8000, rows=100))
    yield picture("text.png", lambda p: png(64, 48, chunks=text_bomb()), REFUSED, HARMLESS)
    yield picture("zero.png", lambda p: png(0, 0), REFUSED)
    yield picture("one.png", lambda p: png(1, 1), HARMLESS)
    yield picture("line.png", lambda p: png(1, 65535), REFUSED, HARMLESS)
    yield picture("wide.png", lambda p: png(65535, 1), REFUSED, HARMLESS)
    yield picture("cmyk.jpg", lambda p: pillow("JPEG", "CMYK"), HARMLESS)
    yield picture("deep.png", lambda p: pillow("PNG", "I;16"), HARMLESS)
    yield picture("cut.png", lambda p: pillow("PNG")[:-40])
    yield picture("cut.jpg", lambda p: pillow("JPEG", size=(640, 480))[:300])
    yield picture("called.png", lambda p: pillow("JPEG"), HARMLESS)
    yield picture("animated.gif", lambda p: animation(300, 5000), REFUSED, HARMLESS)
    yield picture("empty.png", b"")
    yield picture("svg.png", filled(SVG))
    yield picture("a.svg", filled(SVG))
    yield picture("a.eps", filled(EPS))
    yield picture("eps.png", filled(EPS))
    for kind in ("TIFF", "ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "JPEG2000", "ICNS"):
        yield picture(f"{kind}.png", lambda p, k=kind: pillow(k, size=(64, 64)))
    yield picture("a.psd", b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 60000, 60000, 8, 3))
    yield picture("a.pdf", b"%PDF-1.4\n")
    yield picture("page.html", "<img src='http://127.0.0.1'>")
    yield picture("a.zip", lambda p: archive("zip"), threat="T14")
    yield picture("a.tar.gz", lambda p: archive("tar"), threat="T14")
    yield Attack("T9", "a folder as a picture", request(first_frame=lambda p: p.folder))
    yield Attack("T9", "a pipe as a picture", request(first_frame=lambda p: p.fifo("a.png")))
    yield Attack("T9", "/dev/zero as a picture", request(first_frame="/dev/zero"))

    # T10: clips
    for name, text in (
        ("list.m3u8", M3U8),
        ("list.mp4", M3U8),
        ("a.ffconcat", CONCAT),
        ("concat.mp4", CONCAT),
        ("a.mpd", DASH),
        ("dash.mp4", DASH),
        ("a.sdp", SDP),
        ("sdp.mp4", SDP),
        ("svg.mp4", SVG),
        ("text.mp4", "{secret}"),
    ):
        yield clip(name, filled(text))
    yield clip("bomb.gif", lambda p: animation(300, 5000))
    yield clip("empty.mp4", b"")
    yield clip("cut.mp4", lambda p: video()[:200])
    yield clip("jpeg2000.mov", lambda p: video("jpeg2000", "mov"))
    yield clip("a.zip", lambda p: archive("zip"), threat="T14")
    yield clip("tar.mp4", lambda p: archive("tar"), threat="T14")
    for name in (
        "-i.mp4",
        "clip%d.mp4",
        "a|b.mp4",
        "a\nb.mp4",
        "concat:x.mp4",
        "a:b.mp4",
        "pipe:0.mp4",
        "http:x.mp4",
        "'q'.mp4",
    ):
        yield clip(name, lambda p: video(), HARMLESS)
    yield Attack(
        "T10",
        "a clip of 64 x 48 that is fine",
        request(video=lambda p: p.write("a.mp4", video())),
        (HARMLESS,),
    )
    yield Attack("T10", "/dev/zero as a clip", request(video="/dev/zero"))
    yield Attack("T10", "a pipe as a clip", request(video=lambda p: p.fifo("a.mp4")))
    yield Attack("T10", "info of a playlist", command("info", lambda p: p.write("list.mp4", filled(M3U8)(p))))
    yield Attack("T10", "info of a bomb", command("info", lambda p: p.write("a.gif", animation(300, 5000))))

    # T11: addresses
    for word in (
        "{url}/a.png",
        "http:\\\\127.0.0.1:{port}",
        "file://{secret}",
        "//127.0.0.1/a",
        "<video0>",
        "ftp://127.0.0.1:{port}/a",
        "rtmp://127.0.0.1:{port}/a",
        "tcp://127.0.0.1:{port}",
        "udp://127.0.0.1:{port}",
        "data:image/png;base64,AA",
        "pipe:0",
        "concat:a.mp4|{secret}",
        "subfile,,start,0,end,0,,:{secret}",
        "cache:{url}",
        "x\0y",
        "/" * 5000,
        "a" * 5000,
    ):
        for name in ("first_frame", "video"):
            given = {name: filled(word)}
            yield Attack("T11", f"{name} = {word[:40]!r}", request(**given))
    for name in ("last_frame", "control_video", "mask"):
        yield Attack("T11", f"{name} is an address", request(**{name: filled("{url}/a.png")}))
    yield Attack("T11", "keyframes with an address", request(keyframes=lambda p: {4: f"{p.url}/a.png"}))
    for words in (
        ("info",),
        ("t2v", "a", "--model"),
        ("t2v", "a", "--config"),
        ("train",),
        ("rerun",),
        ("batch",),
        ("extend",),
        ("decode",),
        ("post",),
        ("convert",),
        ("lora", "inspect"),
    ):
        more = ["--out", "out"] if words[0] == "convert" else []
        yield Attack("T11", f"{' '.join(words)} ADDRESS", command(*words, filled("{url}/a"), *more))
    yield Attack("T11", "a prompt from an address", command("t2v", filled("@{url}/prompts.txt")))

    # T13: where clips go
    for path in (
        "a\0b.mp4",
        "a" * 5000 + ".mp4",
        "clip.exe",
        "{folder}/%s.png",
        "{folder}/%0999999999d.png",
        "{folder}/%d%d.png",
        "{folder}/%n.png",
        "{folder}/%(a)s.png",
        "{folder}/%100d.png",
        "http://127.0.0.1/a.mp4x",
    ):
        yield Attack("T13", f"out = {path[:40]!r}", out(path))
    yield Attack("T13", "out is a link to a secret", written_over, (HARMLESS,))

    # T16: tokenizers
    for key, value in (
        ("auto_map", {"AutoTokenizer": ["evil.Evil", None]}),
        ("vocab_file", "/etc/passwd"),
        ("tokenizer_file", "../x"),
        ("trust_remote_code", True),
        ("custom_code", "evil.py"),
    ):
        yield Attack("T16", f"tokenizer_config.json: {key}", edited(TOKENIZER, **{key: value}))
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch x') }}"
    yield Attack("T16", "a chat template in the config", edited(TOKENIZER, chat_template=template), (HARMLESS,))
    yield Attack("T16", "a chat template beside it", written("tokenizer/chat_template.jinja", template), (HARMLESS,))
    yield Attack(
        "T16",
        "a config with auto_map beside it",
        written("tokenizer/config.json", '{"auto_map": {"AutoConfig": "evil.Evil"}}'),
        (HARMLESS,),
    )
    for name, data in (
        ("garbage", "garbage"),
        ("nothing", b""),
        ("brackets", "[" * 50_000),
        ("an LFS pointer", "version https://git-lfs"),
        ("80 MB", b" " * 80 * 2**20),
        ("no model", "{}"),
        ("a pickle", lambda p: p.pickle),
    ):
        yield Attack("T16", f"tokenizer.json holds {name}", written("tokenizer/tokenizer.json", data))
    yield Attack(
        "T16",
        "special tokens that are none",
        edited(TOKENIZER, pad_token={"a": [1]}, eos_token=[5]),
        (REFUSED, HARMLESS),
    )

    # T18: requests that cost
    for name, value in (
        ("num_inference_steps", 10**9),
        ("num_frames", 8 * 10**7 + 1),
        ("height", 16 * 10**6),
        ("width", 16 * 10**6),
        ("guidance_scale", float("inf")),
        ("guidance_scale", float("nan")),
        ("fps", 1e9),
        ("seed", 2**70),
        ("seed", -1),
        ("prompt", "a " * 5_000_000),
        ("prompt", ["a"] * 10**6),
        ("prompt", 5),
        ("negative_prompt", {"a": 1}),
        ("keyframes", {4 * i: "x.png" for i in range(10**5)}),
        ("height", "64"),
        ("num_frames", 1e400),
        ("strength", "x"),
    ):
        yield Attack("T18", f"{name} = {str(value)[:30]}", request(**{name: value}))
    for name, path in (("/dev/zero", "/dev/zero"), ("a folder", "model"), ("nothing", "gone.txt")):
        yield Attack("T18", f"prompts from {name}", command("t2v", f"@{path}", "--model", "model"))
    yield Attack("T18", "prompts from a pipe", command("t2v", lambda p: f"@{p.fifo('prompts')}", "--model", "model"))
    yield Attack(
        "T18", "prompts of 100 MB", command("t2v", lambda p: f"@{p.write('p.txt', b'a' * 10**8)}", "--model", "model")
    )
    yield Attack(
        "T18",
        "prompts of bytes",
        command("t2v", lambda p: f"@{p.write('p.txt', bytes(range(256)))}", "--model", "model"),
    )

    for name, text in (
        ("hostile keys", '{"prompt": "a", "__class__": "os", "on_step": "os.system"}'),
        ("depth", '{"a":' * 50_000),
        ("a path out", '{"prompt": "a", "out": "../../../escaped.mp4"}'),
        ("numbers", '{"prompt": "a", "num_frames": 1e400}'),
        ("no object", "[1]"),
        ("an address", '{"prompt": "a", "first_frame": "http://127.0.0.1/a.png"}'),
    ):
        rows = command("batch", lambda p, t=text: p.write("rows.jsonl", t), "--model", "model")
        yield Attack("T18", f"batch with {name}", rows)
    for name in ("rows.jsonl", "rows.csv", "rows.txt"):
        yield Attack(
            "T18", f"batch of a pipe {name}", command("batch", lambda p, n=name: p.fifo(n), "--model", "model")
        )
        large = command("batch", lambda p, n=name: p.write(n, b"a" * 3 * 10**7), "--model", "model")
        yield Attack("T18", f"batch of 30 MB in {name}", large)

    # T19: recipes inside clips, and texts that steer a terminal
    steer = "\x1b[31m\x1b]0;evil\x07\r\u202eabc"
    yield Attack(
        "T19",
        "info of a recipe that steers",
        command("info", recipe(json.dumps({"prompt": steer, steer: 1}))),
        (HARMLESS,),
    )
    yield Attack("T19", "info of a model name that steers", command("info", f"x{steer}"))
    yield Attack("T19", "an option that steers", command("t2v", "a", f"--{steer}"))
    for name, text in (
        ("steers", json.dumps({"prompt": steer, "model": steer})),
        (
            "hostile keys",
            json.dumps({"__class__": "os", "on_step": "os.system", "out": "/etc/passwd", "self": 1, "prompt": "a"}),
        ),
        ("huge numbers", '{"prompt": "a", "num_frames": 1e400, "seed": 1' + "0" * 4000 + "}"),
        ("depth", '{"a":' * 50_000 + "1" + "}" * 50_000),
        ("a list", "[1]"),
        ("no JSON", "os.system"),
        (
            "addresses",
            json.dumps({"prompt": "a", "first_frame": "http://127.0.0.1/a.png", "model": "http://127.0.0.1/x"}),
        ),
        ("wrong types", json.dumps({"prompt": {"a": 1}, "settings": [1], "height": "x", "model": 7})),
        ("a million frames", '{"prompt": "a", "num_frames": 8000001}'),
    ):
        yield Attack("T19", f"info of a recipe with {name}", command("info", recipe(text)), (HARMLESS, REFUSED))
        yield Attack("T19", f"rerun of a recipe with {name}", command("rerun", recipe(text)))

    def naming(place: Place) -> Path:
        return recipe(json.dumps({"prompt": "a", "first_frame": str(place.secret)}))(place)

    yield Attack("T19", "rerun of a recipe that names a file here", command("rerun", naming))


def piped(name: str) -> Callable[[Place], Callable[[], Any]]:
    def prepare(place: Place) -> Callable[[], Any]:
        place.fifo(f"model/{name}")
        return load(place)

    return prepare


def sampled(**changes: Any) -> Callable[[Place], Callable[[], Any]]:
    """The scheduler's config, and the scheduler made of it."""

    def prepare(place: Place) -> Callable[[], Any]:
        from videogen.diffusion.samplers import load_scheduler
        from videogen.weights.card import read_card

        place.edit("scheduler/scheduler_config.json", **changes)
        return lambda: load_scheduler(read_card(place.model).scheduler)

    return prepare


# ---- running them ---------------------------------------------------------------------------------------------------

EVIL = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.getaddrinfo",
    "pickle.find_class",
)
WATCH: list[str] = []
LONGEST = 30  # seconds until an attack is broken off
SECRET: list[str] = []


def watch(event: str, args: tuple) -> None:
    """Python's audit hook."""
    if event in EVIL or (event == "open" and SECRET and str(args[0]) == SECRET[0]):
        WATCH.append(f"{event} {args}"[:200])


def memory(name: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its highest since `/proc/self/clear_refs`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def attempt(attack: Attack, place: Place, listener: socket.socket) -> dict[str, Any]:
    from videogen.errors import VideogenError

    call = attack.prepare(place)
    spawn = ("subprocess.Popen", "os.posix_spawn", "os.fork") if attack.child else ()
    Path("/proc/self/clear_refs").write_text("5")
    WATCH.clear()
    before, started, spent = memory("VmRSS"), time.perf_counter(), time.process_time()
    text = ""
    signal.alarm(LONGEST)
    try:
        call()
        outcome = HARMLESS
    except VideogenError as error:
        outcome, text = REFUSED, str(error)
    except BaseException as error:
        outcome, text = type(error).__name__, str(error)[:300]
    finally:
        signal.alarm(0)
    spent = time.process_time() - spent
    seconds, extra, events = (
        time.perf_counter() - started,
        memory("VmHWM") - before,
        [event for event in WATCH if not event.startswith(spawn)],
    )
    try:
        listener.accept()[0].close()
        events.append("a connection came")
    except BlockingIOError:
        pass
    if place.marker.exists():
        events.append("the marker was written")
    if place.secret.read_text() != json.dumps({"secret": "xyzzy plugh"}):
        events.append("the secret was changed")
    if "xyzzy plugh" in text:
        events.append("the secret was told")
    row = {
        "threat": attack.threat,
        "name": attack.name,
        "outcome": outcome,
        "expected": attack.expect,
        "child": attack.child,
    }
    return row | {
        "seconds": round(seconds, 3),
        "cpu": round(spent, 3),
        "megabytes": round(extra, 1),
        "events": events,
        "text": text[:600],
    }


def main(folder: Path, only: str = "") -> None:
    """Prepare, attempt and print them all, or those with `only` in their name."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"no answer in {LONGEST} s")

    signal.signal(signal.SIGALRM, too_long)
    os.environ |= {"HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(folder / "hub"), "VIDEOGEN_SECRET": "xyzzy plugh"}
    import torch
    import transformers  # noqa: F401

    import videogen.training.run
    from videogen.testing import tiny_pipeline

    torch.set_num_threads(1)
    good = folder / "good"
    tiny_pipeline().save(good)
    shutil.copy(good / "videogen.json", folder / "videogen.json")  # with hashes
    facts = json.loads((good / "videogen.json").read_text())
    (good / "videogen.json").write_text(json.dumps({k: v for k, v in facts.items() if k not in ("sha256", "bytes")}))
    videogen.load(str(good), device="cpu")  # what is imported late is imported now

    secret = folder / "secret.json"
    secret.write_text(json.dumps({"secret": "xyzzy plugh"}))
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    sys.addaudithook(watch)
    home = folder / "control"
    place = Place(home, home / "marker", secret, listener.getsockname()[1])
    home.mkdir()
    SECRET[:] = [str(secret)]
    row = attempt(Attack("T0", "what must be noticed", evil), place, listener)
    for sign in ("os.system", "pickle.find_class", "socket.connect", "open", "connection came", "marker"):
        assert any(sign in event for event in row["events"]), (sign, row)
    for number, attack in enumerate(attack for attack in attacks() if only in attack.name):
        home = folder / f"a{number}"
        shutil.copytree(good, home / "model")
        SECRET[:] = [str(secret)]
        place = Place(home, home / "marker", secret, listener.getsockname()[1])
        print(json.dumps(attempt(attack, place, listener)), flush=True)
        shutil.rmtree(home)


def failed(row: dict[str, Any]) -> str:
    """What is wrong with the outcome of an attack, or nothing. A child process imports torch before it reads."""
    wrong = [] if row["outcome"] in row["expected"] else [row["outcome"]]
    wrong += [f"{row['cpu']} s"] if row["cpu"] > 2 else []
    wrong += [f"{row['seconds']} s on the clock"] if row["seconds"] >= LONGEST else []
    wrong += [f"{row['megabytes']} MB"] if row["megabytes"] > 200 else []
    wrong += row["events"]
    return f"{row['threat']} {row['name']}: {', '.join(wrong)} ({row['text'][:200]})" if wrong else ""


def table(rows: list[dict[str, Any]]) -> str:
    """Of docs/security.md: per threat how many attacks were tried and stopped, the slowest, the largest."""
    lines = [
        "| threat | tried | stopped | refused | without effect | most CPU seconds | most MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for threat in [*sorted({row["threat"] for row in rows}, key=lambda t: (t[0] != "T", int(t[1:]))), "all"]:
        own = [row for row in rows if threat in (row["threat"], "all")]
        count = [sum(row["outcome"] == kind for row in own) for kind in (REFUSED, HARMLESS)]
        stopped = sum(not failed(row) for row in own)
        most = [max(row[name] for row in own) for name in ("cpu", "megabytes")]
        lines.append(f"| {threat} | {len(own)} | {stopped} | {count[0]} | {count[1]} | {most[0]:.2f} | {most[1]:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    import tempfile

    if sys.argv[1:2] == ["--table"]:
        lines = Path(sys.argv[2]).read_text().splitlines()
        print(table([json.loads(line) for line in lines]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name), *sys.argv[1:])
