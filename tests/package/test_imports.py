"""What imports what: the light front door, the one-way street between packages, and rules that grep can hold."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import mmalign

ROOT = Path(__file__).resolve().parents[2]
# Imports run downwards only; the last two stand beside each other and import nothing of ours.
LAYERS = (
    "cli",
    "playground",
    "pipelines",
    "training",
    "evaluation",
    "likelihood",
    "data",
    "rewards",
    "denoisers",
    "losses",
    "kernels",
)
LOWEST = {"losses": {"torch", "jaxtyping"}, "kernels": {"torch", "triton"}}
HEAVY = {"diffusers", "transformers", "torchaudio", "open_clip", "datasets", "accelerate", "peft", "gradio", "xformers"}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "open_clip": "open-clip-torch",
    "huggingface_hub": "huggingface-hub",
}


def sources():
    """(package, path) of every source file, each once."""
    for package in LAYERS:
        folder = ROOT / package if package in ("pipelines", "kernels") else ROOT / "mmalign" / package
        for path in sorted(folder.rglob("*.py")):
            yield package, path


@cache
def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path):
    """(module, line, inside a function) of every import of a file; `from mmalign import x` counts as mmalign.x."""
    local = {
        id(inner)
        for outer in ast.walk(tree(path))
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            whole = node.module == "mmalign"
            found = [f"mmalign.{alias.name}" for alias in node.names] if whole else [node.module]
        else:
            continue
        for module in found:
            home = mmalign._HOME.get(module.removeprefix("mmalign."), module)
            yield home, node.lineno, id(node) in local


def layer_of(module):
    parts = module.split(".")
    return parts[1] if parts[0] == "mmalign" and len(parts) > 1 and parts[1] in LAYERS else None


def test_the_front_door_is_light():
    """`import mmalign` loads none of the big libraries, and not torch either."""
    program = f"import sys, mmalign; print(sorted(({HEAVY!r} | {{'torch', 'numpy'}}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_losses_load_torch_alone():
    program = f"import sys, mmalign.losses; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_importable_and_all_of_them():
    names = mmalign.__all__
    assert names == sorted(names, key=str.casefold) and len(names) == len(set(names))
    for name in names:
        assert getattr(mmalign, name) is not None
    public = {name for name in dir(mmalign) if not name.startswith("_")}
    submodules = {*LAYERS, "assets", "files", "scorer_names"}
    # Left over from how the module is written.
    helpers = {"import_module", "TYPE_CHECKING", "Any"}
    assert public - submodules - helpers == set(names) - submodules


def test_type_checkers_see_the_same_names():
    shown = {
        alias.asname
        for node in ast.walk(tree(ROOT / "mmalign" / "__init__.py"))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mmalign")
        for alias in node.names
    }
    assert shown == set(mmalign.__all__)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="has no attribute 'SmpoPipeline'; it has DiffusionDPOConfig"):
        _ = mmalign.SmpoPipeline


def test_imports_run_downwards():
    """Also those inside functions."""
    wrong = []
    for package, path in sources():
        for module, line, _ in imports(path):
            target = layer_of(module)
            if target is None or target == package:
                continue
            if LAYERS.index(target) <= LAYERS.index(package) or package in LOWEST:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {package} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("package", LOWEST)
def test_the_lowest_packages_import_torch_and_little_else(package):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for owner, path in sources()
        if owner == package
        for module, line, _ in imports(path)
        if module.split(".")[0] not in LOWEST[package] | sys.stdlib_module_names | {"mmalign"}
    ]
    assert wrong == []


def test_every_library_that_is_imported_is_declared():
    """Base dependencies anywhere; those of an extra only inside functions, where their absence can be explained."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def bare(requirements):
        return {re.split(r"[<>=!\[; ]", item)[0].lower() for item in requirements}

    extras = project["optional-dependencies"]
    base, optional = bare(project["dependencies"]), bare(sum((extras[name] for name in extras if name != "test"), []))
    wrong = []
    for _, path in sources():
        for module, line, local in imports(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ("mmalign", "triton"):
                continue
            distribution = DISTRIBUTIONS.get(top, top).lower()
            if distribution not in base and not (distribution in optional and local):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {top}")
    assert wrong == []


def test_no_file_imports_the_kernels_folder_by_its_bare_name():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for _, path in sources()
        for module, line, _ in imports(path)
        if module.split(".")[0] in ("kernels", "pipelines", "assets", "tests")
    ]
    assert wrong == []


def test_no_error_is_swallowed_without_its_name():
    """`except Exception` and wider only where the handler raises again."""
    everything = {"Exception", "BaseException"}
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for _, path in sources()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or everything & {getattr(part, "id", "") for part in ast.walk(node.type)})
        and not any(isinstance(part, ast.Raise) for part in ast.walk(node))
    ]
    assert wrong == []


def test_files_stay_short():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for _, path in sources()}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}


@pytest.mark.parametrize("package", ["losses", "likelihood"])
def test_functions_of_the_core_fit_on_a_screen(package):
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for owner, path in sources()
        if owner == package
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60
    ]
    assert long == []
