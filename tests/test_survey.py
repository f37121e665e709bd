"""`longserve check` tells beforehand what serving would do, in the numbers that the engine admits by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attention
from attention.kernels import int8
from service import cli
from service import config as settings
from service.config import AttentionConfig, ServiceConfig
from service.model.checkpoint import load
from service.model.quantized import Quantized
from service.survey import rehearse
from tests.engine import world
from tests.model import encoders
from tests.model.checkpoints import change, own_backend, write
from tests.serving import LOCAL

CONFIG = """
applications:
  - args: {dtype: float32}
    deployments:
      - name: longserve
        user_config: {attention: {backends: {dense: {}, sliding_window: {window: 20}}}}
"""


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, list[str]]:
    """What is told of a checkpoint with windows."""
    (tmp_path / "serve.yaml").write_text(CONFIG)
    directory = write(tmp_path / "tiny", "mistral", sliding_window=32, max_position_embeddings=3000)
    change(directory, "generation_config.json", eos_token_id=[3, 9], temperature=0.6)
    capsys.readouterr()
    assert cli.main(["check", str(directory), str(tmp_path / "serve.yaml")]) == 0
    return directory, capsys.readouterr().out.splitlines()


def test_it_tells_the_model_its_ends_and_which_backends_are_lossy(told: tuple[Path, list[str]]) -> None:
    directory, lines = told
    count = sum(parameter.numel() for parameter in load(directory).model.parameters())
    assert lines[0] == f"tiny: mistral, {count / 1e6:.1f} million parameters"
    assert "float32" in lines[1] and "3000 tokens" in lines[2] and "3, 9" in lines[4] and "temperature 0.6" in lines[5]
    assert lines[3] == "offers      /v1/completions, /v1/embeddings: 48 numbers of the mean state, at length one"
    assert "last 32 tokens in 2 of 2 layers" in lines[6]
    rows = [line.split("  ")[1] for line in lines[8:11]]
    assert rows == ["native, default", "dense, lossy", "sliding_window, lossy"]


async def test_its_bytes_are_those_that_the_engine_reserves(told: tuple[Path, list[str]]) -> None:
    directory, lines = told
    loaded = load(directory, dtype="float32")
    from service.engine.allowlist import Backends

    backends = {
        "native": own_backend(loaded.model),
        "dense": attention.build("dense", None, loaded.model.head_shape()),
        "sliding_window": attention.build("sliding_window", {"window": 20}, loaded.model.head_shape()),
    }
    async with world.running(loaded.model, Backends(backends, "native"), tokenizer=loaded.tokenizer) as engine:
        for name, line in zip(backends, lines[8:11], strict=True):
            plan = engine.plan(world.completion(torch.zeros(1024, dtype=torch.long).tolist(), backend=name, max_tokens=0))
            needed = plan.terms["state"] + plan.terms["step"]
            assert float(line.split()[-2]) == pytest.approx(needed / 2**20, abs=0.05)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_in_fewer_bits_are_told_as_lossy_and_by_the_bytes_they_take(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write(tmp_path / "tiny", "qwen3", hidden_size=64, intermediate_size=192, tie_word_embeddings=True)
    (tmp_path / "serve.yaml").write_text(CONFIG)
    assert cli.main(["check", str(directory), str(tmp_path / "serve.yaml"), "--weights", weights]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    size = load(directory, dtype="float32", weights=weights).model.weight_bytes
    assert f"{size / 2**20:.1f} MiB of weights, matrices in {weights}: lossy" in line


def test_keys_and_values_in_8_bits_are_told_as_lossy_and_by_the_bytes_they_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write(tmp_path / "tiny", "llama", max_position_embeddings=3000)
    (tmp_path / "serve.yaml").write_text(CONFIG)
    asked = ["check", str(directory), str(tmp_path / "serve.yaml"), "--kv", "int8"]
    assert cli.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    model = load(directory, dtype="float32", kv="int8").model
    shape, dense = model.head_shape(), attention.build("dense", None, model.head_shape())
    size = model.config.num_hidden_layers * dense.state_bytes(256) // 256
    assert f"lossy; {size} bytes a token, {(shape.head_width + 4) / (4 * shape.head_width):.0%} of float32's" in lines[2]
    honest = int8.dequantize
    monkeypatch.setattr("attention.kernels.softmax.torch.dequantize", lambda x, dtype: honest(x, dtype) * 1.01)
    assert cli.main(asked) == 1
    assert "keys and values in int8, off their definition by" in capsys.readouterr().err


def test_an_encoder_which_keeps_no_keys_and_values_refuses_to_keep_them_in_8_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "serve.yaml").write_text(CONFIG)
    assert (
        cli.main(["check", str(encoders.write(tmp_path / "tiny", "bert")), str(tmp_path / "serve.yaml"), "--kv", "int8"]) == 1
    )
    assert "kv: int8 is for decoders" in capsys.readouterr().err


def test_bf16_is_refused_by_its_key_where_the_dtype_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "serve.yaml").write_text(CONFIG)
    assert cli.main(["check", str(write(tmp_path / "tiny", "llama")), str(tmp_path / "serve.yaml"), "--kv", "bf16"]) == 1
    assert "kv: bf16 needs dtype: bfloat16, which here is torch.float32" in capsys.readouterr().err


def survey_of(directory: Path, tmp_path: Path, backends: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is told of an encoder under some backends."""
    told = f"user_config: {{attention: {{backends: {backends}}}}}"
    text = CONFIG.partition("user_config")[0] + told + "\n"
    (tmp_path / "serve.yaml").write_text(text)
    capsys.readouterr()
    assert cli.main(["check", str(directory), str(tmp_path / "serve.yaml")]) == 0
    return capsys.readouterr().out.splitlines()


