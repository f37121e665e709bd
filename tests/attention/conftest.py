"""Backends are inference only, so every test here runs without autograd; beside it a machine without AVX-512."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.sanitizers import HEADERS, ROOT, SOURCES


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def without_avx512(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the kernels as built for a CPU without AVX-512; an empty one where gcc is missing."""
    folder = tmp_path_factory.mktemp("without")
    target = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-DWITHOUT_AVX512", "-mno-avx512f", "-Werror", "-fopenmp", "-fPIC", "-shared", f"-I{HEADERS}"]
    if shutil.which("gcc"):
        subprocess.run(["gcc", *flags, "-o", target, *(ROOT / source for source in SOURCES), "-lm"], check=True)
    return folder
