"""What an installed package holds: wheel and sdist are built from a copy of the tree and compared with it."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmalign

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
# Where a package's folder is → under which name it ships.
HOMES = {
    "mmalign": "mmalign",
    "pipelines": "mmalign/pipelines",
    "kernels": "mmalign/kernels",
    "assets": "mmalign/assets",
}


def build(kind, tree, output):
    """Runs the build backend as pip does, without an isolated environment (and so without a network)."""
    output.mkdir(exist_ok=True)
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", program, str(output)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n(needs setuptools>=77: pip install -e .[test])"
    return output / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, sdist, the wheel that the unpacked sdist gives); the sdist has no symlinks, like a checkout on Windows."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in HOMES:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.part"))
    wheel, sdist = build("wheel", tree, folder / "wheel"), build("sdist", tree, folder / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return wheel, sdist, build("wheel", unpacked, folder / "again")


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel unpacked, as pip would."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(built[0]) as archive:
        archive.extractall(folder)
    return folder


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def modules_of_the_tree():
    """Every source file, under the name by which it ships."""
    for source, target in HOMES.items():
        for path in (ROOT / source).rglob("*.py"):
            inside = path.relative_to(ROOT / source)
            if (
                not any((ROOT / source / part).is_symlink() for part in inside.parents)
                and "__pycache__" not in inside.parts
            ):
                yield f"{target}/{inside.as_posix()}"


def packages_of_the_tree():
    found = {str(Path(name).parent).replace("/", ".") for name in modules_of_the_tree()}
    # Shipped as package data, and before the first kernel is written.
    return found | {"mmalign.assets", "mmalign.kernels"}


def test_the_listed_packages_are_the_folders_of_the_tree():
    """A forgotten one would drop out of the wheel without a word."""
    listed = SETUPTOOLS["packages"]
    assert set(listed) == packages_of_the_tree()
    assert len(listed) == len(set(listed))


def test_the_wheel_holds_every_module_and_nothing_else(built):
    shipped = {name for name in names(built[0]) if name.endswith(".py")}
    assert shipped == set(modules_of_the_tree())


def test_the_only_top_level_name_is_mmalign(built):
    tops = {name.split("/")[0] for name in names(built[0])}
    assert tops == {"mmalign", f"mmalign-{mmalign.__version__}.dist-info"}


def test_assets_and_the_type_marker_are_inside(built):
    wanted = {
        f"mmalign/assets/{path.relative_to(ROOT / 'assets').as_posix()}"
        for path in (ROOT / "assets").rglob("*")
        if path.is_file()
        and not any(part.startswith(".") or part.endswith(".part") for part in path.parts)
        and path.suffix != ".py"
    }
    shipped = names(built[0])
    assert wanted <= shipped and "mmalign/py.typed" in shipped
    assert any("licenses/LICENSE" in name for name in shipped)


def test_sdist_and_tree_give_the_same_wheel(built):
    wheel, sdist, again = built
    assert names(again) == names(wheel)
    with tarfile.open(sdist) as archive:
        members = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    assert len(members) == len(set(members))
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(members)
    assert not [
        name for name in members if name.startswith(("mmalign/pipelines/", "mmalign/kernels/", "mmalign/assets/"))
    ]


def run(program, **options):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, **options)


def test_the_wheel_works_from_any_folder(installed, tmp_path):
    program = (
        "import mmalign, mmalign.pipelines, mmalign.pipelines.image, mmalign.losses, mmalign.kernels, mmalign.assets\n"
        "from importlib.resources import files\n"
        f"assert mmalign.__file__.startswith({str(installed)!r}), mmalign.__file__\n"
        f"assert mmalign.pipelines.__file__.startswith({str(installed)!r})\n"
        "assert (files('mmalign') / 'assets').is_dir()\n"
        "assert mmalign.losses.names()\n"
    )
    done = run(program, cwd=tmp_path, env={"PYTHONPATH": str(installed), "PATH": ""})
    assert done.returncode == 0, done.stderr


def test_this_installation_works_from_any_folder(tmp_path):
    done = run("import mmalign.cli, mmalign.pipelines.image, mmalign.likelihood", cwd=tmp_path)
    assert done.returncode == 0, f"{done.stderr}\ninstall it with: pip install -e .[test]"


def test_the_kernels_folder_never_shadows_the_package_of_that_name(tmp_path):
    """With the checkout on sys.path: no regular package, so that PyPI's wins and transformers sees a namespace."""
    program = (
        "import importlib.util; spec = importlib.util.find_spec('kernels')\n"
        f"assert spec is None or spec.origin is None or not spec.origin.startswith({str(ROOT)!r}), spec"
    )
    done = run(program, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_pytest_does_not_put_the_root_of_the_checkout_on_the_path():
    """`python -m pytest` does, as every `python -m`; scripts/test does not use it."""
    settings = PYPROJECT["tool"]["pytest"]["ini_options"]
    assert settings["pythonpath"] == ["tests"] and "--import-mode=importlib" in settings["addopts"]
    assert "python -m pytest" not in (ROOT / "scripts" / "test").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="git writes links as text files there, and `mmalign env` says so")
def test_the_links_of_the_checkout_lead_to_the_folders():
    for name in ("assets", "kernels", "pipelines"):
        link = ROOT / "mmalign" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


def test_one_version_everywhere():
    written = PYPROJECT["project"]["version"]
    assert mmalign.__version__ == written
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] in (written, "Unreleased")


def test_the_command_is_declared():
    assert PYPROJECT["project"]["scripts"] == {"mmalign": "mmalign.cli:main"}
