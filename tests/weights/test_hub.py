"""Where models come from: a path, the cache, then the network; the files of one variant, their size said before.

The Hub here is a dict, the cache a real one on disk in the Hub's own layout, and a socket that opens is a failure.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest

from videogen.cli import main
from videogen.errors import FileError, ModelNotFound
from videogen.weights import hub
from videogen.weights.card import read_card
from videogen.weights.hub import find_model, in_cache, parse_name, select, weight_names

NAME = "zai-org/CogVideoX-2b"
DIT = "transformer/diffusion_pytorch_model"
CONFIGS = {
    "model_index.json": {"_class_name": "CogVideoXPipeline"},
    "transformer/config.json": {},
    "vae/config.json": {},
    "text_encoder/config.json": {"architectures": ["T5EncoderModel"]},
    "scheduler/scheduler_config.json": {"_class_name": "CogVideoXDDIMScheduler"},
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"},
}
SMALL = {name: json.dumps(values).encode() for name, values in CONFIGS.items()} | {"tokenizer/spiece.model": b"words"}
WEIGHTS = {
    f"{DIT}.safetensors": b"dit",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
    "text_encoder/model-00001-of-00002.safetensors": b"t5 one",
    "text_encoder/model-00002-of-00002.safetensors": b"t5 two",
    "text_encoder/model.safetensors.index.json": b"{}",
}
OTHERS = {
    f"{DIT}.bin": b"pickle",
    f"{DIT}.fp16.safetensors": b"half",
    "text_encoder/model.fp16.safetensors": b"half",
    "transformer/evil.py": b"import os",
    "pipeline.py": b"import os",
    "README.md": b"text",
    "model.safetensors": b"all in one",
    "tokenizer/chat_template.jinja": b"{{ x }}",
}


class Hub:
    """Repositories as dicts of files; `asked` and `fetched` say what went over the wire."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.files, self.sizes = cache, {NAME: SMALL | WEIGHTS | OTHERS}, {}
        self.asked: list[tuple] = []
        self.fetched: list[str] = []
        self.error: Exception | None = None

    def commit(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()

    def model_info(self, name: str, *, revision=None, files_metadata=False, timeout=None):
        self.asked.append((name, revision))
        if self.error:
            raise self.error
        siblings = [
            SimpleNamespace(rfilename=file, size=self.sizes.get(file, len(data)))
            for file, data in self.files[name].items()
        ]
        card = SimpleNamespace(license="other", license_name="a licence\x1b[31m")
        return SimpleNamespace(siblings=siblings, sha=self.commit(name), card_data=card)

    def snapshot_download(self, name: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert revision == self.commit(name), "files are fetched by commit, not by a name that moves"
        root = self.cache / f"models--{name.replace('/', '--')}"
        for file, data in self.files[name].items():
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                self.fetched.append(file)
                blob = root / "blobs" / hashlib.sha256(data).hexdigest()
                link = root / "snapshots" / revision / file
                for path in (blob, link):
                    path.parent.mkdir(parents=True, exist_ok=True)
                blob.write_bytes(data)
                link.symlink_to(blob)
        return str(root / "snapshots" / revision)


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty cache, the network allowed by the settings, and no socket."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "hub"


@pytest.fixture
def net(offline, monkeypatch) -> Hub:
    import huggingface_hub

    net = Hub(offline)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: net)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", net.snapshot_download)
    return net


# ---- which files ----------------------------------------------------------------------------------------------------


def test_exactly_the_files_of_one_variant_are_chosen():
    files, missing = select([*SMALL, *WEIGHTS, *OTHERS])
    assert (set(files), missing) == (SMALL.keys() | WEIGHTS.keys(), [])
    assert set(select([*SMALL, *WEIGHTS, *OTHERS], weights=False)[0]) == set(SMALL)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "model-00001-of-00001.safetensors", "model.safetensors.index.json"], [0]),
        (["model.fp16.safetensors", "pytorch_model.bin"], [0]),
        (["model.bf16-00001-of-00001.safetensors", "model.safetensors.index.bf16.json"], [1, 0]),
        (["model.bf16-00001-of-00001.safetensors", "model.bf16.safetensors.index.json"], [1, 0]),
        (["model.safetensors", "model.fp16-00001-of-00002.safetensors"], [0]),
    ],
)
def test_plain_safetensors_else_the_only_variant_and_nothing_twice(names, chosen):
    assert weight_names(names, "model") == ([names[i] for i in chosen], [])


