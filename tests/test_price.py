"""scripts/price.py: every switch is put in and taken out, rows pair up with the lossless ones, and a run goes on."""

import json
from typing import Any

import pytest


@pytest.fixture
def price(script) -> Any:
    return script("price")


def test_a_run_measures_switches_against_lossless_and_goes_on(price, monkeypatch, tmp_path):
    few = {"num_inference_steps": 4, "sampler": "ddim"}
    switches = {
        price.LOSSLESS: price.Switch(few),
        "lossless again": price.Switch(few),
        "all": price.Switch(few | {"guidance_until": 0.5}, "int8", True),
    }
    monkeypatch.setattr(price, "SWITCHES", switches)
    price.run("tiny", 1, 1, tmp_path)
    first = json.loads((tmp_path / "price.json").read_text())["results"]
    made = []
    monkeypatch.setattr(price, "measure", lambda *args, real=price.measure: made.append(args[3]) or real(*args))
    table = price.run("tiny", 2, 1, tmp_path)
    results = json.loads((tmp_path / "price.json").read_text())["results"]
    assert made == [1] * 3, "the first clip is not made again"
    assert all(rows[0] == first[name][0] and len(rows) == 2 for name, rows in results.items())
    assert all(row["psnr"] == 100 and row["ssim"] == pytest.approx(1) for row in results["lossless again"])
    assert all(row["psnr"] < 60 for row in results["all"])
    evaluated = {name: rows[0]["evaluated"] for name, rows in results.items()}
    assert evaluated == {price.LOSSLESS: 8, "lossless again": 8, "all": 6}
    lines = table.splitlines()
    assert lines[0] == "2 clips each."
    assert "| 25% |" in next(line for line in lines if line.startswith("| all"))
    with pytest.raises(SystemExit, match="another run"):
        price.run("tiny", 2, 2, tmp_path)


def test_the_models_own_numbers_come_back_after_each_switch(price):
    pipe = price.load("tiny")
    kernels = [block.attention.kernel for block in pipe.dit.blocks]
    own = {name for name, m in pipe.dit.named_modules() if "forward" in m.__dict__}
    with price.switched_on(pipe, price.Switch({}, "int8", True)):
        assert [block.attention.kernel for block in pipe.dit.blocks] != kernels
        assert own < {name for name, m in pipe.dit.named_modules() if "forward" in m.__dict__}
    assert [block.attention.kernel for block in pipe.dit.blocks] == kernels
    assert own == {name for name, m in pipe.dit.named_modules() if "forward" in m.__dict__}
