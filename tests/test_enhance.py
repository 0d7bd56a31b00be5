"""Prompts made richer: the same words for the same seed, nothing sent that was not asked for, errors in three lines."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from videogen.cli import main
from videogen.enhance import KEY, LONGEST, Endpoint, Enhancer, LocalChat, Template, enhancer
from videogen.errors import InvalidRequest, ModelNotFound, RemoteError
from videogen.weights.convert import convert
from videogen.weights.hub import find_model


def test_the_template_adds_what_is_not_said_and_keeps_what_is():
    prompt = "a cat on the grass"
    texts = {Template()(prompt, seed=seed) for seed in range(20)}
    assert len(texts) > 10
    assert all(prompt in text for text in texts)
    assert Template()(prompt, seed=7) == enhancer()(prompt, seed=7), "deterministic"
    for aspect, phrases in Template().aspects.items():
        assert sum(any(p.lower() in text.lower() for p in phrases["choices"]) for text in texts) == 20, aspect
    full = "Close-up of a cat at night, moving, calm."
    assert Template()(full) == full
    one_less = Template()("a cat at night, moving, calm", seed=3)
    assert any(choice in one_less for choice in Template().aspects["camera"]["choices"])


def test_kinds_of_enhancer(tmp_path):
    for how in ("template", "http://localhost:9/v1"):
        assert isinstance(enhancer(how), Enhancer)
    for how in ("tmplate", "a cat", "", "ftp://x"):
        with pytest.raises(InvalidRequest, match="no enhancer") as caught:
            enhancer(how)
        assert "=template" in caught.value.hint
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ModelNotFound):
            enhancer(f"local:{folder}")


# ---- an endpoint ----------------------------------------------------------------------------------------------------


class Server(HTTPServer):
    answer: tuple[int, bytes] = (200, b"")
    asked: list[tuple[str, dict, dict]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        status, data = self.server.answer
        self.send_response(status)
        if status == 302:
            self.send_header("Location", data.decode())
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def said(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def address(server: Server, tail: str = "/v1") -> str:
    return f"http://127.0.0.1:{server.server_port}{tail}"


def test_an_endpoint_is_asked_once_and_told_only_the_prompt(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "somebody else's")
    server.answer = 200, said('<think>hm</think> "A cat,\n  in soft light."')
    assert enhancer(address(server, "/v1#small-chat"))("a cat", seed=4) == "A cat, in soft light."
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert (body["model"], body["seed"], body["messages"][-1]) == (
        "small-chat",
        4,
        {"role": "user", "content": "a cat"},
    )
    monkeypatch.setenv(KEY, "secret")
    Endpoint(address(server, "/v1/chat/completions"))("a cat")
    path, headers, body = server.asked[1]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
    assert "model" not in body


@pytest.mark.parametrize(
    "answer",
    [
        (401, b"{}"),
        (500, b""),
        (200, b"<html>"),
        (200, b"{}"),
        (200, said("")),
        (200, said(None)),
        (200, said([])),
        (200, b"[" * 5000),
        (302, b"http://127.0.0.1:9/stolen"),
    ],
)
def test_a_bad_answer_is_a_remote_error(server, monkeypatch, answer):
    monkeypatch.setenv(KEY, "secret")
    server.answer = answer
    with pytest.raises(RemoteError) as caught:
        Endpoint(address(server))("a cat")
    assert caught.value.exit_code == 7
    assert caught.value.hint
    assert "secret" not in str(caught.value)
    assert len(server.asked) == 1


def test_no_answer_is_a_remote_error(server, monkeypatch):
    monkeypatch.setattr("videogen.enhance.TIMEOUT", 0.2)
    with pytest.raises(RemoteError):
        Endpoint("http://127.0.0.1:9/v1")("a cat")
    server.answer = 200, said("x" * 10_000)
    assert len(Endpoint(address(server))("a cat")) == LONGEST


# ---- a local model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of random weights: it talks nonsense, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from videogen.models.text import word_tokenizer

    words = ["a", "cat", "red", "light", "soft", "camera", "slow", "the", "on", "grass", ":", ".", ","]
    tokenizer = word_tokenizer(words, 512)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("models") / "chat"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_chat_model(chat):
    text = LocalChat(chat)("a cat")
    assert text
    assert text == LocalChat(chat)("a cat", seed=9), "greedy: the seed does not matter"
    assert LocalChat(chat).name == "local:chat", "no path"


def test_code_and_pickles_of_a_chat_model_are_not_opened(chat, tmp_path):
    import shutil

    folder = tmp_path / "chat"
    shutil.copytree(chat, folder)
    config = json.loads((folder / "config.json").read_text())
    marker = tmp_path / "marker"
    config |= {"model_type": "mine", "auto_map": {k: "mine.X" for k in ("AutoConfig", "AutoModelForCausalLM")}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass X: pass\n")
    with pytest.raises(ModelNotFound):
        LocalChat(folder)("a cat")
    assert not marker.exists()
    for path in folder.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(ModelNotFound, match="no chat model"):
        LocalChat(folder)


# ---- the command line -----------------------------------------------------------------------------------------------


def test_videogen_prompt(capsys, server):
    assert main(["prompt", "a cat", "a dog", "--seed", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [Template()("a cat", seed=3), Template()("a dog", seed=3)]
    assert main(["prompt", "a cat", "--enhance", "none", "--style", "oil-painting", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["prompt"].startswith("a cat, oil painting")
    assert row["original_prompt"] == "a cat"
    assert row["negative_prompt"]
    long = "a small red circle moves right on a navy background and " * 6
    assert main(["prompt", long, "--enhance", "none", "--model", "tiny", "--json"]) == 0
    row, said_to_people = map(str.strip, capsys.readouterr())
    facts = json.loads(row)
    assert (facts["tokens"], facts["most_tokens"]) == (len(long.split()) + 1, 48)
    assert long.strip().endswith(facts["cut"].strip())
    assert "it does not see" in said_to_people
    assert main(["prompt", "a cat", "--enhance", address(server)]) == 7
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split(":")[0].strip() for line in lines] == ["error", "why", "try"]


def test_tokens_are_counted_for_a_single_file_by_its_bases_tokenizer(tmp_path, monkeypatch, capsys):
    file = convert("tiny", tmp_path / "one.safetensors", to="single")
    monkeypatch.setattr("videogen.weights.single.find_base", lambda *_, **__: find_model("tiny"))
    assert main(["prompt", "a red circle", "--enhance", "none", "--model", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4