def test_what_is_not_complete_is_named():
    names = [*SMALL, *WEIGHTS]
    for gone in ("text_encoder/model-00001-of-00002.safetensors", f"{DIT}.safetensors", "vae/config.json"):
        assert select([n for n in names if n != gone])[1] == [gone]
    assert "index" in select([n for n in names if "index" not in n or n == "model_index.json"])[1][0]
    assert weight_names(["pytorch_model.bin"], "model") == ([], ["model.safetensors"])
    with pytest.raises(ModelNotFound, match="bf16, fp16"):
        weight_names(["model.fp16.safetensors", "model.bf16.safetensors"], "model")
    many = weight_names(["m-00001-of-99999.safetensors"], "m")[1]
    assert len(many) < 10_001, "a name may claim any number of shards"


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "revision"),
    [
        ("CogVideoX-2b", NAME, None),
        ("cogvideox1.5-5b-i2v@main", "zai-org/CogVideoX1.5-5B-I2V", "main"),
        ("hf://a/b", "a/b", None),
        ("a/b.c@refs/pr/7", "a/b.c", "refs/pr/7"),
    ],
)
def test_names_and_aliases(text, name, revision):
    assert parse_name(text) == (name, revision)


@pytest.mark.parametrize(
    "text",
    [
        *("a", "a/b/c", "../b", "a/..", "a/b@", "a/b@../../x", "a/b@x/../y", "a/b@--flag", "é/b", "a/" + "b" * 200),
        *("file:///x/y", "a\nb/c", "a/b\0", "x" * 5000, "https://example.org/a"),
    ],
)
def test_names_that_are_none(text, offline):
    with pytest.raises(ModelNotFound) as caught:
        find_model(text)
    assert len(str(caught.value)) < 600


def test_hints_say_what_was_meant():
    for text, hint in (("https://huggingface.co/zai-org/CogVideoX-5b/tree/main", "zai-org/CogVideoX-5b"),
                       ("CogVideoX-2B-", "did you mean zai-org/CogVideoX-2b"), ("a.b", "tiny")):  # fmt: skip
        with pytest.raises(ModelNotFound) as caught:
            parse_name(text)
        assert hint in caught.value.hint


# ---- path, cache, network -------------------------------------------------------------------------------------------


def test_a_folder_comes_before_the_cache_and_that_before_the_network(net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = find_model(NAME)
    assert first == net.cache / "models--zai-org--CogVideoX-2b" / "snapshots" / net.commit(NAME)
    assert len(net.asked) == 1
    assert set(net.fetched) == SMALL.keys() | WEIGHTS.keys(), "not a byte more than is read"
    assert find_model("cogvideox-2b") == find_model(NAME, offline=True) == first
    assert len(net.asked) == 1, "what is complete in the cache is not asked for"
    (tmp_path / NAME).mkdir(parents=True)
    assert find_model(NAME) == Path(NAME)


def test_the_reference_that_is_written_is_the_hubs_own(net):
    from huggingface_hub import _snapshot_download

    folder = find_model(NAME)
    found = _snapshot_download.snapshot_download(NAME, local_files_only=True, cache_dir=net.cache)
    assert Path(found) == folder
    assert read_card(folder).name == NAME


def test_small_files_first_then_the_rest_with_its_size_and_licence(net, capsys):
    net.sizes = dict.fromkeys(WEIGHTS, 10**9)
    net.sizes["text_encoder/model.safetensors.index.json"] = 20_000
    card = read_card(find_model(NAME, weights=False))
    assert (card.licence, set(net.fetched)) == ("Apache-2.0", set(SMALL))
    assert capsys.readouterr() == ("", "")
    find_model(NAME)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"fetching {NAME}: 5 files, 4.0 GB, into {net.cache}" in err
    assert "free)" in err
    assert "licence: Apache-2.0" in err
    assert sorted(net.fetched) == sorted([*SMALL, *WEIGHTS]), "each file once"


def test_the_licence_of_a_model_nobody_listed_is_what_its_page_says(net, capsys):
    net.files["some/body"] = SMALL | WEIGHTS
    find_model("some/body")
    assert "licence: a licence?" in capsys.readouterr().err, "and it does not steer the terminal"


def test_a_disk_that_is_too_small_is_refused_before_a_byte(net, monkeypatch):
    net.sizes = dict.fromkeys(WEIGHTS, 10**9)
    find_model(NAME, weights=False)
    before = list(net.fetched)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * 10**9))
    with pytest.raises(FileError, match=r"5\.0 GB") as caught:
        find_model(NAME)
    assert net.fetched == before
    assert "HF_HUB_CACHE" in caught.value.hint


