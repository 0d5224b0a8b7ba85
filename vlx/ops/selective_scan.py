"""The selective scan of Mamba-2 (Dao and Gu, ICML 2024): a linear recurrence whose decay, input and
output depend on the token.

S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T,  y_t = S_t C_t

Three ways to one result: a token at a time, all tokens at once (retention with a data-dependent
decay), and in chunks, whose cost is linear in the number of tokens.

B batch, N tokens, H heads, P width of a head, S width of the state. `x (B, N, H, P)`;
`dt (B, N, H)` >= 0; `rate (H,)` < 0, the paper's A; `write` and `read (B, N, S)`, its B and C,
which all heads share. All in one floating type, float32 at least: decays are products of many.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FAN = 32  # chunks whose states are carried at once


def scan_tokens(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """The recurrence as it is written: N steps, a state (B, H, P, S). Returns (B, N, H, P)."""
    state = x.new_zeros(x.shape[0], *x.shape[2:], write.shape[2])
    decay, drive = (dt * rate).exp(), dt[..., None] * x
    outs = []
    for t in range(x.shape[1]):
        update = drive[:, t, :, :, None] * write[:, t, None, None]
        state = decay[:, t, :, None, None] * state + update
        outs.append((state * read[:, t, None, None]).sum(-1))
    return torch.stack(outs, dim=1)


def scan_all(x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """Every token looks at all before it: y = (L o C B^T)(dt x), L the decay between two tokens.

    Cost and memory grow with N^2. Returns (B, N, H, P).
    """
    return _within(dt[..., None] * x, dt * rate, write, read)


def scan_chunks(
    x: Tensor, dt: Tensor, rate: Tensor, write: Tensor, read: Tensor, size: int
) -> Tensor:
    """`scan_all` within chunks of `size` tokens, a state from each chunk to the next.

    Returns (B, N, H, P).
    """
    count = x.shape[1]
    drive, log_decay = dt[..., None] * x, dt * rate
    # Zeros behind the last token neither write nor decay.
    drive, log_decay, write, read = (
        _in_chunks(part, size) for part in (drive, log_decay, write, read)
    )
    inside = _within(drive, log_decay, write, read)  # (B, K, L, H, P)
    passed = log_decay.cumsum(2)  # (B, K, L, H)
    left = (passed[:, :, -1:] - passed).exp()
    written = torch.einsum("bklhp,bkls->bkhps", left[..., None] * drive, write)
    before = states_before(written, passed[:, :, -1])
    past = torch.einsum("bkls,bkhps->bklhp", read, before) * passed.exp()[..., None]
    return (inside + past).flatten(1, 2)[:, :count]


def states_before(written: Tensor, log_decay: Tensor) -> Tensor:
    """The state that each of K chunks starts from, (B, K, H, P, S); zeros for the first.

    written: (B, K, H, P, S), what each adds to the state; log_decay: (B, K, H), of the state over
    each. In groups of chunks, and groups of groups: linear in K, without a loop over it.
    """
    count = written.shape[1]
    if count > _FAN:
        groups, decays = (_in_chunks(part, _FAN) for part in (written, log_decay))
        passed = decays.cumsum(2)
        left = (passed[:, :, -1:] - passed).exp()
        ends = (left[..., None, None] * groups).sum(2)
        carried = states_before(ends, passed[:, :, -1])  # (B, G, H, P, S)
        inside = states_before(groups.flatten(0, 1), decays.flatten(0, 1))
        inside = inside.unflatten(0, groups.shape[:2])
        reached = (passed - decays).exp()[..., None, None] * carried[:, :, None]
        return (inside + reached).flatten(1, 2)[:, :count]
    weights = _decays(log_decay)  # (B, K, K, H)
    after = torch.einsum("bkjh,bjhps->bkhps", weights, written)
    return torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], dim=1)


def _within(drive: Tensor, log_decay: Tensor, write: Tensor, read: Tensor) -> Tensor:
    """(L o C B^T) drive over the last axis of tokens; drive: (..., N, H, P)."""
    alike = read @ write.transpose(-2, -1)  # (..., N, N)
    weights = _decays(log_decay) * alike[..., None]
    return torch.einsum("...nmh,...mhp->...nhp", weights, drive)


def _decays(log_decay: Tensor) -> Tensor:
    """(..., N, N, H): the decay from token m to a token n >= m, 0 to those before it.

    A difference of sums, whose rounding grows with the decay over all N tokens: over the 2,500 of
    `tests/ops/test_selective_scan.py` a float32 scan is off by 5e-6 in chunks of 64, by 2e-5 in
    chunks of 256 and by 1.5e-4 all at once.
    """
    passed = log_decay.cumsum(-2)
    apart = passed[..., :, None, :] - passed[..., None, :, :]
    count = log_decay.shape[-2]
    ahead = torch.ones(count, count, dtype=torch.bool, device=log_decay.device).triu(1)
    return apart.masked_fill(ahead[..., None], -math.inf).exp()


def _in_chunks(x: Tensor, size: int) -> Tensor:
    """(B, N, ...) to (B, ceil(N / size), size, ...), zeros behind."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, size))
