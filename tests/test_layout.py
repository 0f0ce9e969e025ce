"""The house keeps its shape: links, packages, layers, sizes, banned imports, public names."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from for_each import for_each

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIR = SETTINGS["tool"]["setuptools"]["package-dir"]
LINKS = {"saelab/" + name.removeprefix("saelab."): folder for name, folder in PACKAGE_DIR.items() if "." in name}

# Who may import whom: a unit imports its own layer and those after it. Every unit may import errors and files.
LAYERS = [
    {"app", "cli", "serving", "jobs"},
    {"claims"},
    {"labels", "steering", "probing", "diffing"},
    {"benchmarks", "features", "training", "evaluation", "interop", "runs", "run_folder", "presets", "hints"},
    {"edits"},
    {"activation_cache", "io", "identity"},
    {"saes", "losses", "models", "tokens"},
    {"distributed"},
    {"kernels"},
    {"errors", "files", "validation"},
]
# Which files may import a third-party module that is dear, or that only one part should know. None: no file.
ONLY_IN = {
    "transformers": r"saelab/models/\w+\.py",
    "transformer_lens": r"saelab/models/\w+\.py",
    "gguf": r"saelab/(models/\w+|interop/directions)\.py",
    "huggingface_hub": r"saelab/(models/\w+|tokens/hf_datasets|interop/hub\w*)\.py",
    "datasets": r"saelab/tokens/hf_datasets\.py",
    "streamlit": r"app/.*",
    "mcp": r"saelab/features/mcp_server\.py",
    "starlette": r"(app|saelab/serving)/\w+\.py",
    "uvicorn": r"saelab/serving/server\.py",
    "openai": None,
    "triton": r"kernels/.*",
    "wandb": r"saelab/training/.*",
    "openTSNE": r"saelab/features/layout\.py",
    "kernels": None,
    "tests": None,
    "pickle": r"saelab/interop/pickles\.py",
    "cloudpickle": None,
    "dill": None,
    "joblib": None,
}
PICKLES = ("saelab/interop/pickles.py", "saelab/interop/peer_worker.py")
PUBLIC = {
    "load_model",
    "load_texts",
    "load_sae",
    "save_sae",
    "load_features",
    "harvest",
    "train",
    "evaluate",
    "finetune",
    "collect_features",
    "TrainConfig",
    "saes",
    "steering",
    "VARIANTS",
    "__version__",
}
PUBLIC_NAMES = PUBLIC - {"saes", "steering"} | {""}  # those that are no unit of the house; "" is `import saelab`


def source_files() -> Iterator[Path]:
    """Every Python file of the package, under its real folder (links are not followed)."""
    for folder in ("saelab", *LINKS.values()):
        for directory, _, names in os.walk(ROOT / folder):
            yield from (Path(directory) / name for name in sorted(names) if name.endswith(".py"))


def project_files() -> Iterator[Path]:
    """Every text file that belongs to the project."""
    ignored = {".git", ".venv", "build", "dist", "runs", "__pycache__", "node_modules"}
    for directory, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in ignored and not f.endswith(("egg-info", "_cache", ".hypothesis"))]
        for name in names:
            if name not in ignored and not name.endswith((".parquet", ".png", ".safetensors", ".sqlite", ".pyc")):
                yield Path(directory) / name


def module_name(path: Path) -> str:
    """The import name of a file: kernels/topk.py is saelab.kernels.topk."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    for link, folder in LINKS.items():
        depth = len(Path(folder).parts)
        if parts[:depth] == Path(folder).parts:
            parts = (*Path(link).parts, *parts[depth:])
    return ".".join(parts).removesuffix(".__init__")


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in the file, at any depth; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def unit_of(module: str) -> str:
    """The part of the house a module belongs to: the first name after saelab."""
    return (module.split(".") + [""])[1]


def layer_of(unit: str) -> int:
    for number, units in enumerate(LAYERS):
        if unit in units:
            return number
    raise AssertionError(f"saelab/{unit} stands in no layer of tests/test_layout.py")


SOURCES = {path.relative_to(ROOT).as_posix(): path for path in source_files()}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), filename=name) for name, path in SOURCES.items()}


