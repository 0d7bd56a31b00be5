"""scripts/steps.py: rows are made once, a last frame that is told longer is nearer, table and plot are written."""

import json
from typing import Any

import pytest


@pytest.fixture
def steps(script) -> Any:
    return script("steps")


def test_rows_are_made_once_and_a_last_frame_told_longer_is_nearer(steps, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    settings: dict[str, Any] = {"n": 2, "batch": 2, "steps": [4, 2], "out": tmp_path}
    text = steps.run("tiny", "tiny", **settings)
    results = json.loads((tmp_path / "steps.json").read_text())["results"]
    assert len(results) == len(text.splitlines()) - 2 == 2 + 3 + 4 + 4
    assert (tmp_path / "steps.png").stat().st_size > 5000
    last = [sum(clip["last_psnr"] for clip in rows) for label, rows in results.items() if "last_frame_until" in label]
    assert last[0] < last[-1], "told throughout, the last frame is nearer than not told at all"
    monkeypatch.setattr(steps, "measure", lambda *args: pytest.fail("a row that is there is not made again"))
    assert steps.run("tiny", "tiny", **settings) == text
    with pytest.raises(SystemExit, match="another run"):
        steps.run("tiny", None, **settings)