def test_an_encoder_is_served_under_the_list_that_decoders_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = encoders.write(tmp_path / "tiny", "bert")
    assert cli.main(["check", str(directory), str(LOCAL)]) == 0
    rows = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {row.split(",")[0] for row in rows} >= {"dense", "sliding_window", "performer"}
    deployment = settings.read(LOCAL).applications[0]
    args = deployment.args.model_copy(update={"model": str(directory)})
    rehearse(args, deployment.deployments[0].user_config.attention, "float32", 2**28)  # each backend against its definition


async def test_of_an_encoder_it_tells_the_task_the_pooling_and_which_backends_are_lossy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = encoders.write(tmp_path / "tiny", "bert")
    encoders.write_modules(directory, "cls_token", normalize=False, prompts={"query": "q: "})
    lines = survey_of(directory, tmp_path, "{dense: {}, longformer: {window: 9}}", capsys)
    assert lines[3] == "offers      /v1/embeddings: 48 numbers of the cls state, of any length, prompts query (default: none)"
    assert lines[4] == "attends     both ways, to the whole text in every layer, as backend dense"
    rows = [line.split("  ")[1] for line in lines[6:8]]
    assert rows == ["dense, default", "longformer, lossy"] and "trained to see the whole text" in lines[8]
    loaded = load(directory, dtype="float32")
    backends = encoders.backends_of(loaded.model, longformer={"window": 9})
    async with world.running(loaded.model, backends, tokenizer=loaded.tokenizer) as engine:
        for name, line in zip(backends.by_name, lines[6:8], strict=True):
            plan = engine.plan(world.embedding([5] * encoders.LENGTH, backend=name))
            assert float(line.split()[-1]) == pytest.approx(sum(plan.terms.values()) / 2**20, abs=0.05)


