"""What a checkpoint would be served as, told from its config and the headers of its files: nothing is loaded or started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import attention
from attention import result, shares, truth
from service.config import AttentionConfig, ServiceConfig
from service.engine.allowlist import check_room, unmeasured
from service.model import checkpoint, fidelity, files, rotary
from service.model.config import ModelConfig
from service.model.quantized import BITS, bits_of, bytes_of
from service.model.tokenizer import Tokenizer
from service.model.transformer import Transformer

LENGTHS = (1024, 4096, 16384, 65536, 262144)
REHEARSED_TOKENS = 300  # of the longest sequence in a rehearsal: the replicas check the whole pattern
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "min_p")


def survey(directory: Path, args: ServiceConfig, switch: AttentionConfig) -> Iterator[str]:
    """Lines that tell what `args` and `switch` would make of a directory: model, ends of text, backends, bytes by length.

    Raises:
        FileNotFoundError, ValueError: what `checkpoint.load` refuses, but for numbers in the weights that are none; weights in
            fewer bits that are not multiplied here as they are defined.
    """
    directory = files.find(directory)
    config = checkpoint.read_layout(directory)[0].up_to(args.max_length).keeping(args.kv)
    tokenizer = Tokenizer.load(directory, config.eos_token_id, config.vocab_size)
    dtype, reason = checkpoint.choose_dtype(args.dtype, args.device)
    checkpoint.check_kept(dtype, args.weights, args.kv)
    model = checkpoint.outline(config).to(dtype)
    name = str(dtype).removeprefix("torch.")
    yield f"{args.name or checkpoint.id_of(directory)}: {config.model_type}, {model.num_weights / 1e6:.1f} million parameters"
    yield f"dtype       {name}, {_weights(model, args.weights)} ({reason})"
    if args.weights in BITS:
        yield _products(model, args)
    if config.kv is not None:
        yield _states(config, model, args)
    yield f"context     {config.max_length} tokens, vocabulary {len(tokenizer.ids)}{_positions(config)}"
    yield f"offers      {_offer(config)}"
    if config.is_causal:
        yield f"ends        {', '.join(map(str, config.eos_token_ids)) or 'none: answers end by max_tokens alone'}"
        yield f"sampling    {_sampling(directory)}"
    yield f"attends     {_own(config)}"
    yield from _table(config, model, args, switch.for_checkpoint(config.native))


def rehearse(args: ServiceConfig, switch: AttentionConfig, dtype: str, budget: int) -> None:
    """Build and check what a switch names as the replicas of `args` would, but for the weights: for their model's heads.

    dtype, budget: the dtype the replicas serve in, and the bytes that each has for its requests.

    Raises:
        ValueError, FileNotFoundError: one of the backends cannot serve, or not even the shortest request in so many bytes;
            weights in fewer bits that are not multiplied here as they are defined.
    """
    directory = checkpoint.EMBEDDED if args.model == "embedded" else Path(args.model)
    config = checkpoint.read_config(directory).up_to(args.max_length).keeping(args.kv)
    model = checkpoint.outline(config).to(checkpoint.DTYPES[dtype])
    if args.weights in BITS:
        _products(model, args)
    shape = config.head_shape(model.dtype, args.device)
    for name, options in switch.for_checkpoint(config.native).backends.items():
        backend = attention.build(name, options, shape)
        check_room(unmeasured(name, backend, model, args.engine.chunk_tokens, budget), budget)
        for kind in shares(backend):
            verdict = result(truth.checking(kind, max_length=min(REHEARSED_TOKENS, config.max_length), causal=config.is_causal))
            if not verdict.passed:
                raise ValueError(f"{name} is {verdict.told}")


def _weights(model: Transformer, weights: str) -> str:
    """Their bytes, and whether they are kept in fewer bits than the file has."""
    size = 0
    for name, parameter in model.named_parameters():
        bits = bits_of(weights, name)
        size += parameter.nbytes if bits is None else bytes_of(parameter.shape, bits)
    return f"{_mib(size)} MiB of weights" + (f", matrices in {weights}: lossy" if weights in BITS else "")


def _products(model: Transformer, args: ServiceConfig) -> str:
    """How weights in fewer bits are multiplied on this machine, tried on drawn ones of these widths. ValueError: wrongly."""
    verdict = result(fidelity.rehearsing(model.config, model.dtype, args.device, args.weights))
    told = f"{args.weights}, {verdict.told}"
    if not verdict.passed:
        raise ValueError(f"weights in {told}")
    return f"products    in {told}"


def _states(config: ModelConfig, model: Transformer, args: ServiceConfig) -> str:
    """How keys and values in 8 bits are read on this machine, tried under dense on drawn ones. ValueError: wrongly."""
    shape = config.head_shape(model.dtype, args.device)
    exact, eight = (attention.build("dense", None, replace(shape, kv=kv)) for kv in (None, shape.kv))
    verdict = result(truth.checking(eight, max_length=REHEARSED_TOKENS))
    told = f"keys and values in int8, {replace(verdict, of='their definition').told}"
    if not verdict.passed:
        raise ValueError(told)
    size = 2 * config.num_hidden_layers * shape.kept_bytes
    less = shape.kept_bytes / exact.shape.kept_bytes
    return f"keeps       {told}: lossy; {size} bytes a token, {less:.0%} of {str(shape.dtype).removeprefix('torch.')}'s"


def _offer(config: ModelConfig) -> str:
    """What it can be asked for, and how vectors are made."""
    plan = config.pooled
    if plan.labels:
        told = ", ".join(plan.labels[:8]) + (", ..." if len(plan.labels) > 8 else "")
        routes = "/v1/classify" + (", /v1/score, /v1/rerank" if len(plan.labels) == 1 else "")
        return f"{routes}: {len(plan.labels)} labels ({told}) of the {plan.pooling} state, scores by {plan.activation}"
    width, end = plan.width(config.hidden_size), "at length one" if plan.is_normalized else "of any length"
    told = f"/v1/embeddings: {width} numbers of the {plan.pooling} state, {end}"
    if plan.prompts:
        told += f", prompts {', '.join(name for name, _ in plan.prompts)} (default: {plan.default_prompt or 'none'})"
    return f"/v1/completions, {told}" if config.is_causal else told


def _sampling(directory: Path) -> str:
    """What becomes of the defaults that the checkpoint suggests."""
    stated = files.read_json_if_there(directory / "generation_config.json")
    suggested = [f"{name} {stated[name]}" for name in SAMPLING if stated.get(name) is not None]
    if not suggested:
        return "nothing suggested"
    return f"the file suggests {', '.join(suggested)}: callers say theirs, these are not taken"


def _positions(config: ModelConfig) -> str:
    """Which of LongRoPE's factors a text has: transformers takes others in the midst of an answer, for all of the text."""
    borders = [border for rope in config.ropes if (border := rotary.border(rope, config.max_length))]
    if not borders:
        return ""
    return f"; LongRoPE's short factors where prompt and max_tokens are {borders[0]} together at most, else its long ones"


