"""The files of a checkpoint directory: found, opened and held to be what their names say. Nothing is fetched or unpickled.

Each refusal names the file and what to do about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LFS_MARK = b"version https://git-lfs"
SHARD = re.compile(r"[\w .+-]{1,200}\.safetensors")


def find(directory: Path) -> Path:
    """A checkpoint's directory. Raises FileNotFoundError where there is none, or nothing in it to serve."""
    if not directory.is_dir():
        told = f"no directory {directory}"
        if len(directory.parts) > 1 and not directory.parent.exists():
            told += (
                f"; if {'/'.join(directory.parts[-2:])} is a repository of a hub, download it: models are read from disk only"
            )
        raise FileNotFoundError(told)
    if not (directory / "config.json").is_file():
        found = [pattern for pattern in ("*.gguf", "adapter_config.json", "params.json") if any(directory.glob(pattern))]
        told = f" ({', '.join(found)} is another format)" if found else ""
        raise FileNotFoundError(f"no config.json in {directory}{told}: a directory in Hugging Face format is needed")
    return directory


def whole(path: Path) -> Path:
    """A file that is there, and is no stand-in for one. Raises FileNotFoundError or ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    with path.open("rb") as file:
        if file.read(len(LFS_MARK)) == LFS_MARK:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: `git lfs pull` in its folder fetches it")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file. Raises FileNotFoundError, or ValueError for what is no JSON object."""
    found = whole(path)
    try:
        read = json.loads(found.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): download it again") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return read


def read_json_if_there(path: Path) -> dict[str, Any]:
    """A JSON file, or an empty object where there is none. Raises ValueError."""
    return read_json(path) if path.is_file() else {}


def weight_files(directory: Path) -> Mapping[str, str | None]:
    """Files with weights by name: a tensor's to the file that holds it, or `model.safetensors` alone with no tensor named.

    `model.safetensors` counts where it is there, as in transformers; an index beside it is a leftover.
    """
    if (directory / "model.safetensors").is_file():
        return {"model.safetensors": None}
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(_why_no_weights(directory))
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ValueError(f"{index} names {name!r}, which is no .safetensors file of its folder")
    return places


def _why_no_weights(directory: Path) -> str:
    told = f"no model.safetensors in {directory}; only safetensors are loaded"
    others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5") for path in directory.glob(pattern))
    if others:
        told += f", and {others[0]} is not: transformers' save_pretrained writes it anew as safetensors"
    return told
