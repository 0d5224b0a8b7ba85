"""Shared batch norms over two real processes against one batch norm over the whole batch."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.layers.norm_act import BatchNormAct2d
from torch import nn

from tests.engine.processes import forkserver
from vlx.core.errors import ConfigError
from vlx.engine.batch_norm import SharedBatchNorm, share_batch_norms


def network(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten(), nn.Linear(16, 5),
        nn.BatchNorm1d(5, affine=False),
    )  # fmt: skip


def images() -> torch.Tensor:
    return torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """A mean over samples."""
    return (out.tanh() * torch.arange(1.0, 6.0)).sum(1).mean()


def _shared(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = network(momentum=None if (folder / "cumulative").exists() else 0.1)
    share_batch_norms(model, torch.device("cpu"))
    out = model(images()[rank * 3 : (rank + 1) * 3])
    loss_of(out).backward()
    model(images()[rank * 3 : (rank + 1) * 3])
    for param in model.parameters():  # as DDP does
        assert param.grad is not None
        dist.all_reduce(param.grad)
        param.grad /= 2
    grads = {name: param.grad for name, param in model.named_parameters()}
    torch.save({"out": out, "grads": grads, "state": model.state_dict()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_two_processes_have_the_statistics_and_gradients_of_the_whole_batch(
    momentum: float | None, tmp_path: Path
) -> None:
    if momentum is None:
        (tmp_path / "cumulative").touch()
    children = [forkserver().Process(target=_shared, args=(r, tmp_path)) for r in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
        assert child.exitcode == 0
    model = network(momentum)
    out = model(images())
    loss_of(out).backward()
    model(images())
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([s["out"] for s in shares]), out, rtol=1e-4, atol=1e-5)
    for share in shares:
        assert list(share["state"]) == list(model.state_dict())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(share["state"][name], value, rtol=1e-5, atol=1e-6)
        for name, param in model.named_parameters():
            torch.testing.assert_close(share["grads"][name], param.grad, rtol=1e-3, atol=1e-6)


def test_conversion_keeps_tensors_and_what_evaluation_gives() -> None:
    model = network()
    model(images())
    kept, before = list(model.parameters()), copy.deepcopy(model).eval()(images())
    share_batch_norms(model, torch.device("cpu"))
    assert isinstance(model[1], SharedBatchNorm)
    assert isinstance(model[4], SharedBatchNorm)
    assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))
    torch.testing.assert_close(model.eval()(images()), before)


def test_norms_with_an_activation_are_refused_on_a_cpu() -> None:
    model = nn.Sequential(BatchNormAct2d(4))
    with pytest.raises(ConfigError, match=r"method\.0 is a SyncBatchNormAct, which shares"):
        share_batch_norms(model, torch.device("cpu"))
