"""Headers of safetensors files: read as safetensors reads them, and everything that is wrong is said, quickly."""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import time
from contextlib import nullcontext

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from videogen.errors import ModelNotFound
from videogen.weights.guard import HEADER_LIMIT
from videogen.weights.header import TENSOR_LIMIT, read_header, read_shapes

GOOD = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write(path, header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_reads_what_safetensors_reads(tmp_path):
    path = tmp_path / "a.safetensors"
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.uint8]
    state = {f"t{i}": torch.zeros(i, 3).to(dtype) for i, dtype in enumerate(dtypes)} | {"scalar": torch.tensor(2.0)}
    save_file(state, path, metadata={"format": "pt"})
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        assert header.shapes == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {n: e.dtype for n, e in header.tensors.items()} == {
            n: file.get_slice(n).get_dtype()
            for n in file.keys()  # noqa: SIM118
        }
    assert header.metadata == {"format": "pt"}


def entry(**changes):
    return {"a": GOOD["a"] | changes}


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
TWO = {"b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}
BAD = {
    "no object": ([1], 8),
    "no json": (b"{" * 100, 8),
    "deep json": (b"[" * 200_000, 8),
    "a name twice": (TWICE, 8),
    "not utf-8": (b'{"\xff": 1}', 8),
    "unknown dtype": (entry(dtype="F31"), 8),
    "dtype no text": (entry(dtype=3), 8),
    "negative shape": (entry(shape=[-2]), 8),
    "shape of floats": (entry(shape=[2.0]), 8),
    "shape of truths": (entry(shape=[True, True]), 8),
    "huge shape": (entry(shape=[2**62, 2**62]), 8),
    "huge number": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,8]}}', 8),
    "many axes": (entry(shape=[1] * 100), 8),
    "bytes do not fit the shape": (entry(shape=[3]), 8),
    "offsets beyond the file": (entry(shape=[4], data_offsets=[0, 16]), 8),
    "offsets backwards": (entry(data_offsets=[8, 0]), 8),
    "a gap": (entry(data_offsets=[8, 16]), 16),
    "bytes left over": (GOOD, 9),
    "shared bytes": (GOOD | TWO, 8),
    "strange keys": ({"a": {"dtype": "F32"}}, 8),
    "control characters": ({"a\x1b[2J": GOOD["a"]}, 8),
    "metadata no texts": ({"__metadata__": {"a": {}}} | GOOD, 8),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused(tmp_path, name):
    header, size = BAD[name]
    path = write(tmp_path / "a.safetensors", header, b"\0" * size)
    with pytest.raises(ModelNotFound, match="damaged or cut short") as error:
        read_header(path)
    assert len(str(error.value).splitlines()) == 3
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("length", [2**63, 2**31, HEADER_LIMIT + 1, 200])
def test_a_header_is_not_believed_about_its_length(tmp_path, length):
    path = write(tmp_path / "a.safetensors", GOOD, length=length)
    with pytest.raises(ModelNotFound, match="with a header said to have"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_a_file_that_ends_early_is_refused(tmp_path, size):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelNotFound):
        read_header(path)


@pytest.mark.parametrize("count", [TENSOR_LIMIT, 35_000])
def test_the_largest_header_takes_little_memory_and_time(tmp_path, count):
    """As many tensors as are believed, and as many as the header's bytes allow, which are refused."""
    entries = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    path = write(tmp_path / "a.safetensors", b"{" + entries.encode() + b"}", b"")
    refused = pytest.raises(ModelNotFound, match="names 35000 tensors") if count > TENSOR_LIMIT else nullcontext()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with refused:
        assert len(read_header(path).tensors) == count
    assert time.process_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


def test_pipes_and_pointers_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ModelNotFound, match="no plain file"):
        read_header(tmp_path / "pipe.safetensors")
    (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelNotFound, match="git lfs pull"):
        read_header(tmp_path / "lfs.safetensors")


def test_a_name_in_two_shards_is_refused(tmp_path):
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for path in paths:
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelNotFound, match="a lies in another of its shards too"):
        read_shapes(paths)


def test_random_damage_never_escapes(tmp_path):
    """300 files with a few bytes of the header changed: read as before or refused, never another error."""
    rng = random.Random(0)
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data) - 68)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_header(path)
        except ModelNotFound:
            refused += 1
    assert refused > 200
