"""Each notebook runs from top to bottom on a CPU, and is kept without outputs."""

import resource
from pathlib import Path

import nbclient
import nbformat
import pytest

from videogen.errors import ModelNotFound
from videogen.weights.hub import find_model

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
LIMIT = 60  # seconds of processor time: a busy machine is no fault of a notebook


def bundled_model_is_here() -> bool:
    try:
        return find_model("tiny").is_dir()
    except ModelNotFound:
        return False


def cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.skipif(not bundled_model_is_here(), reason="needs the bundled model, checkpoints/tiny")
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")  # figures are checked for errors, not looked at
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={})
    client.resources["metadata"] = {"path": str(tmp_path)}
    before = cpu_seconds_of_children()
    client.execute()
    assert 0 < cpu_seconds_of_children() - before < LIMIT


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_valid_and_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for cell in code:
        compile(cell.source, f"{path.name}:{cell.id}", "exec")


def test_there_are_notebooks() -> None:
    names = ["01_first_video", "02_inside_the_model", "03_train_your_own", "04_finetune_on_your_clips"]
    assert [path.stem for path in NOTEBOOKS] == names