def test_a_revision_is_its_own_snapshot(net):
    old = find_model(NAME)
    net.files[NAME] = {**net.files[NAME], "vae/config.json": b'{"scaling_factor": 0.7}'}
    assert find_model(NAME) == old, "the cache is used as it is"
    new = find_model(f"{NAME}@v2")
    assert new != old
    assert (net.cache / "models--zai-org--CogVideoX-2b/refs/v2").read_text() == new.name
    assert find_model(NAME, revision="v2", offline=True) == find_model(NAME, revision=new.name, offline=True) == new
    assert read_card(new).vae.scaling_factor == 0.7


def test_a_former_organisations_cache_serves(net):
    net.files["THUDM/CogVideoX-2b"] = net.files[NAME]
    find_model("THUDM/CogVideoX-2b")
    assert in_cache(NAME)
    assert find_model(NAME, offline=True).parts[-3] == "models--THUDM--CogVideoX-2b"


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_offline_never_asks_and_says_what_to_do(net, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="not in the local cache") as caught:
        find_model(f"{NAME}@v1", offline=how == "flag")
    text = str(caught.value)
    assert str(net.cache / "models--zai-org--CogVideoX-2b") in text
    assert f"hf download {NAME} --revision v1 --include '*.json'" in text
    assert "HF_HUB_CACHE" in text
    assert in_cache(NAME) is None
    assert net.asked == []


def test_half_a_download_is_no_model(net):
    folder = find_model(NAME)
    (folder / f"{DIT}.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"lacks 1 files: transformer/diffusion_pytorch_model\.safetensors"):
        find_model(NAME, offline=True)
    assert find_model(NAME, weights=False, offline=True) == folder
    net.fetched.clear()
    assert find_model(NAME) == folder
    assert net.fetched == [f"{DIT}.safetensors"]


def test_what_cannot_be_opened_is_not_fetched(net):
    net.files["a/pickles"] = SMALL | {f"{part}/{stem}.bin": b"" for part, stem in hub.STEMS.items()}
    with pytest.raises(ModelNotFound, match="only as pickles"):
        find_model("a/pickles")
    net.files["a/other"] = {"model.safetensors": b"", "README.md": b""}
    with pytest.raises(ModelNotFound, match="no model that can be opened"):
        find_model("a/other")
    assert net.fetched == []


def test_errors_of_the_network_have_a_hint(net):
    from huggingface_hub import errors

    for kind, hint in ((ConnectionError, "hf download"), (errors.GatedRepoError, "hf auth login")):
        net.error = kind.__new__(kind)
        with pytest.raises(ModelNotFound) as caught:
            find_model(NAME)
        assert hint in caught.value.hint


def test_no_socket_opens_for_a_model_that_is_there_or_refused(offline):
    find_model("tiny")
    with pytest.raises(ModelNotFound):
        find_model("no/thing", offline=True)


def test_models_list_and_pull(net, capsys):
    assert main(["models", "list", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = next(row for row in rows if row["name"] == NAME)
    assert found["cached"] == "no"
    assert [found[name] for name in ("width", "height", "num_frames", "fps")] == [720, 480, 49, 8], "numbers"
    assert main(["models", "pull", "CogVideoX-2b"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_dir()
    main(["models", "list"])
    assert "cached: yes" in next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{NAME} "))
    net.files[NAME] = {**net.files[NAME], "vae/config.json": b'{"scaling_factor": 0.7}'}
    main(["models", "pull", NAME])
    assert read_card(find_model(NAME, offline=True)).vae.scaling_factor == 0.7, "pull renews"


def test_info_shows_the_licence(net, capsys):
    assert main(["info", "CogVideoX-2b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["licence"] == "Apache-2.0"
    assert set(net.fetched) == set(SMALL)