def test_links_are_relative_and_resolve():
    assert set(LINKS) == {f"saelab/{name}" for name in ("kernels", "activation_cache", "app", "data", "notebooks")}
    for link, folder in LINKS.items():
        assert (ROOT / link).is_symlink(), f"{link} is no link: git config core.symlinks true, then check it out again"
        assert (ROOT / link).readlink() == Path("..") / folder
        assert (ROOT / link).resolve() == ROOT / folder


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_links_are_committed_as_links():
    listed = subprocess.run(["git", "ls-files", "-s", *LINKS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()} == dict.fromkeys(
        LINKS, "120000"
    )


def test_every_folder_with_code_is_a_listed_package():
    found = {".".join(module_name(path.parent / "__init__.py").split(".")) for path in SOURCES.values()}
    listed = set(SETTINGS["tool"]["setuptools"]["packages"])
    assert found <= listed, f"not in pyproject.toml, so not in the wheel: {found - listed}"


def test_kernels_is_no_top_level_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def _may_import_anything(name: str) -> bool:
    return name == "saelab/__init__.py" or name.startswith("kernels/bench/")


@for_each([name for name in SOURCES if not _may_import_anything(name)])
def test_imports_point_downward(name: str):
    own = unit_of(module_name(SOURCES[name]))
    for line, module in imported_modules(TREES[name]):
        if module.split(".")[0] != "saelab":
            continue
        unit = unit_of(module)
        if unit in PUBLIC_NAMES:  # import saelab; from saelab import train
            assert layer_of(own) == 0, f"{name}:{line} imports the public names of saelab, which is for app and cli"
            continue
        assert layer_of(own) <= layer_of(unit), f"{name}:{line}: {own} may not import {unit}"


def test_no_two_units_import_each_other():
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        own = unit_of(module_name(SOURCES[name]))
        if not _may_import_anything(name):
            modules = [module for _, module in imported_modules(tree) if module.startswith("saelab.")]
            graph.setdefault(own, set()).update({unit_of(module) for module in modules} - PUBLIC_NAMES - {own})
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


def test_no_circle_of_files():
    """Imports for types alone and inside of functions count too; that a package's `__init__` runs first does not."""
    names = {module_name(path): name for name, path in SOURCES.items()}
    graph: dict[str, set[str]] = {}
    for name, tree in TREES.items():
        modules = {module for _, module in imported_modules(tree) if module.startswith("saelab")}
        files = {names.get(module) or names.get(module.rpartition(".")[0]) for module in modules}
        graph[name] = {file for file in files if file is not None and file not in (name, "saelab/__init__.py")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, naming the cycle


def test_the_top_of_the_house_is_small():
    top = sorted(path.name for path in (ROOT / "saelab").glob("*.py"))
    assert len(top) <= 9, top


@for_each([name for name in SOURCES if not re.search(r"(^|/)(bench(marks)?/|check_a)", name)])
def test_production_imports_no_bench(name: str):
    for line, module in imported_modules(TREES[name]):
        assert not re.search(r"^saelab\.(kernels|activation_cache)\.bench\b", module), f"{name}:{line} imports {module}"
    if name.startswith("kernels/"):
        assert "bench" not in SOURCES[name].read_text(encoding="utf-8"), f"{name} mentions a bench"


PRINTING = r"(saelab/(cli|benchmarks)/.*|(kernels|activation_cache)/bench/.*|app/serve\.py|.*/check_against_peers\.py)"


@for_each([name for name in SOURCES if not re.fullmatch(PRINTING, name)])
def test_the_library_logs_and_does_not_print(name: str):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{name}:{node.lineno} prints: use logging.getLogger('saelab')"


def test_storage_knows_no_model():
    for name in ("layout", "shuffle_buffer", "codec", "prefetch", "writer", "reader"):
        for line, module in imported_modules(TREES.get(f"activation_cache/{name}.py", ast.Module([], []))):
            assert unit_of(module) != "models", f"activation_cache/{name}.py:{line} {module}"


@for_each(SOURCES)
def test_banned_imports(name: str):
    for line, module in imported_modules(TREES[name]):
        top = module.split(".")[0]
        if top in ONLY_IN:
            allowed = ONLY_IN[top]
            assert allowed and re.fullmatch(allowed, name), f"{name}:{line} imports {top}, allowed in: {allowed}"


def test_every_dependency_is_imported():
    """All but gguf, which transformers imports to read the embedded model."""
    names = {re.split(r"[^\w-]", one)[0].replace("-", "_") for one in SETTINGS["project"]["dependencies"]} - {"gguf"}
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in source_files())
    used = {module.partition(".")[0] for tree in trees for _, module in imported_modules(tree)}
    assert names <= used


def test_nothing_is_pickled():
    """But for the one file that reads and writes the torch files of other libraries, weights only."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert name in PICKLES or node.attr not in ("load", "save"), (
                    f"{name}:{node.lineno} torch.{node.attr}: use safetensors"
                )
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                raise AssertionError(f"{name}:{node.lineno} allow_pickle: no pickle")
            if isinstance(node, ast.keyword) and node.arg == "weights_only":
                assert isinstance(node.value, ast.Constant) and node.value.value is True, f"{name}:{node.lineno}"
    assert "weights_only=True" in SOURCES["saelab/interop/pickles.py"].read_text(encoding="utf-8")


@for_each(SOURCES)
def test_files_and_functions_are_short(name: str):
    lines = len(SOURCES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 300, f"{name} has {lines} lines"
    limit = 60 if name == "saelab/training/loop.py" else 40
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= limit, f"{name}:{node.lineno} {node.name} has {length} lines, at most {limit}"


def test_no_path_or_host_of_one_machine():
    pattern = re.compile(
        r"/(wor[k]|tm[p]|roo[t])/|/hom[e]/\w|[.][.]/share[d]|pyp[i]\.org|pythonhoste[d]|npmj[s]|deb\.debia[n]"
    )
    for path in project_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"


def test_every_mutant_can_be_made():
    """What `tests/mutants/run.py` breaks stands once in its file, and the tests that must notice exist."""
    stale = []
    for mutant in tomllib.loads((ROOT / "tests/mutants/mutants.toml").read_text(encoding="utf-8"))["mutant"]:
        file, files = ROOT / mutant["file"], [ROOT / test.partition("::")[0] for test in mutant["tests"]]
        if (
            not file.exists()
            or file.read_text(encoding="utf-8").count(mutant["old"]) != 1
            or mutant["old"] == mutant["new"]
        ):
            stale.append(mutant["name"])
        stale += [f"{mutant['name']}: no {path.name}" for path in files if not path.exists()]
    assert not stale


def test_public_names():
    import saelab

    assert set(saelab.__all__) == set(dir(saelab)) == PUBLIC
    for name in PUBLIC:
        assert getattr(saelab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has TrainConfig, "):
        _ = saelab.trian  # pyright: ignore[reportAttributeAccessIssue]


def test_import_is_light():
    script = "import sys, saelab; assert saelab.__version__; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {module.split(".")[0] for module in run.stdout.split()}
    heavy = {"torch", "numpy", "transformers", "transformer_lens", "datasets", "streamlit", "wandb", "triton", "plotly"}
    assert not loaded & heavy
    assert len(run.stdout.split()) < 300  # counted, not timed: 170 on Python 3.11
