"""Pictures of what became of patches."""

from __future__ import annotations

import torch

from vlx.ops.patches import paint_groups, patchify


def test_groups_share_a_colour_and_lost_patches_are_dim() -> None:
    image = torch.rand(3, 4, 4)
    painted = paint_groups(image, torch.tensor([7, 2, 2, -1]))
    before, after = patchify(image[None], 2)[0], patchify(painted[None], 2)[0]
    assert torch.equal(after[0], before[0])
    mean = before[1:3].reshape(-1, 3).mean(0)
    torch.testing.assert_close(after[1].view(-1, 3), mean.expand(4, 3))
    torch.testing.assert_close(after[2], after[1])
    assert after[3].max() <= 0.3 * before[3].max() + 0.3
