"""Counter-based random numbers: a pure function of integers, equal on every device.

What a sample draws depends on (seed, epoch, sample id, purpose) alone, so results do not change
with the number of workers or processes, and a resumed run needs no saved generator state.
The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MUL_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MUL_2 = 0x94D049BB133111EB - (1 << 64)
_MASK = (1 << 64) - 1


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 with wrap-around; shape is kept."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MUL_1
    x = (x ^ _shift_right(x, 27)) * _MUL_2
    return x ^ _shift_right(x, 31)


def _mix_number(x: int) -> int:
    """`mix` of one number in plain Python: a tensor made for it would stall a GPU's queue."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MUL_1) & _MASK
    x = ((x ^ (x >> 27)) * _MUL_2) & _MASK
    x ^= x >> 31
    return x - (1 << 64) if x >> 63 else x


def step_seed(seed: int, step: int, rank: int, micro: int) -> int:
    """A seed for torch's own generators before each micro-batch, so that dropout, which asks
    nobody, is a function of these four integers too."""
    return zlib.crc32(f"{seed}/{step}/{rank}/{micro}".encode())


def key(ids: Tensor, *salts: int | str) -> Tensor:
    """One int64 key per id, `(B,)`, from the ids and any number of integers or names."""
    result = ids.to(torch.int64)
    for salt in salts:
        number = zlib.crc32(salt.encode()) if isinstance(salt, str) else int(salt)
        result = mix(result + _mix_number(number))
    return result


def uniform(keys: Tensor, count: int) -> Tensor:
    """`(B, count)` float32 in [0, 1), a function of `keys (B,)` and the column."""
    columns = mix(torch.arange(count, device=keys.device))
    bits = mix(keys[:, None] ^ columns[None])
    return _shift_right(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


def normal(keys: Tensor, count: int) -> Tensor:
    """`(B, count)` float32 of N(0, 1), by the Box-Muller transform of `uniform`."""
    half = (count + 1) // 2
    first, second = uniform(keys, 2 * half).split(half, dim=1)
    radius = torch.sqrt(-2.0 * torch.log1p(-first))
    angle = 2.0 * torch.pi * second
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)[:, :count]
