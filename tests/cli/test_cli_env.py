"""`mmalign env`: works with packages missing or broken, and names what mends them."""

import json
import sys
from importlib import metadata

import pytest

from mmalign import cli
from mmalign.cli import environment


@pytest.fixture
def quick(monkeypatch):
    """No imports in subprocesses; `fails` decides what they would have said."""
    answers = {}
    monkeypatch.setattr(environment, "_fails", lambda program: answers.get(program.split()[1].split(".")[0]))
    return answers


def installed(monkeypatch, **versions):
    def version(name):
        if versions.get(name) is None:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def test_json_has_what_a_bug_report_needs(quick, capsys):
    assert cli.main(["env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"mmalign", "system", "packages", "devices", "cache", "problems"}
    assert set(environment.PACKAGES) <= set(report["packages"])
    assert report["packages"]["torch"] == metadata.version("torch")


def test_text(quick, capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "torch build" in shown and "python" in shown and "layout" in shown


def test_without_any_optional_package(quick, monkeypatch, capsys):
    installed(monkeypatch, torch="2.14.1")
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "torchaudio         not installed" in shown and "xformers           not installed" in shown
    assert "torchaudio imports" not in shown


def test_without_torch(quick, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    installed(monkeypatch)
    assert cli.main(["env"]) == 0
    assert "! torch cannot be imported" in capsys.readouterr().out


def test_a_torchaudio_of_another_torch_gets_the_line_that_mends_it(quick, monkeypatch, capsys):
    quick["torchaudio"] = (
        "RuntimeError: Detected that PyTorch and TorchAudio were compiled with different CUDA versions"
    )
    installed(monkeypatch, torch="2.15.0", torchaudio="2.11.0")
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "! torchaudio 2.11.0 does not work with torch 2.15.0 (RuntimeError" in shown
    assert 'pip install "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"' in shown


def test_xformers_whose_compiled_part_does_not_load(quick, monkeypatch, capsys, tmp_path):
    package = tmp_path / "xformers"
    package.mkdir()
    (package / "__init__.py").touch()
    built = {"version": {"cuda": 1208, "torch": "2.10.0+cu128", "python": "3.10.19"}}
    (package / "cpp_lib.json").write_text(json.dumps(built))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    quick["xformers"] = "exit code 1"
    installed(monkeypatch, torch="2.14.1", xformers="0.0.35")
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "built for torch 2.10.0 with CUDA 12.8" in shown and "attention runs on torch's own SDPA" in shown


def test_a_checkout_without_links_says_how_to_get_them(tmp_path):
    package = tmp_path / "mmalign"
    package.mkdir()
    (tmp_path / "pyproject.toml").touch()
    for name in environment.LINKS:
        (tmp_path / name).mkdir()
    assert environment.checkout_links(package)[0] == {"layout": "a checkout, links broken"}
    # As git writes links on Windows: a text file with the target.
    for name in environment.LINKS:
        (package / name).write_text(f"../{name}")
    layout, problems = environment.checkout_links(package)
    assert layout == {"layout": "a checkout, links broken"} and "git config core.symlinks true" in problems[0]
    for name in environment.LINKS:
        (package / name).unlink()
        (package / name).symlink_to(tmp_path / name)
    assert environment.checkout_links(package) == ({"layout": "a checkout, links in order"}, [])


def test_a_wheel_is_recognised(tmp_path):
    for name in environment.LINKS:
        (tmp_path / "mmalign" / name).mkdir(parents=True)
    assert environment.checkout_links(tmp_path / "mmalign") == ({"layout": "a wheel"}, [])


def test_the_cache_is_where_the_data_package_puts_it(monkeypatch):
    from mmalign.data import default_cache_dir

    for place in (None, "~/somewhere"):
        monkeypatch.setenv("MMALIGN_CACHE", place) if place else monkeypatch.delenv("MMALIGN_CACHE", raising=False)
        assert environment.cache_dir() == str(default_cache_dir())
