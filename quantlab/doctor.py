"""The command that shows what decides results and speed on this machine: one table, or JSON to attach to a report."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import typer
from rich.console import Console
from rich.table import Table

from quantlab.engine_commands import JsonOption
from quantlab.engine_pythons import engines_directory
from quantlab.errors import DeviceError
from quantlab.files import cache_directory
from quantlab.hardware import describe, environment, threads, version_of, versions
from quantlab.shipped import names

_LIBRARIES: Final = ("huggingface-hub", "pydantic", "hf-xet")
_OPTIONAL: Final[Mapping[str, tuple[str, str]]] = {
    "lm-eval": ("lm_eval", "tasks of lm-evaluation-harness: pip install 'quantlab[tasks]'"),
    "gguf": ("gguf", "the format gguf: pip install 'quantlab[gguf]'"),
    "triton": ("triton", "kernels on CUDA; comes with torch for CUDA"),
    "flash-attn": ("flash_attn", "the attention flash_attention_2 on CUDA"),
}
"""Packages that are used where they are installed: distribution -> module, and what it is for."""
_HUB_VARIABLES: Final = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy")
_SECONDS: Final = 20
_GB: Final = 1e9

Section = dict[str, str]


def doctor(as_json: JsonOption = False) -> None:
    """Show what decides results and speed here: versions, processor and kernels, GPU, compiler, packages, engines, disk."""
    sections = {
        "software": _software(),
        "processor": _processor(),
        "GPU": _gpus(),
        "optional packages": _optional(),
        "engines": _engines(),
        "caches and disk": _disk(),
    }
    if as_json:
        typer.echo(json.dumps(sections, indent=1))
        return
    console = Console()
    for title, section in sections.items():
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True, style="bold")
        table.add_column(overflow="fold")
        for name, text in section.items():
            table.add_row(name, text)
        console.print(table, "", highlight=False, markup=False)


def _software() -> Section:
    found = versions()
    for package in _LIBRARIES:
        found |= version_of(package)
    place = Path(__file__).parent
    kind = "a checkout" if (place.parent / "pyproject.toml").is_file() else "an installed package"
    recipes = f"{len(names('recipe'))} recipes, {len(names('suite'))} suites, {len(names('corpus'))} corpora"
    return found | {
        "quantlab is": f"{kind}, {place}; it comes with {recipes}",
        "Python is": sys.executable,
        "system": platform.platform(),
    }


def _processor() -> Section:
    from quantlab.runtime.banks.exact_int8 import operator_is_exact  # imports torch
    from quantlab.runtime.cpu_operators import cpu_operators
    from quantlab.runtime.native.library import INSTRUCTIONS, find_compiler
    from quantlab.runtime.processor import flags, has_matrix_units, multiplies_bfloat16, multiplies_int8

    present = sorted(INSTRUCTIONS & flags())
    missing = sorted(INSTRUCTIONS - flags())
    kernels, *replaced = cpu_operators()
    compiler = find_compiler()
    return {
        "machine": describe(),
        "threads used": f"{threads()} (of {os.cpu_count()} processors)",
        "instructions": f"{', '.join(present) or 'none that kernels use'}"
        + f"; no {', '.join(missing)}" * bool(missing),
        "kernels": kernels,
        "int8 products": "torch's operator is exact" if operator_is_exact() else "torch's operator saturates: not used",
        "hardware products": ", ".join(
            f"{word}: {'yes' if there else 'no'}"
            for word, there in (
                ("int8", multiplies_int8()),
                ("bfloat16", multiplies_bfloat16()),
                ("matrix units", has_matrix_units()),
            )
        ),
        **{f"replaced {number}": text for number, text in enumerate(replaced, start=1)},
        "C compiler": "none: install gcc or set CC" if compiler is None else _first_line(compiler, "--version"),
        "variables": ", ".join(f"{name}={value}" for name, value in environment().items()) or "none set",
    }


def _gpus() -> Section:
    import torch

    from quantlab.runtime.device import find_device, free_bytes, name_of

    if not torch.cuda.is_available():
        built = "torch is built without CUDA" if torch.version.cuda is None else "none that torch can use"
        return {"CUDA": built}
    found = {"CUDA": str(torch.version.cuda)}
    for index in range(torch.cuda.device_count()):
        try:
            device = find_device(f"cuda:{index}")
        except DeviceError as error:
            found[f"cuda:{index}"] = f"not supported: {error.where}, {error.found}"
            continue
        capability = ".".join(str(part) for part in torch.cuda.get_device_capability(index))
        free = (free_bytes(device) or 0) / _GB
        total = torch.cuda.get_device_properties(index).total_memory / _GB
        found[f"cuda:{index}"] = f"{name_of(device)}, capability {capability}, {free:.1f} of {total:.1f} GB free"
    return found


def _optional() -> Section:
    return {
        package: version_of(package).get(package, "version unknown") if find_spec(module) else f"not installed ({use})"
        for package, (module, use) in _OPTIONAL.items()
    }


def _engines() -> Section:
    from quantlab.evaluation.engines.options import described_engines

    return {name: f"{python}; pinned {version}" for name, version, python, _ in described_engines()}


def _disk() -> Section:
    from huggingface_hub import constants, get_token

    places = {
        "working directory": Path.cwd(),
        "quantlab's cache": cache_directory(),
        "engines": engines_directory(),
        "Hugging Face cache": Path(constants.HF_HUB_CACHE),
    }
    found = {name: f"{path}, {_free(path)}" for name, path in places.items()}
    found["Hugging Face hub"] = (
        f"{constants.ENDPOINT}, {'offline' if constants.HF_HUB_OFFLINE else 'online'}, "
        f"{'logged in' if get_token() else 'not logged in'}"
    )
    found["hub variables"] = ", ".join(name for name in _HUB_VARIABLES if os.environ.get(name)) or "none set"
    return found


def _free(path: Path) -> str:
    """The free space of the disk that has, or will have, a path."""
    existing = next(place for place in (path, *path.parents) if place.exists())
    written = "" if path.exists() else "not there yet, "
    try:
        return f"{written}{shutil.disk_usage(existing).free / _GB:.1f} GB free"
    except OSError as error:
        return f"{written}{error.strerror}"


def _first_line(command: str, *arguments: str) -> str:
    """What a program prints first, after its path."""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command}: {error}"
    return f"{command}: {(done.stdout or done.stderr).strip().splitlines()[0] if done.stdout or done.stderr else '–'}"