def _own(config: ModelConfig) -> str:
    if not config.is_causal:
        return f"both ways, {_seen(config)}"
    if config.native is None:
        return "to everything in every layer: under any backend but dense answers are others than transformers'"
    layers = sum(window is not None for window in config.windows)
    seen = sorted({window + 1 for window in config.windows if window is not None})
    cap = "" if config.score_cap is None else f", scores capped at {config.score_cap:g}"
    last = (
        f"the last {' or '.join(map(str, seen))} tokens in {layers} of {len(config.windows)} layers" if seen else "everything"
    )
    return f"to {last}{cap}, as backend native"


def _seen(config: ModelConfig) -> str:
    """What an encoder's tokens see."""
    if config.score_bias is not None:
        return "to the whole text in every layer, with biases by distance, as backend native"
    if config.blocks is not None:
        return "in blocks of {} tokens, {} drawn for each, as backend native".format(*config.blocks)
    if config.native is None:
        return "to the whole text in every layer, as backend dense"
    layers, seen = sum(window is not None for window in config.windows), sorted({w for w in config.windows if w is not None})
    told = " or ".join(map(str, seen))
    return f"{told} tokens on either side in {layers} of {len(config.windows)} layers, as backend native"


def _table(config: ModelConfig, model: Transformer, args: ServiceConfig, switch: AttentionConfig) -> Iterator[str]:
    """A row per backend: MiB of one request by length."""
    longest = config.max_length
    lengths = [*(length for length in LENGTHS if length < longest), longest]
    yield f"{'MiB of a request of so many tokens':40}" + "".join(f"{length:>10}" for length in lengths)
    shape = config.head_shape(model.dtype, args.device)
    for name, options in switch.backends.items():
        lane = unmeasured(name, attention.build(name, options, shape), model, args.engine.chunk_tokens, 0)
        sizes = [lane.state_bytes(length) + lane.course.prefill_bytes(length) for length in lengths]
        marks = [name, *(["default"] if name == switch.default else []), *(["lossy"] if config.lossy(name) else [])]
        yield f"  {', '.join(marks):38}" + "".join(f"{_mib(size):>10}" for size in sizes)
    if why := config.lossy("the backend"):
        yield f"lossy: {why}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
