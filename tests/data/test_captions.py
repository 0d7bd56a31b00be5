"""Captions by models that see: asked once for each clip, kept beside those that were there, and tidied."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image

from videogen.data.captions import KEY, Captioner, Endpoint, caption_source, captioner, spread, tidy
from videogen.data.sources import samples
from videogen.data.video import write_video
from videogen.data.world import caption, clip
from videogen.data.world.caption import STYLE_WORDS
from videogen.errors import InvalidRequest, ModelNotFound, RemoteError
from videogen.evaluation.describe import WorldCaptioner, describe


@pytest.fixture
def source(tmp_path):
    for index in range(3):
        write_video(tmp_path / "clips" / f"{index}.mp4", clip(index, num_frames=9, height=32, width=32)[1], 8)
    (tmp_path / "clips" / "0.txt").write_text("given")
    return tmp_path / "clips"


class Counting:
    name, shown = "counting", 4

    def __init__(self, fail_at=()):
        self.calls, self.fail_at = 0, fail_at

    def __call__(self, frames, fps):
        self.calls += 1
        assert (len(frames), fps) == (4, 8)
        if self.calls in self.fail_at:
            raise RemoteError("no answer.")
        return f"The video shows caption {self.calls}."


def test_each_clip_is_captioned_once_and_both_captions_stay(source):
    out, by = source / "captions.jsonl", Counting(fail_at=(2,))
    assert isinstance(by, Captioner)
    assert caption_source(source, by, out, weight=19) == {
        "captioned": 2,
        "there already": 0,
        "failed": 1,
        "dropped": 0,
    }
    assert caption_source(source, by, out, weight=19)["captioned"] == 1
    told = [[(one.text, one.source, one.weight) for one in sample.captions] for sample in samples(source)]
    assert told == [
        [("given", "given", 1), ("Caption 1.", "counting", 19)],
        [("Caption 4.", "counting", 19)],
        [("Caption 3.", "counting", 19)],
    ]
    line = json.loads(out.read_text().splitlines()[0])
    assert set(line) == {"name", "sha256", "text", "source", "weight", "instruction"}
    (source / "0.mp4").write_bytes((source / "1.mp4").read_bytes())  # another clip of the same name
    assert caption_source(source, by, out)["captioned"] == 1
    assert next(iter(samples(source))).captions[1].text == "Caption 5."


def test_an_endpoint_that_is_down_ends_the_run(source):
    with pytest.raises(RemoteError):
        caption_source(source, Counting(fail_at=range(1, 99)), source / "captions.jsonl")


@pytest.fixture
def server():
    """A chat endpoint that says how many pictures it got and how large they were."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            if self.path.startswith("/moved"):
                self.send_response(302)
                self.send_header("Location", "/v1/chat/completions")
                self.end_headers()
                return
            urls = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
            sizes = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]
            answer = {
                "choices": [{"message": {"content": f"<think>hm</think>In this video, {len(urls)} of {sizes[0]}."}}]
            }
            data = json.dumps(answer if "empty" not in self.path else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            server.asked.append((self.path, self.headers.get("Authorization"), {}))
            self.send_error(404)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_sees_frames_and_nothing_else(server, source, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    address = f"http://127.0.0.1:{server.server_port}"
    by = captioner(f"{address}/v1#some-model")
    assert isinstance(by, Captioner)
    big = [np.zeros((400, 1000, 3), np.uint8)] * 8
    assert tidy(by(big, 8.0), by.name) == "8 of (512, 205)."
    path, key, body = server.asked[0]
    assert (path, key, body["model"], by.name) == ("/v1/chat/completions", "Bearer secret", "some-model", "some-model")
    assert "127.0.0.1" not in json.dumps(body)
    for bad in ("moved", "empty"):
        with pytest.raises(RemoteError):
            Endpoint(f"{address}/{bad}")(big[:1], None)
    assert [path for path, _, _ in server.asked[1:]] == ["/moved/chat/completions", "/empty/chat/completions"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("The video shows a cat.", "A cat."),
        ("In this video, we can see a cat\nthat\x1b[31m runs", "A cat that [31m runs"),
        ('"The clip begins with a cat"', "A cat"),
        ("A video of the sea", "A video of the sea"),
        ("Videos show cats", "Videos show cats"),
    ],
)
def test_openers_go_and_words_stay(said, kept):
    assert tidy(said, "x") == kept
    with pytest.raises(RemoteError, match="no caption"):
        tidy("<think>a</think> ", "x")


@pytest.mark.parametrize("count", [1, 3, 8, 9, 33, 100, 1000])
def test_frames_are_spread_over_the_clip(count):
    frames = spread((np.full((1, 1, 3), k % 256, np.uint8) for k in range(count)), 8)
    assert len(frames) == min(count, 8)
    places = [int(frame[0, 0, 0]) for frame in frames]
    if 8 <= count <= 256:
        assert places[0] == 0
        assert np.ptp(np.diff(places)) <= max(2, count // 16)
        assert places[-1] >= 0.85 * (count - 1)


def test_the_world_is_described_by_rules():
    """From pixels alone the canonical caption, of one object always."""
    by = WorldCaptioner()
    assert isinstance(by, Captioner)
    for index in range(12):
        scene, frames, _ = clip(index, seed=4, checkered=0.5, camera=0.5)
        assert by(list((frames * 255).round().astype(np.uint8)), 8.0) == caption(scene)
    scene, frames, _ = clip(0, seed=4, style=1.0)  # whose colours are gone
    words = STYLE_WORDS[scene.style][0]
    assert describe((frames * 255).round().astype(np.uint8)) == f"an object, {words}"


def test_what_is_no_captioner_is_said(tmp_path):
    with pytest.raises(InvalidRequest, match="no captioner 'gpt'"):
        captioner("gpt")
    with pytest.raises(ModelNotFound, match="no vision-language model"):
        captioner(f"local:{tmp_path}")


@pytest.mark.slow
def test_any_model_of_transformers(tmp_path):
    """A LLaVA of random weights, saved and opened as any other."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<unk>", "<pad>", "</s>", "<image>", *"abcdefghij"]
    core = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}",
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=2048, **sizes),
        image_token_id=3,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    by = captioner(f"local:{tmp_path}")
    frames = [(frame * 255).astype(np.uint8) for frame in clip(0, num_frames=8)[1]]
    text = tidy(by(frames, 8.0), by.name)
    assert set(text.lower().split()) <= set("abcdefghij")
    assert tidy(by(frames, 8.0), by.name) == text
