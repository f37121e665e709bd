"""What sentence-transformers' folder says beside the model: `modules.json`, and the files that it names.

Read are the pooling, dense layers behind it, the norm at the end, the longest text and the prompts by name. What is not
computed here is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.model import files
from service.model.config import ModelConfig
from service.model.layout import Weight, linear
from service.model.pooling import Activation, Dense, Pooled, Pooling
from service.model.weights import Tensors

MODES: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
ACTIVATIONS: Mapping[str, Activation] = {"Identity": "identity", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}


class Folder:
    """The modules of a directory, where there are any."""

    def __init__(self, directory: Path) -> None:
        """Read `modules.json`. Raises ValueError for modules in another order than model, pooling, dense layers, norm."""
        self._directory = directory
        self._path = directory / "modules.json"
        modules = _read_list(self._path) if self._path.is_file() else []
        self._kinds = [str(each.get("type")).rsplit(".", 1)[-1] for each in modules]
        self._folders = [str(each.get("path", "")) for each in modules]
        if modules:
            self._check()

    def _check(self) -> None:
        ends = 1 if self._kinds[-1] == "Normalize" else 0
        inner = self._kinds[2 : len(self._kinds) - ends]
        if self._kinds[:2] != ["Transformer", "Pooling"] or set(inner) - {"Dense"} or self._folders[0]:
            told = ", ".join(f"{kind} in {folder or '.'}" for kind, folder in zip(self._kinds, self._folders, strict=True))
            raise ValueError(f"{self._path} must say Transformer in ., Pooling, Dense or none, Normalize or none: {told}")
        for folder in self._folders:
            if Path(folder).name != folder:
                raise ValueError(f"{self._path} names {folder!r}, which is no folder beside it")

    def applied(self, config: ModelConfig) -> ModelConfig:
        """A model's config with what the modules say. Raises ValueError, FileNotFoundError."""
        if not self._kinds or config.pooled.labels:
            return config
        settings = files.read_json_if_there(self._directory / "config_sentence_transformers.json")
        told = {str(name): str(text) for name, text in (settings.get("prompts") or {}).items()}
        default = settings.get("default_prompt_name")
        if default is not None and default not in told:
            raise ValueError(f"default_prompt_name is {default}, the prompts are {', '.join(told) or 'none'}")
        if told and self._settings(1).get("include_prompt") is False:
            raise ValueError("include_prompt: false leaves prompts out of the pooling, which is not computed here")
        length = files.read_json_if_there(self._directory / "sentence_bert_config.json").get("max_seq_length")
        pooled = Pooled(
            pooling=self._pooling(),
            layers=tuple(self._dense(i) for i in self._dense_places()),
            is_normalized="Normalize" in self._kinds,
            length=length,
            prompts=tuple(told.items()),
            default_prompt=default,
        )
        return replace(config, pooled=pooled)

    def weights(self) -> Iterator[tuple[list[Weight], Tensors]]:
        """The dense layers' parameters and the files that they are in."""
        for layer, place in enumerate(self._dense_places()):
            plan, directory = self._dense(place), self._directory / self._folders[place]
            named = list(linear(f"pooler.layers.{layer}", ["linear"], plan.rows, plan.columns, plan.has_bias))
            yield named, Tensors(directory, "linear.")

    @property
    def folders(self) -> list[str]:
        """Those beside the model that are there: a norm has none."""
        return [folder for folder in self._folders if folder and (self._directory / folder).is_dir()]

    def _dense_places(self) -> list[int]:
        return [i for i, kind in enumerate(self._kinds) if kind == "Dense"]

    def _settings(self, place: int) -> dict[str, Any]:
        return files.read_json(self._directory / self._folders[place] / "config.json")

    def _pooling(self) -> Pooling:
        settings = self._settings(1)
        asked = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
        if isinstance(mode := settings.get("pooling_mode"), str):  # newer files
            asked = [name for name in MODES if name.removeprefix("pooling_mode_").split("_")[0] == mode] or [mode]
        if len(asked) != 1 or asked[0] not in MODES:
            raise ValueError(f"the pooling must be one of {', '.join(MODES)}, the checkpoint says {', '.join(asked) or 'none'}")
        return MODES[asked[0]]

    def _dense(self, place: int) -> Dense:
        settings = self._settings(place)
        name = str(settings.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
        if name not in ACTIVATIONS:
            raise ValueError(f"the activation of a dense layer must be one of {', '.join(ACTIVATIONS)}, received {name}")
        rows, columns = settings["out_features"], settings["in_features"]
        return Dense(rows, columns, ACTIVATIONS[name], bool(settings.get("bias", True)))


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(files.whole(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}): download it again") from error
    if not isinstance(found, list) or not found or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{path} must hold a list of modules")
    return found
