"""`python -m attention.picture NAME [option=value ...]`: what its tokens see, as text, and with `--png FILE` drawn.

Rows are queries, columns are keys, the first token at the top left. An exact backend is drawn by its `visible`; one with a
kernel of its own by what each key weighs for drawn queries and keys, darker for more. Causal on the left, both sides on the
right, where the backend has both. Without options it takes some that show the whole pattern on 32 tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attention import AttentionBackend, HeadShape, build, reference

TOKENS = 32
SHADES = " .:-=+*#%@"
SHAPE = HeadShape(1, 1, 16)
SMALL: Mapping[str, Mapping[str, Any]] = {
    "sliding_window": {"window": 6, "sinks": 2},
    "longformer": {"window": 4, "global_tokens": 2},
    "bigbird": {"block": 2, "global_blocks": 1, "random_blocks": 2},
    "chunked": {"chunk": 8},
    "topk": {"block": 2, "blocks": 2, "window": 4, "sinks": 1},
    "distinct": {"window": 4, "kept": 6, "sinks": 1, "block": 2},
    "performer": {"features": 64},
}


def shades(backend: AttentionBackend, tokens: int, causal: bool) -> Tensor:
    """How dark each pair is, 0 to 1, (tokens, tokens)."""
    if backend.exact:
        return reference.visible(backend, torch.arange(tokens), tokens, causal).double()
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(tokens, 1, SHAPE.head_width, generator=generator) for _ in range(2))
    weights = reference.weights(backend, q, k, k, causal=causal)[0]
    return weights / weights.amax(-1, keepdim=True)


def text(backend: AttentionBackend, tokens: int) -> str:
    """A character for each pair, directions side by side."""
    panels = [shades(backend, tokens, causal) for causal in backend.directions]
    lines = zip(*((_line(row) for row in panel) for panel in panels), strict=True)
    heads = "   ".join(("causal" if causal else "both sides").ljust(2 * tokens) for causal in backend.directions)
    return "\n".join([heads.rstrip(), *("   ".join(line).rstrip() for line in lines)])


def _line(row: Tensor) -> str:
    return "".join(SHADES[round(shade * (len(SHADES) - 1))] * 2 for shade in row.tolist())


def draw(backend: AttentionBackend, tokens: int, path: str) -> None:
    """The same as a PNG. Needs matplotlib (extra `loadtest`)."""
    from matplotlib.figure import Figure

    count = len(backend.directions)
    figure = Figure(figsize=(1.9 * count, 2.1), dpi=100, layout="constrained")
    for panel, causal in zip(figure.subplots(1, count, squeeze=False)[0], backend.directions, strict=True):
        panel.imshow(shades(backend, tokens, causal).numpy(), cmap="Blues", vmin=0, vmax=1.2, interpolation="nearest")
        panel.set_title("causal" if causal else "both sides", fontsize=8)
        panel.set_xticks([])
        panel.set_yticks([])
    figure.savefig(path, metadata={"Software": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the picture, and write it where a file is named."""
    parser = argparse.ArgumentParser(prog="python -m attention.picture", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name")
    parser.add_argument("options", nargs="*", metavar="option=value")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--png", metavar="FILE")
    chosen = parser.parse_args(arguments)
    options = dict(option.split("=", 1) for option in chosen.options) or SMALL.get(chosen.name, {})
    try:
        backend = build(chosen.name, options, SHAPE)
    except ValueError as error:
        parser.error(str(error))
    print(text(backend, chosen.tokens))
    if chosen.png:
        draw(backend, chosen.tokens, chosen.png)


if __name__ == "__main__":
    main()
