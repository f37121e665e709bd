"""What an operator can get wrong in a config file is told before anything starts: file, key, value, what is allowed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import MOST_FILE_BYTES, AttentionConfig, ConfigError, HttpConfig, HttpOptions, UserConfig, api_keys, read

LOCAL = Path(__file__).parent.parent / "deploy" / "local.yaml"


def written(folder: Path, change: Any) -> Path:
    """`deploy/local.yaml` after `change(its data)`, in a file of its own."""
    data = yaml.safe_load(LOCAL.read_text())
    change(data)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def at(*keys: str | int, value: Any) -> Any:
    """A change that puts `value` at a path of keys."""

    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


APP = ("applications", 0)
SWITCH = (*APP, "deployments", 0, "user_config", "attention")


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # in Ray's own source
def test_the_shipped_file_is_valid_and_ray_serve_takes_it() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(read(LOCAL).to_serve())
    assert schema.http_options.host == "127.0.0.1"
    assert list(schema.applications[0].deployments[0].user_config["attention"]["backends"]) == [
        "dense",
        "sliding_window",
        "performer",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (at("http_option", value={}), ("http_option", "unknown key", "http_options")),
        (at("http_options", "prot", value=1), ("http_options.prot", "unknown key", "port")),
        (at(*APP, "args", "thread", value=2), ("applications.0.args.thread", "unknown key", "threads")),
        (at(*APP, "args", "engine", value={"memory_shar": 1}), ("args.engine.memory_shar", "memory_share")),
        (at(*APP, "args", "http", "max_body", value=1), ("args.http.max_body", "max_body_bytes")),
        (at(*APP, "deployments", 0, "replicas", value=2), ("deployments.0.replicas", "num_replicas")),
        (at(*SWITCH, "fallback", value="dense"), ("user_config.attention.fallback", "default, backends")),
        (at(*SWITCH, "backends", "dens", value={}), ("user_config.attention.backends", "'dens'", "dense")),
        (at(*SWITCH, "backends", "sliding_window", value={"windw": 5}), ("sliding_window.windw", "unknown key", "window")),
        (at(*SWITCH, "backends", "sliding_window", value={"window": -1}), ("sliding_window.window", "-1")),
        (at(*SWITCH, "backends", "performer", value={"features": "many"}), ("performer.features", "many")),
        (at(*SWITCH, "default", value="longformer"), ("attention", "dense, sliding_window, performer", "'longformer'")),
        (
            at(*SWITCH, "backends", "topk", value={"block": 32, "window": 16}),
            ("topk", "block must be at most the window of 16"),
        ),
        (
            at(*SWITCH, "backends", "layered", value={"layers": {"0": {}, "2": {}}}),
            ("layered.layers", "layer 1 has no backend"),
        ),
        (at(*SWITCH, "backends", value={}), ("attention.backends", "at least 1")),
        (at("http_options", "port", value=70000), ("http_options.port", "65535", "70000")),
        (at(*APP, "args", "threads", value=0), ("args.threads", "greater than 0", "0")),
        (at(*APP, "args", "dtype", value="int8"), ("args.dtype", "bfloat16", "'int8'")),
        (at(*APP, "args", "weights", value="int2"), ("args.weights", "int8", "int4", "'int2'")),
        (at(*APP, "args", "kv", value="int4"), ("args.kv", "bf16", "int8", "'int4'")),
        (at(*APP, "args", "kv", value="int8"), ("args.kv is int8", "cannot keep", "performer")),
        (at(*APP, "import_path", value="os:system"), ("import_path", "service.app:build", "os:system")),
        (at("http_options", "host", value="0.0.0.0"), ("0.0.0.0", "api_keys_env")),
        (at("applications", value=[]), ("applications", "at least 1")),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(change: Any, words: tuple[str, ...], tmp_path: Path) -> None:
    path = written(tmp_path, change)
    with pytest.raises(ConfigError) as refusal:
        read(path)
    message = str(refusal.value)
    assert str(path) in message
    assert [word for word in words if word not in message] == []


def test_every_fault_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    def change(data: Any) -> None:
        data["http_options"]["port"] = 0
        data["applications"][0]["args"]["nmae"] = "x"

    with pytest.raises(ConfigError) as refusal:
        read(written(tmp_path, change))
    assert "http_options.port" in str(refusal.value)
    assert "args.nmae" in str(refusal.value)


@pytest.mark.parametrize(("text", "word"), [("a: [1", "YAML"), ("", "object"), ("- 1", "object"), ("\xff", "no YAML")])
def test_a_file_that_is_no_config_is_refused(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as refusal:
        read(path)
    assert str(path) in str(refusal.value)
    assert word in str(refusal.value)


def test_what_is_wrong_with_yaml_is_told_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("a: 1\nb: [1,\nc: 2\n")
    with pytest.raises(ConfigError, match=r"no YAML: .* line \d+, column") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["long.yaml", "/dev/zero"])
def test_a_file_that_is_too_long_is_not_read_to_its_end(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if not path.exists():
        path.write_bytes(b"#" * (MOST_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match=f"{name}: larger than 1 MiB"):
        read(path)


def test_a_file_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "local.yaml"
    path.write_text("# für alle\n" + LOCAL.read_text(), encoding="utf-8")
    code = f"from pathlib import Path; from service.config import read; read(Path({str(path)!r}))"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code], env=os.environ | locale, check=True, timeout=60)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: No such file"):
        read(tmp_path / "absent.yaml")


def test_a_model_directory_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    path = written(tmp_path, at(*APP, "args", "model", value="weights"))
    assert read(path).applications[0].args.model == str(tmp_path / "weights")


def test_a_public_address_is_served_once_keys_are_named(tmp_path: Path) -> None:
    def change(data: Any) -> None:
        data["http_options"]["host"] = "0.0.0.0"
        data["applications"][0]["args"]["http"]["api_keys_env"] = "KEYS"

    assert not read(written(tmp_path, change)).http_options.is_loopback


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("::", False), ("example.org", False)],
)
def test_only_this_machine_reaches_a_loopback_address(host: str, is_loopback: bool) -> None:
    assert HttpOptions(host=host).is_loopback == is_loopback


def test_keys_that_are_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", " one, two ,")
    assert api_keys(HttpConfig(api_keys_env="KEYS")) == ("one", "two")
    monkeypatch.setenv("KEYS", " , ")
    with pytest.raises(ValueError, match="KEYS"):
        api_keys(HttpConfig(api_keys_env="KEYS"))


def test_without_a_user_config_dense_serves() -> None:
    assert UserConfig().attention.for_checkpoint(None).default == "dense"


def test_a_checkpoint_with_windows_is_served_under_them_unless_the_file_says_otherwise() -> None:
    own = {"windows": [None, 31]}
    served = UserConfig().attention.for_checkpoint(own)
    assert (served.default, list(served.backends)) == ("native", ["native", "dense"])
    assert served.backends["native"] == own
    assert served.for_checkpoint(own) == served == AttentionConfig.model_validate_json(served.model_dump_json())
    other = AttentionConfig(default="dense", backends={"dense": {}, "native": {"impl": "torch"}}).for_checkpoint(own)
    assert other.default == "dense" and other.backends["native"] == {"impl": "torch", **own}


@pytest.mark.parametrize(
    ("attention", "own", "says"),
    [
        ({"default": "native"}, None, "sees everything in every layer"),
        ({"backends": {"dense": {}, "native": {}}}, None, "sees everything in every layer"),
        ({"backends": {"dense": {}, "native": {"windows": [5, 5]}}}, {"windows": [None, 31]}, "native.windows: that is the"),
    ],
)
def test_a_switch_that_contradicts_the_checkpoint_is_refused(
    attention: dict[str, Any], own: dict[str, Any] | None, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        AttentionConfig.model_validate(attention).for_checkpoint(own)


def test_a_switch_is_the_same_in_the_file_and_as_serve_hands_it_on(tmp_path: Path) -> None:
    """`longserve apply` compares the two; a layer's number is a number in YAML and text in JSON."""
    path = tmp_path / "layers.yaml"
    switch = "{layered: {layers: {0-4: {sliding_window: {}}, 5: {topk: {}}}}}"
    path.write_text(
        "applications:\n  - deployments:\n      - user_config: {attention: {default: layered, backends: " + switch + "}}\n"
    )
    file = read(path)
    (section,) = json.loads(json.dumps(file.to_serve()))["applications"][0]["deployments"]
    handed = UserConfig.model_validate(section["user_config"]).attention
    assert handed == file.applications[0].deployments[0].user_config.attention
    assert handed.model_dump() == file.applications[0].deployments[0].user_config.attention.model_dump()
    path.write_text("applications: [{name: 2026-11-26}]")
    with pytest.raises(ConfigError, match="not to be told as JSON"):
        read(path)
