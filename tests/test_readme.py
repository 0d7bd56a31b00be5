"""What the pages promise: the map shows the files there are, every block runs or parses, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from videogen import cli
from videogen.errors import ModelNotFound
from videogen.weights.card import Card
from videogen.weights.hub import find_model
from videogen.weights.single import open_card

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SKIP = "<!-- not run:"  # stands on the line above a python block that is only compiled, with the reason
PAGE_IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, text, and line of the page."""

    page: Path
    language: str
    text: str
    line: int
    run: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        above = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        line = text[: match.start()].count("\n") + 1
        found.append(Block(page, match[1], match[2], line, run=not above.startswith(SKIP)))
    return found


def code(block: Block):
    """Compiled so that a traceback shows the line of the page."""
    return compile("\n" * block.line + block.text, str(block.page), "exec")


def needs_model(text: str) -> None:
    try:
        find_model("tiny")
    except ModelNotFound:
        if re.search(r"videogen\.(load|generate)\(|^videogen ", text, re.MULTILINE):
            pytest.skip("needs the bundled model, checkpoints/tiny")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages suppose a reader to have: two pictures and a clip."""
    from PIL import Image

    from videogen.data.video import write_video
    from videogen.data.world import clip

    _, frames, _ = clip(0)
    pixels = (frames * 255).round().astype(np.uint8)
    for name, frame in (("start.png", pixels[0]), ("end.png", pixels[-1])):
        Image.fromarray(frame).save(tmp_path / name)
    write_video(tmp_path / "outputs" / "clip.mp4", pixels, 8, recipe={"prompt": "a clip", "seed": 0})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fewer denoising steps where a block names none: whether it runs is asked here, not how good the clip is."""
    from videogen import pipeline

    def quick(path: Path, **options) -> Card:
        return replace(open_card(path, **options), num_inference_steps=4)

    for module in (pipeline, cli.generate):
        monkeypatch.setattr(module, "open_card", quick)
    pipeline._kept.cache_clear()
    yield
    pipeline._kept.cache_clear()


# ---- the map --------------------------------------------------------------------------------------------------------


def map_entries() -> dict[str, str]:
    """Path -> comment of every line of the README's tree, read by its indentation."""
    tree = next(b.text for b in blocks(ROOT / "README.md") if b.text.startswith("videogen/"))
    entries: dict[str, str] = {}
    folders: list[str] = []
    for line in filter(str.strip, tree.splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, comment = line.strip().partition(" ")
        path = "".join(folders[:depth]) + name
        assert path not in entries, path
        entries[path] = comment.strip()
        if name.endswith("/"):
            folders[depth:] = [name]
    return entries


def test_the_map_names_every_file_of_the_package() -> None:
    package = ROOT / "videogen"
    files = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    required = {path for path in files if path == "videogen/__init__.py" or not path.endswith("__init__.py")}
    missing = required - map_entries().keys()
    assert not missing, f"not in the README's map: {sorted(missing)}"
    rooms = {str(path.parent.relative_to(ROOT)) + "/" for path in package.rglob("__init__.py")}
    assert rooms <= map_entries().keys()


def test_the_map_names_nothing_that_does_not_exist() -> None:
    gone = [path for path in map_entries() if not (ROOT / path).exists()]
    assert not gone, f"in the README's map, but not there: {gone}"


def test_every_entry_of_the_map_has_a_comment() -> None:
    assert not [path for path, comment in map_entries().items() if not comment]


# ---- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            code(block)


RUNNABLE = [page for page in PAGES if any(b.language == "python" and b.run for b in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, desk: Path, few_steps: None) -> None:
    """One after the other in one namespace, as a reader would type them."""
    chosen = [block for block in blocks(page) if block.language == "python" and block.run]
    needs_model("".join(block.text for block in chosen))
    names: dict[str, object] = {}
    for block in chosen:
        exec(code(block), names)


def commands(page: Path) -> list[list[str]]:
    """The arguments of every `videogen …` line in the blocks of a page."""
    found = []
    for block in blocks(page):
        if block.language not in ("", "bash", "sh"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True) if re.match(r"\s*(\S*/)?videogen ", part) else []
                found += [words[1:]] if words else []
    return found


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_parse(page: Path) -> None:
    for arguments in commands(page):
        if {"--help", "--version"} & set(arguments):
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.parse(arguments)
        else:
            assert callable(cli.parse(arguments).run)


def test_the_commands_of_the_readme_run(desk: Path, few_steps: None, capsys: pytest.CaptureFixture[str]) -> None:
    """The quick ones: not `demo` (it has a test of its own) and not `train`."""
    chosen = [c for c in commands(ROOT / "README.md") if c[0] in ("text-to-video", "image-to-video", "info")]
    assert {c[0] for c in chosen} == {"text-to-video", "image-to-video", "info"}
    needs_model("videogen ")
    for arguments in chosen:
        assert cli.main([*arguments]) == 0
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_files_and_make_targets_that_blocks_name_exist(page: Path) -> None:
    shell = "".join(b.text for b in blocks(page) if b.language in ("", "bash", "sh"))
    for path in re.findall(r"\b(?:configs|scripts|tests|docs|notebooks)/[\w./-]*\w", shell):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([\w-]+)", shell, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_index_of_docs_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\(([\w/.-]+\.md)\)", index))
    written = [page for page in (ROOT / "docs").rglob("*.md") if not page.with_suffix(".json").exists()]  # not measured
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in written}
    assert pages - {"README.md"} <= named
