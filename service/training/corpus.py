"""The corpus: the running interpreter's standard library, split by module, and its tokenizer.

Every `.py` file below the standard library's directory that is UTF-8 and not empty, third-party packages left out.
A module is held out when the first four bytes of the SHA-256 of its path, taken as a number, are a multiple of 20: a
twentieth, fixed for good. A held-out text that stands under a second path is removed from training too, by hash of
its content.

    python -m service.training.corpus --out DIR        trains the tokenizer, writes it and the token files to DIR
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

EOS = "<|endoftext|>"
VOCABULARY = 4096
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}
WORDS = (
    r"\r?\n[\r\n]*[ \t]*"  # a line's end and the next one's indentation
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word with the sign or blank in front of it
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|\s+"
)


@dataclass(frozen=True)
class Module:
    """One source file: its path below the standard library, and its text."""

    path: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def held_out(self) -> bool:
        return int.from_bytes(hashlib.sha256(self.path.encode()).digest()[:4], "big") % 20 == 0


def modules(root: Path | None = None) -> Iterator[Module]:
    """All modules below `root` (the running interpreter's standard library), in order of their paths."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if LEFT_OUT & set(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:  # the test suite keeps files in other encodings on purpose
            continue
        if text.strip():
            yield Module(relative.as_posix(), text)


def split(found: list[Module]) -> tuple[list[Module], list[Module]]:
    """(train, held out). No text of the second stands in the first, nor twice in either."""
    held_out = list({module.digest: module for module in found if module.held_out}.values())
    hidden = {module.digest for module in held_out}
    train = {module.digest: module for module in found if not module.held_out and module.digest not in hidden}
    return list(train.values()), held_out


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE (Sennrich et al., arXiv 1508.07909) of VOCABULARY entries: round-trips any UTF-8 text."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    end = core.token_to_id(EOS)
    core.post_processor = processors.TemplateProcessing(single=f"{EOS} $A", special_tokens=[(EOS, end)])  # as `encode` does
    return core


def save_tokenizer(core: tokenizers.Tokenizer, directory: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    core.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def encode(core: tokenizers.Tokenizer, found: list[Module]) -> np.ndarray:
    """All modules as one stream of uint16 tokens, an EOS in front of each."""
    eos = core.token_to_id(EOS)
    parts = [
        [eos, *encoding.ids] for encoding in core.encode_batch([module.text for module in found], add_special_tokens=False)
    ]
    return np.concatenate([np.asarray(part, dtype=np.uint16) for part in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    train, held_out = split(list(modules()))
    core = train_tokenizer([module.text for module in train])
    save_tokenizer(core, out, max_length=32768)
    core.encode_special_tokens = True
    for name, part in (("train", train), ("held_out", held_out)):
        tokens = encode(core, part)
        np.save(out / f"{name}.npy", tokens)
        size = sum(len(module.text.encode()) for module in part)
        print(f"{name}: {len(part)} modules, {size} bytes, {len(tokens)} tokens, {size / len(tokens):.3f} bytes per token")


if __name__ == "__main__":
    main()
