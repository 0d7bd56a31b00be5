"""Who may import whom: the picture of CONTRIBUTING.md, read off the syntax trees of all modules."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "videogen"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A module that stands alone is a room by its own name. What a room may import beside itself:
BASE = {"errors", "config", "types"}
NETWORKS = BASE | {"models", "diffusion"}
FILES = {"weights.card", "weights.limits", "weights.models"}  # what a model is: requests are checked with that
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "progress": set(),
    "config": {"errors"},
    "models": BASE,
    "diffusion": BASE,
    "data": BASE,
    "weights": BASE | {"models", "data.files"},
    "checks": {"errors", "data"} | FILES,
    "request": {"errors", "data", "checks"} | FILES,
    "recipe": {"errors", "data", "checks", "request"},
    "styles": {"errors", "config"},
    "enhance": {"errors", "config"},
    "conditioning": BASE | {"models"},
    "runtime": BASE | {"models", "data.files"},
    "distributed": NETWORKS,
    "evaluation": BASE | {"models", "data"},
    "training": NETWORKS
    | {"conditioning", "weights", "data", "evaluation", "progress", "distributed", "pipeline"},  # clips while it trains
    "long": {"errors", "checks", "request", "recipe", "data"} | FILES,
    "pipeline": NETWORKS | {"conditioning", "weights", "data", "request", "recipe", "progress", "runtime"},
}
# These stand on top and may import everything.
TOP = {"__init__", "__main__", "cli", "demo", "testing"}

# Imported inside the function that needs them: slow to import, or needed by few.
LAZY = {"accelerate", "av", "diffusers", "fastapi", "huggingface_hub", "imageio", "matplotlib", "omegaconf"}
LAZY |= {"sageattention", "tokenizers", "transformers", "xformers", "yaml"}


def name(path: Path) -> str:
    """`models.dit`, `config`, `data.world.scene`; a folder's `__init__` is the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Full names of the modules that a file imports; `top_level`: only those that run when it is imported itself."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return  # for the type checker alone
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports here are absolute"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield module if is_module(module) else str(node.module)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")))


def is_module(module: str) -> bool:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def own_imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Names of our modules that a file imports, without `videogen.`; the bare package holds only a version."""
    found = imports(path, top_level=top_level)
    return {module.removeprefix("videogen.") for module in found if module.startswith("videogen.")}


def ids(path: Path) -> str:
    return name(path)


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_a_room_imports_only_what_stands_below_it(path: Path) -> None:
    room = name(path).split(".")[0]
    if room in TOP:
        return
    assert room in ALLOWED, f"{room} is not in the layer picture: add it here and to CONTRIBUTING.md"
    for module in own_imports(path):
        target = module.split(".")[0]
        assert target == room or {target, module} & ALLOWED[room], f"{name(path)} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_slow_libraries_are_imported_where_they_are_used(path: Path) -> None:
    found = {module.split(".")[0] for module in imports(path, top_level=True)}
    assert not found & LAZY, f"{name(path)} imports {found & LAZY} at its top"


def test_the_command_line_reaches_no_torch_before_it_needs_a_model() -> None:
    """The import closure of `videogen.cli`, without the imports inside functions."""
    files = {name(path): path for path in MODULES}
    todo, reached = ["cli"], set()
    while todo:
        module = todo.pop()
        if module in reached or module not in files:
            continue
        reached.add(module)
        todo += [*own_imports(files[module], top_level=True), module.split(".")[0]]
    assert {"config", "request", "weights.card"} <= reached
    for module in sorted(reached):
        libraries = {found.split(".")[0] for found in imports(files[module], top_level=True)}
        assert "torch" not in libraries, module


@pytest.mark.parametrize("module", ["videogen", "videogen.cli", "videogen.config", "videogen.request"])
def test_a_fresh_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = LAZY | {"torch", "numpy", "PIL", "einops", "jaxtyping", "safetensors"}
    assert not heavy & set(run.stdout.split())


def test_every_public_name_can_be_imported() -> None:
    import videogen

    assert all(getattr(videogen, public) is not None for public in videogen.__all__)
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        videogen.generat  # noqa: B018