def test_of_a_classifier_it_tells_the_labels_and_of_layers_with_windows_how_wide(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, names = "AutoModelForSequenceClassification", {0: "bad", 1: "good"}
    directory = encoders.write(tmp_path / "tiny", "modernbert", kind, id2label=names, classifier_pooling="mean")
    lines = survey_of(directory, tmp_path, "{dense: {}, bigbird: {block: 8}}", capsys)
    assert lines[3] == "offers      /v1/classify: 2 labels (bad, good) of the mean state, scores by softmax"
    assert lines[4] == "attends     both ways, 10 tokens on either side in 2 of 4 layers, as backend native"
    rows = [line.split("  ")[1] for line in lines[6:9]]
    assert rows == ["native, default", "dense, lossy", "bigbird, lossy"] and "windows of its own" in lines[9]


def test_what_serving_would_refuse_is_refused_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = write(tmp_path / "tiny", "llama")
    change(directory, odd_scale=3.0)
    assert cli.main(["check", str(directory)]) == 1
    assert "odd_scale: 3.0" in capsys.readouterr().err
    assert cli.main(["check", str(tmp_path / "Some" / "Model-7B")]) == 1
    assert "Some/Model-7B is a repository of a hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backends", "budget", "says"),
    [
        ({"longformer": {}}, 2**30, "longformer has no causal form"),
        ({"dense": {}, "performer": {"features": 65536}}, 2**26, "performer needs [0-9]+ bytes for a request of one token"),
        ({"native": {}}, 2**30, "native"),
    ],
)
def test_a_backend_that_cannot_serve_is_found_without_weights(backends: dict[str, Any], budget: int, says: str) -> None:
    switch = AttentionConfig.model_construct(default=next(iter(backends)), backends=backends)
    with pytest.raises(ValueError, match=says):
        rehearse(ServiceConfig(), switch, "float32", budget)


def test_a_backend_that_answers_wrongly_does_not_pass_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    sliding = attention.backend_class("sliding_window")
    monkeypatch.setattr(sliding, "visible", lambda self, i, j, length: (i - j).abs() <= 3)
    switch = AttentionConfig(default="sliding_window", backends={"sliding_window": {"window": 4}})
    with pytest.raises(ValueError, match="sliding_window is off its definition"):
        rehearse(ServiceConfig(), switch, "float32", 2**30)
    rehearse(ServiceConfig(), AttentionConfig(), "float32", 2**30)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_products_that_are_wrong_here_pass_neither_the_check_nor_the_rehearsal(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write(tmp_path / "tiny", "qwen3", hidden_size=64, intermediate_size=192)
    args = ServiceConfig(model=str(directory), weights=weights)  # type: ignore[arg-type]
    (tmp_path / "serve.yaml").write_text(CONFIG)
    asked = ["check", str(directory), str(tmp_path / "serve.yaml"), "--weights", weights]
    assert cli.main(asked) == 0
    assert f"products    in {weights}, off the numbers its weights tell by" in capsys.readouterr().out
    rehearse(args, AttentionConfig(), "float32", 2**30)
    honest = Quantized.product
    monkeypatch.setattr(Quantized, "product", lambda self, x, bias=None: honest(self, x, bias) * 1.01)
    assert cli.main(asked) == 1
    assert "off the numbers its weights tell" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"weights in {weights}, off the numbers"):
        rehearse(args, AttentionConfig(), "float32", 2**30)


def test_of_longrope_it_tells_which_request_has_which_factors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.model.test_parity import TRAINED, stretched

    directory = stretched(tmp_path / "tiny")
    told = f"LongRoPE's short factors where prompt and max_tokens are {TRAINED} together at most, else its long ones"
    assert told in survey_of(directory, tmp_path, "{dense: {}}", capsys)[2]
    cut = CONFIG.replace("dtype: float32", f"dtype: float32, max_length: {TRAINED}")
    (tmp_path / "serve.yaml").write_text(cut)
    assert cli.main(["check", str(directory), str(tmp_path / "serve.yaml")]) == 0
    assert "LongRoPE" not in capsys.readouterr().out
