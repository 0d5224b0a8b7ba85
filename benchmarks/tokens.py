"""Every method that reduces tokens, at its published rates, against the plain model, at 224 pixels.

The plain model is DeiT-S, or a backbone of its size without the reduction.

The speed-up that was measured is compared with what the GMACs promise: images/s against the plain
model's images/s times the ratio of GMACs, both of one run, rounds in turn. Weights are random.
Methods and rates are those of the registry: `Paper.commands` and `Paper.sweep`.

`python -m benchmarks.tokens` runs all; `python -m benchmarks.tokens evit:keep_rate=0.7 tome` some.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import HEADER, Row, alternate
from vlx.config.compose import compose, method_root
from vlx.config.grid import expand
from vlx.core import registry
from vlx.core.capability import ReducedTokens
from vlx.encoders.build import EncoderBuilder
from vlx.engine.load import run_config
from vlx.evals.tokens import gmacs, synchronise

COMMAND = "prune-tokens"
DEIT_S_GMACS, SIDE = 4.6, 224
ROUNDS = 5
TARGET = 0.85
CLASSES = 1000


@dataclass(frozen=True)
class Setting:
    """How the models are run."""

    name: str
    device: torch.device
    batch: int
    half: bool = False
    compiled: bool = False


def settings() -> list[Setting]:
    """fp32 on the CPU; on a GPU bf16, as it is and compiled."""
    if not torch.cuda.is_available():
        return [Setting("fp32", torch.device("cpu"), 8)]
    gpu = torch.device("cuda")
    return [
        Setting("bf16", gpu, 256, half=True),
        Setting("bf16 compiled", gpu, 256, half=True, compiled=True),
    ]


@dataclass(frozen=True)
class Case:
    """One method at one rate, by its paper preset."""

    slug: str
    rate: str
    """`keep_rate=0.7`; empty for a method with one rate."""
    config: dict[str, Any]

    def build(self, device: torch.device) -> ReducedTokens | None:
        """What the method exports, with random weights; None where it reduces nothing."""
        cfg = run_config(self.config)
        torch.manual_seed(0)
        roles = {"encoder": cfg.encoder, "teacher": cfg.teacher}
        with torch.device(device):
            builder = EncoderBuilder(roles, CLASSES, load_weights=False)
            method = registry.load(self.slug)(cfg.method, builder).eval()
        return next((part for part in method.exports() if isinstance(part, ReducedTokens)), None)


def cases(chosen: Sequence[str]) -> Iterator[Case]:
    """Every method at every combination of its published rates.

    chosen: only those, as SLUG or SLUG:KEY=VALUE; empty takes all.
    """
    for slug, paper in registry.papers().items():
        if COMMAND not in paper.commands:
            continue
        if paper.sweep:
            cells = expand(method_root(slug, COMMAND, "paper"), paper.sweep)
            found = [(cell.swept, cell.config) for cell in cells]
        else:
            found = [({}, compose(slug, COMMAND, "paper"))]
        for swept, config in found:
            rate = ",".join(f"{key.removeprefix('method.')}={v}" for key, v in swept.items())
            if not chosen or {slug, f"{slug}:{rate}"} & set(chosen):
                yield Case(slug, rate, config)


@torch.no_grad()
def costs(case: Case) -> tuple[float, float] | None:
    """GMACs of the plain and of the reduced model, from shapes; None where neither has DeiT-S's
    size, or where this rate reduces nothing."""
    meta = torch.device("meta")
    with meta:
        model = case.build(meta)
        if model is None or model.image_size != SIDE:
            return None
        plain, reduced = (gmacs(f, SIDE, meta) for f in (model.plain, model.reduced))
    is_small = any(abs(cost / DEIT_S_GMACS - 1) < 0.06 for cost in (plain, reduced))
    return (plain, reduced) if is_small and reduced < plain else None


@torch.no_grad()
def measure(model: ReducedTokens, setting: Setting) -> tuple[float, float]:
    """images/s of the reduced and of the plain model."""
    images = torch.rand(setting.batch, 3, SIDE, SIDE, device=setting.device)

    def runner(forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        work = torch.compile(forward) if setting.compiled else forward

        def run() -> None:
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.half):
                work(images)
            synchronise(setting.device)

        return run

    model.plain(images[:1])  # a reference model is built when it is first asked for
    seconds = alternate(runner(model.reduced), runner(model.plain), rounds=ROUNDS, warmup=2)
    return setting.batch / seconds[0], setting.batch / seconds[1]


def main(chosen: Sequence[str] = ()) -> list[Row]:
    rows = []
    for case in cases(chosen):
        cost = costs(case)
        if cost is None:
            print(f"{case.slug} {case.rate}: no reduction at DeiT-S's size at {SIDE}, left out")
            continue
        promised = cost[0] / cost[1]
        for setting in settings():
            model = case.build(setting.device)
            assert model is not None
            fast, plain = measure(model, setting)
            name = f"{case.slug} {case.rate}".strip()
            encoder = case.config["encoder"]["name"]
            row = Row(
                f"{name}, {encoder} at {SIDE}, batch {setting.batch}, {setting.name}: "
                f"{fast / plain:.2f} x as fast",
                fast,
                promised * plain,
                "images/s",
                f"plain's {plain:,.4g} x {promised:.2f} by GMACs",
                f">= {TARGET}",
            )
            rows.append(row)
            print(row.markdown(), flush=True)
    return rows


if __name__ == "__main__":
    print(HEADER, flush=True)
    main(sys.argv[1:])
