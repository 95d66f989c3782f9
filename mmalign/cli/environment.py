"""`mmalign env`: versions, devices and known conflicts. It must work where nothing else does, so it imports little and catches much."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mmalign.cli.options import Command, Option, switch

VERB = Command(
    prog="mmalign env",
    description="Prints versions, devices and known conflicts, each with the line that mends it. Paste it into a bug report.",
    example="mmalign env --json",
    options=[Option(name="json", help="print JSON", convert=switch, default=False)],
)
PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "datasets", "safetensors", "huggingface_hub", "open_clip_torch",
    "torchvision", "torchaudio", "av", "xformers", "triton", "bitsandbytes", "trl", "numpy", "pillow",
)  # fmt: skip
# Seen to import together; torch 2.15 is built for another CUDA than torchaudio 2.11 and breaks transformers' and diffusers' imports.
AUDIO_FIX = 'pip install "torch>=2.11,<2.15" "torchaudio>=2.11,<2.12"'
LINKS = ("assets", "kernels", "pipelines")


def run(argv: Sequence[str]) -> int:
    """Prints the report; the exit code is 0 whatever it finds."""
    given = VERB.read(argv)
    if given is None:
        return 0
    report = collect()
    if given["json"]:
        print(json.dumps(report, indent=1))
        return 0
    for section in ("mmalign", "system", "packages", "devices", "cache"):
        for name, value in report[section].items():
            print(f"{name:<18} {value}")
        print()
    for problem in report["problems"]:
        print(f"! {problem}")
    if not report["problems"]:
        print("no known conflict")
    return 0


def collect() -> dict[str, Any]:
    """Everything that is printed, as JSON."""
    from mmalign import __version__

    root = Path(__file__).resolve().parents[1]
    links, link_problems = checkout_links(root)
    devices, device_problems = torch_devices()
    audio, audio_problems = torchaudio_state()
    compiled, xformers_problems = xformers_state()
    return {
        "mmalign": {"mmalign": __version__, "installed in": str(root), **links},
        "system": {
            "python": f"{platform.python_version()} ({sys.executable})",
            "os": platform.platform(),
            "cpu cores": os.cpu_count(),
        },
        "packages": {name: version(name) or "not installed" for name in PACKAGES} | audio | compiled,
        "devices": devices,
        "cache": {"cache": cache_dir()},
        "problems": [*link_problems, *device_problems, *audio_problems, *xformers_problems],
    }


def version(package: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cache_dir() -> str:
    """Where encoded pairs lie; the same place as `mmalign.data.default_cache_dir`, which loads torch."""
    return str(Path(os.environ.get("MMALIGN_CACHE") or "~/.cache/mmalign").expanduser())


def checkout_links(package: Path) -> tuple[dict[str, str], list[str]]:
    """How mmalign.pipelines, .kernels and .assets are found: links of a checkout, or folders of a wheel."""
    kinds = {name: _kind(package / name) for name in LINKS}
    checkout = (package.parent / "pyproject.toml").is_file() and (package.parent / "pipelines").is_dir()
    broken = [name for name, kind in kinds.items() if kind == "broken" or (kind == "missing" and checkout)]
    problems = []
    if broken:
        problems.append(
            f"mmalign/{', mmalign/'.join(broken)} should be links to folders beside mmalign/, and this checkout has none (Windows "
            "without symlinks): git config core.symlinks true, then git checkout -- mmalign; or install the wheel: pip install ."
        )
    how = (
        "a checkout, links in order"
        if checkout and not broken
        else "a checkout, links broken"
        if checkout
        else "a wheel"
    )
    return {"layout": how}, problems


def _kind(path: Path) -> str:
    if path.is_dir():
        return "link" if path.is_symlink() else "folder"
    return "broken" if path.is_symlink() or path.is_file() else "missing"


def torch_devices() -> tuple[dict[str, Any], list[str]]:
    """GPUs and Apple's MPS as torch sees them."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"devices": "unknown: torch cannot be imported"}, [
            f'torch cannot be imported: {_first_line(error)}; pip install "torch>=2.11,<2.15"'
        ]
    found: dict[str, Any] = {"torch build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found[f"GPU {index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability {capability}"
        )
    if not torch.cuda.device_count():
        found["GPU"] = "none"
    found["MPS"] = "available" if torch.backends.mps.is_available() else "not available"
    found["bfloat16"] = "supported" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "on the CPU"
    return found, []


def torchaudio_state() -> tuple[dict[str, str], list[str]]:
    """Whether torchaudio, where it is installed, can be imported beside this torch."""
    if version("torchaudio") is None:
        return {}, []
    error = _fails("import torchaudio")
    if error is None:
        return {"torchaudio imports": "yes"}, []
    wrong = f"torchaudio {version('torchaudio')} does not work with torch {version('torch')} ({error})"
    return {"torchaudio imports": "no"}, [f"{wrong}, and transformers and diffusers import it: {AUDIO_FIX}"]


def xformers_state() -> tuple[dict[str, str], list[str]]:
    """Whether xformers' compiled part loads, and which build it was made for."""
    if version("xformers") is None:
        return {}, []
    probe = "import xformers._cpp_lib as lib; raise SystemExit(0 if lib._cpp_library_load_exception is None else 1)"
    if _fails(probe) is None:
        return {"xformers compiled": "loads"}, []
    built = xformers_build()
    return {"xformers compiled": f"does not load{built}"}, [
        f"xformers {version('xformers')} is installed, but its compiled part does not load beside torch {version('torch')}{built}; "
        "attention runs on torch's own SDPA. Install the xformers release made for your torch, or: pip uninstall xformers"
    ]


def xformers_build() -> str:
    """The end of a sentence, ", built for torch …", from the file that the wheel of xformers carries."""
    found = importlib.util.find_spec("xformers")
    folders = [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []
    for file in (folder / "cpp_lib.json" for folder in folders):
        if file.is_file():
            built = json.loads(file.read_text())["version"]
            cuda = f" with CUDA {built['cuda'] // 100}.{built['cuda'] % 100}" if built.get("cuda") else ""
            return f", built for torch {built['torch'].split('+')[0]}{cuda}"
    return ""


def _fails(program: str) -> str | None:
    """Runs a line of Python by itself, for an import that may crash the process; the last line of its error, or None."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else f"exit code {done.returncode}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
