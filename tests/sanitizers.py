"""The compiled kernels built once more under AddressSanitizer and UBSan, and Python with them in place of the ones installed.

A kernel that touches a byte that is not its own, or leans on what C does not define, ends the process there with a report.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADERS = ROOT / "attention/kernels"
SOURCES = (
    "attention/kernels/softmax/softmax.c",
    "attention/kernels/features/features.c",
    "attention/kernels/int8.c",
    "attention/kernels/team.c",
    "service/model/csrc/encoder.c",
    "service/model/csrc/layer.c",
)
FLAGS = [
    *("-O1", "-fopenmp", "-fPIC", "-shared", f"-I{HEADERS}"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
    *(
        "--param",
        "asan-instrumentation-with-call-threshold=0",
    ),  # calls, not copies, of each check: a fifth of the time to compile
]


def runtime() -> list[str]:
    """The libraries to be loaded before all others; empty where gcc or its sanitizers are missing."""
    if shutil.which("gcc") is None:
        return []
    found = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return found if all(os.path.isabs(path) for path in found) else []  # gcc repeats the name of what it has not


def build(cache: Path) -> Path:
    """The folder with the library, built from the sources as they stand unless that was done already."""
    sources = [ROOT / name for name in SOURCES]
    digest = hashlib.sha256(subprocess.check_output(["gcc", "--version"]) + repr(FLAGS).encode())
    for path in sorted([*sources, *HEADERS.glob("*.h"), *(ROOT / "service/model/csrc").glob("*.h")]):
        digest.update(path.read_bytes())
    built = cache / digest.hexdigest()[:16]
    if not built.exists():
        new = cache / f"{built.name}.{os.getpid()}"
        new.mkdir(parents=True)
        library = new / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        subprocess.run(["gcc", *FLAGS, "-o", library, *sources, "-lm"], check=True)
        new.rename(built)
    return built


def run(built: Path, arguments: list[str], timeout_seconds: float) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, that finds the folder with the library as SANITIZED in its environment."""
    options = "detect_leaks=0:abort_on_error=1:detect_odr_violation=0"
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtime()),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",  # beside other processes, waiting threads would take most of the time
        "SANITIZED": str(built),
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_seconds)
