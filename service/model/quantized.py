"""Matrices in 8 or 4 bits: whole numbers, and a scale in bfloat16 for each output and 64 inputs.

Activations in bfloat16 that meet one are rounded to 8 bits as well, with a float32 scale for each token and 64 of them
(`eight`); what is summed is whole numbers, group by group, of which the CPU multiplies more at a time. Activations in float32
are multiplied as they are. `csrc/product.h` computes, decode step and prompt alike, and says how the bytes lie. `dense` and
`eight` are the slow reading, which also answers where the kernel cannot: on other CPUs, in float32, for widths that are no
multiples of 64. Memory: 8.25 or 4.25 bits a weight.

Source: llama.cpp's Q8_0, for blocks of 32, multiplies so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from service.model import native

Weights = Literal["auto", "bf16", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}
COLUMNS, GROUP = native.COLUMNS, 64  # outputs packed together, inputs that share a scale, as in product.h
ROWS = 1024  # turned at a time: what that takes is small beside a model
LEAST = 1e-30  # a group of activations below this counts as one of zeros
TRIES = (1.0, 0.93, 0.86, 0.79)  # of the widest scale, in 4 bits: a group's largest numbers may be cut for the others' sake


class Quantized:
    """A matrix (N, K). `data` is uint8 (N / 64, K / 64, bytes), both rounded up: zeros fill the last block and group."""

    def __init__(self, data: Tensor, shape: Sequence[int], bits: int) -> None:
        self.data, self.bits = data, bits
        self.shape = torch.Size(shape)

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bits: int) -> Quantized:
        """The nearest one to a float matrix (N, K) of finite numbers."""
        pieces = [_packed(*_rounded(_grouped(rows), bits), bits) for rows in weight.detach().split(ROWS)]
        return cls(torch.cat(pieces), weight.shape, bits)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def is_native(self) -> bool:
        """Whether the kernel reads it, for activations in bfloat16."""
        return self.shape[1] % GROUP == 0 and native.KERNEL.obstacle(torch.bfloat16, self.data.device) is None

    def dense(self) -> Tensor:
        """The weights: float32 (N, K)."""
        return torch.cat(list(self._parts()))

    def rows(self, ids: Tensor) -> Tensor:
        """The weights of rows (T,): float32 (T, K)."""
        blocks, lanes = ids // COLUMNS, ids % COLUMNS
        packed = self.data[:, :, 2 * COLUMNS :].unflatten(2, (GROUP // 4, -1))
        if self.bits == 8:
            numbers = (packed.unflatten(3, (COLUMNS, 4))[blocks, :, :, lanes] ^ 128).view(torch.int8)  # less 128
        else:  # a byte holds quarters 0 and 1, or 2 and 3
            quarters, places = lanes // 16, lanes % 16
            both = packed.unflatten(3, (2, 16, 4))[blocks, :, :, quarters // 2, places]
            numbers = ((both >> (4 * (quarters % 2))[:, None, None, None]) & 15).to(torch.int8) - 8
        scales = self._scales(self.data)[blocks, :, lanes]
        return self._joined(numbers.flatten(2).float(), scales.float())

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, K) times this, plus a bias (N): (T, N) in the dtype of x. A row's numbers are the same whatever the others."""
        if x.dtype == torch.bfloat16 and self.is_native:
            return native.product(x, self, self.shape[0], bias)
        wide, at = x.new_empty(len(x), self.shape[0], dtype=torch.float32), 0
        factor = eight(x) if x.dtype == torch.bfloat16 else x.float()
        for part in self._parts():
            torch.mm(factor, part.T, out=wide[:, at : at + len(part)])
            at += len(part)
        return (wide if bias is None else wide.add_(bias)).to(x.dtype)

    def reading_bytes(self, rows: int, dtype: torch.dtype) -> int:
        """What a product takes beside its answer: activations in 8 bits; or what the slow reading makes."""
        outputs, inputs = self.shape
        if dtype == torch.bfloat16 and self.is_native:
            return 2 * rows * inputs
        return (4 * rows * (outputs + 2 * inputs) if dtype != torch.float32 else 0) + 17 * min(ROWS, outputs) * inputs

    def logits(self, x: Tensor) -> Tensor:
        """The same as float32, rounded as x is."""
        if x.dtype == torch.bfloat16 and self.is_native:
            return native.product(x, self, self.shape[0], wide=True)
        return self.product(x).float()

    @property
    def room(self) -> tuple[int, int]:
        """Its memory, and its bytes."""
        return self.data.data_ptr(), self.data.nbytes

    def _scales(self, data: Tensor) -> Tensor:
        return data[:, :, : 2 * COLUMNS].view(torch.bfloat16)  # (blocks, groups, 64)

    def _parts(self) -> Iterator[Tensor]:
        """`dense`, some rows at a time."""
        left = self.shape[0]
        for data in self.data.split(ROWS // COLUMNS):
            lines, (blocks, groups, _) = data[:, :, 2 * COLUMNS :], data.shape
            if self.bits == 8:
                words = (lines ^ 128).view(torch.int8)  # less 128
            else:
                halves = lines.reshape(blocks, groups, GROUP // 4, 2, 1, COLUMNS)
                words = torch.cat((halves & 15, halves >> 4), dim=4).to(torch.int8) - 8
            numbers = words.reshape(blocks, groups, GROUP // 4, COLUMNS, 4).permute(0, 3, 1, 2, 4).reshape(-1, groups, GROUP)
            yield self._joined(numbers.float(), self._scales(data).transpose(1, 2).reshape(-1, groups).float())[:left]
            left -= len(numbers)

    def _joined(self, numbers: Tensor, scales: Tensor) -> Tensor:
        """(T, K / 64, 64) and (T, K / 64) to (T, K)."""
        whole: Tensor = (numbers * scales[..., None]).flatten(1)
        return whole[:, : self.shape[1]]


def eight(x: Tensor) -> Tensor:
    """What 8 bits leave of activations (T, K): float32."""
    whole = functional.pad(x.to(torch.float32, copy=True), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = torch.maximum(whole.amax(2, keepdim=True), -whole.amin(2, keepdim=True))
    steps = torch.full_like(largest, 127)  # `127 / largest` would be another number in its last bit
    by, scale = (torch.where(largest < LEAST, 0.0, each) for each in (steps / largest, largest / steps))
    rounded: Tensor = whole.mul_(by).round_().mul_(scale)
    return rounded.flatten(1)[:, : x.shape[1]]


def _grouped(weight: Tensor) -> Tensor:
    """A matrix as float32 (N, K / 64, 64), its rows padded to whole blocks and its columns to whole groups."""
    rows, columns = (-n % size for n, size in zip(weight.shape, (COLUMNS, GROUP), strict=True))
    whole = functional.pad(weight.float(), (0, columns, 0, rows))
    return whole.reshape(len(whole), -1, GROUP)


def _rounded(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole numbers (as float32) and scales (bfloat16) of groups (N, K / 64, 64)."""
    most = groups.gather(2, groups.abs().argmax(2, keepdim=True))  # with its sign
    if bits == 8:
        scales = (most.abs() / 127).bfloat16()
        return _divided(groups, scales, -127, 127), scales[..., 0]
    numbers, scales, error = torch.zeros_like(groups), most.bfloat16(), torch.full_like(most, torch.inf)
    for share in TRIES:  # -8 is the farthest from 0, so that the largest number stands there
        tried = (most * (share / -8)).bfloat16()
        found = _divided(groups, tried, -8, 7)
        off = (found * _over(tried.float(), most) - _over(groups, most)).square_().sum(2, keepdim=True)
        is_nearer = off < error
        numbers, scales, error = (
            torch.where(is_nearer, new, old) for new, old in ((found, numbers), (tried, scales), (off, error))
        )
    return numbers, scales[..., 0]


def _divided(groups: Tensor, scales: Tensor, low: int, high: int) -> Tensor:
    """The nearest whole numbers."""
    return _over(groups, scales.float()).round_().clamp_(low, high)


def _over(x: Tensor, by: Tensor) -> Tensor:
    """x / by, by nothing zero."""
    return torch.where(by == 0, 0.0, x / by)


def _packed(numbers: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The bytes of whole blocks, see product.h: uint8 (N / 64, K / 64, bytes)."""
    words = (numbers + (128 if bits == 8 else 8)).to(torch.uint8).unflatten(2, (-1, 4)).unflatten(0, (-1, COLUMNS))
    lines = words.permute(0, 2, 3, 1, 4)  # (blocks, groups, steps, 64, 4)
    if bits == 4:
        quarters = lines.unflatten(3, (2, 2, 16))
        lines = quarters[:, :, :, :, 0] | (quarters[:, :, :, :, 1] << 4)
    beside = scales.unflatten(0, (-1, COLUMNS)).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat((beside, lines.flatten(2)), dim=2)


def bits_of(weights: str, name: str) -> int | None:
    """Bits of a parameter; None: it stays in the model's dtype. Embeddings and head, which feel it most, keep 8."""
    if weights not in BITS:
        return None
    if name in ("embed.weight", "head.weight"):
        return 8
    return BITS[weights] if re.fullmatch(r"layers\.\d+\.(qkv|out|gate_up|down)\.weight", name) else None


def bytes_of(shape: Sequence[int], bits: int) -> int:
    """Bytes of a matrix (N, K) in so many bits."""
    rows, columns = (-(-n // size) for n, size in zip(shape, (COLUMNS, GROUP), strict=True))
    return rows * columns * COLUMNS * (2 + GROUP * bits // 8)
