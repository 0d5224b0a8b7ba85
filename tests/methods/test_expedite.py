"""Expedit: the card's checks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tests.contract.build import build, config, context, smoke_batch
from tests.encoders.test_timm_vit import images_for, make
from vlx.commands.dry_run import measure
from vlx.core.capability import ImageFeatures, ReducedTokens
from vlx.core.errors import ConfigError
from vlx.encoders.base import EncoderFeatures
from vlx.methods.expedite import Clustering, Expedite, ExpediteConfig, Recovery
from vlx.ops.soft_clusters import ClusteredState, windows
from vlx.ops.token_state import start

SIZES = {  # dim, depth, heads, image size, patch size
    "small": (384, 12, 6, 224, 16),
    "base": (768, 12, 12, 224, 16),
    "large": (1024, 24, 16, 512, 16),
    "huge": (1280, 32, 16, 518, 14),
}


@pytest.mark.parametrize(
    ("size", "alpha", "side", "gmacs", "readme"),
    [
        ("small", 4, 7, 2.335, None),
        ("small", 6, 7, 2.911, None),
        ("small", 6, 10, 3.531, None),
        ("base", 4, 7, 8.875, None),
        ("base", 6, 7, 11.068, None),
        ("base", 6, 10, 13.389, None),
        ("large", 12, 23, 274.43, 275.8),
        ("large", 6, 23, 227.60, 228.5),
        ("large", 8, 16, 178.06, 179.0),
        ("huge", 10, 26, 650.1, 652.4),
        ("huge", 4, 25, 512.7, 514.1),
        ("huge", 8, 18, 421.0, 422.7),
    ],
)
def test_gmacs_are_the_cards_and_within_two_percent_of_the_readme(
    size: str, alpha: int, side: int, gmacs: float, readme: float | None
) -> None:
    cfg = config("expedite", "paper")
    dim, depth, heads, image_size, patch_size = SIZES[size]
    encoder = replace(cfg.encoder, name="deit_small_patch16_224", dim=dim, depth=depth)
    encoder = replace(encoder, heads=heads, image_size=image_size, patch_size=patch_size)
    method = ExpediteConfig(alpha=alpha, clusters=[side, side])
    found = measure(replace(cfg, encoder=encoder, method=method))
    assert found.reduced_gmacs == pytest.approx(gmacs, rel=3e-4)
    if readme is not None:
        assert found.reduced_gmacs == pytest.approx(readme, rel=0.02)
    assert found.tokens["mlp"][alpha - 1] == (image_size // patch_size) ** 2 + 1
    assert found.tokens["mlp"][alpha] == side**2 + 1


def hook_for(
    grid: tuple[int, int] = (6, 6), clusters: tuple[int, int] = (3, 3), **changes: object
) -> Clustering:
    """One of two layers at full size."""
    keys = {"alpha": 1, "clusters": list(clusters), "inverse_temperature": 0.1, **changes}
    return Clustering(grid, 2, ExpediteConfig(**keys))  # type: ignore[arg-type]


def clustered(x: Tensor, hook: Clustering, num_prefix: int = 1) -> ClusteredState:
    state = hook.after_block(start(x, num_prefix), 0)
    assert isinstance(state, ClusteredState)
    return state


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().sum())


def naive_shares(distances: list[float], scale: float) -> list[float]:
    least = min(distances)
    powers = [math.exp(-scale * (d - least)) for d in distances]
    return [power / sum(powers) for power in powers]


def naive_centroids(patches: Tensor, start_at: Tensor, hook: Clustering, window: int) -> Tensor:
    """Five rounds over one image: patches (P, D), centroids (M, D)."""
    (height, width), (rows, columns) = hook.grid, hook.clusters
    centroids = start_at.clone()
    for _ in range(5):
        sums, masses = torch.zeros_like(centroids), torch.zeros(rows * columns)
        for r, c in product(range(height), range(width)):
            patch = patches[r * width + c]
            row, column = r * rows // height, c * columns // width
            near = [
                j
                for j in range(rows * columns)
                if abs(j // columns - row) <= window // 2
                and abs(j % columns - column) <= window // 2
            ]
            shares = naive_shares([distance(patch, centroids[j]) for j in near], 0.1)
            for j, share in zip(near, shares):
                sums[j] += share * patch
                masses[j] += share
        centroids = sums / masses[:, None]
    return centroids


@pytest.mark.parametrize(
    ("grid", "clusters", "window"), [((6, 6), (3, 3), 3), ((5, 7), (4, 3), 3), ((4, 4), (4, 4), 5)]
)
def test_clusters_and_both_reconstructions_equal_a_naive_double_loop(
    grid: tuple[int, int], clusters: tuple[int, int], window: int
) -> None:
    torch.manual_seed(0)
    count, dim, neighbours = grid[0] * grid[1], 5, 4
    hook = hook_for(grid, clusters, window=window, neighbours=neighbours)
    l2 = hook_for(grid, clusters, window=window, neighbours=neighbours, recovery=Recovery.l2)
    hard = hook_for(grid, clusters, window=window, recovery=Recovery.hard)
    x = torch.randn(2, 1 + count, dim)
    state = clustered(x, hook)
    values = torch.randn(2, 1 + clusters[0] * clusters[1], 3)
    dense, longer, copied = (h.expand(state, values) for h in (hook, l2, hard))
    for image in range(2):
        patches = x[image, 1:]
        pooled = adaptive_avg_pool2d(patches.T.unflatten(1, grid), clusters).flatten(1).T
        centroids = naive_centroids(patches, pooled, hook, window)
        torch.testing.assert_close(state.x[image, 1:], centroids, rtol=1e-4, atol=1e-5)
        for place, patch in enumerate(patches):
            order = sorted(range(len(centroids)), key=lambda j: distance(patch, centroids[j]))
            assert state.owner[image, place] == 1 + order[0]
            torch.testing.assert_close(copied[image, place], values[image, 1 + order[0]])
            near = order[:neighbours]
            shares = naive_shares([distance(patch, centroids[j]) for j in near], 0.1)
            mean = sum(s * values[image, 1 + j] for s, j in zip(shares, near))
            assert isinstance(mean, Tensor)
            torch.testing.assert_close(dense[image, place], mean, rtol=1e-3, atol=1e-4)
            length = math.sqrt(sum(s * s for s in shares))
            torch.testing.assert_close(longer[image, place], mean / length, rtol=1e-3, atol=1e-4)


def test_no_rounds_are_adaptive_average_pooling() -> None:
    x = torch.randn(2, 36, 4)
    state = clustered(x, hook_for(clusters=(4, 3), iterations=0), num_prefix=0)
    pooled = adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (6, 6)), (4, 3))
    torch.testing.assert_close(state.x, pooled.flatten(2).transpose(1, 2))


def test_all_layers_at_full_size_are_the_plain_model_to_the_bit() -> None:
    encoder = make("vit_small_patch14_reg4_dinov2")
    cfg = ExpediteConfig(alpha=2, clusters=[2, 2])
    hook = Clustering(encoder.spec.grid, 2, cfg)
    images = images_for(encoder)
    with torch.no_grad():
        plain, hooked = encoder(images), encoder(images, hook=hook)
        assert torch.equal(hooked.tokens, plain.tokens)
        assert torch.equal(hooked.prefix, plain.prefix)
        dense = EncoderFeatures(encoder, hook).patch_features(images)
    assert torch.equal(dense, EncoderFeatures(encoder).patch_features(images))


@pytest.mark.parametrize(("inverse_temperature", "neighbours"), [(1e4, 20), (1e4, 1)])
def test_as_many_clusters_as_patches_give_everything_back(
    inverse_temperature: float, neighbours: int
) -> None:
    x, values = torch.randn(2, 1 + 36, 8), torch.randn(2, 1 + 36, 3)
    hook = hook_for(clusters=(6, 6), inverse_temperature=inverse_temperature, neighbours=neighbours)
    state = clustered(x, hook)
    torch.testing.assert_close(state.x, x)
    torch.testing.assert_close(hook.expand(state, values), values[:, 1:])


def test_a_patch_moves_the_clusters_of_its_window_alone() -> None:
    hook = hook_for((8, 8), (8, 8), iterations=1, window=5)
    x = torch.randn(1, 64, 4)
    other = x.clone()
    other[0, 0] += 1.0
    moved = (clustered(x, hook, 0).x != clustered(other, hook, 0).x).any(-1).view(8, 8)
    assert moved[:3, :3].any()
    # Patches up to two cells away share themselves out anew, among clusters two cells further.
    assert not moved[5:].any()
    assert not moved[:, 5:].any()


def test_windows_are_squares_around_the_own_cell() -> None:
    allowed = windows((40, 40), (28, 28), 5)
    assert allowed.shape == (1600, 784)
    assert allowed.sum(1).max() == 25
    assert allowed.sum(1).min() == 9  # in a corner
    for r, c in ((0, 0), (13, 39), (20, 7)):
        cells = allowed[r * 40 + c].view(28, 28).nonzero()
        row, column = r * 28 // 40, c * 28 // 40
        assert cells[:, 0].min() == max(0, row - 2)
        assert cells[:, 0].max() == min(27, row + 2)
        assert cells[:, 1].min() == max(0, column - 2)
        assert cells[:, 1].max() == min(27, column + 2)


def test_a_wide_enough_window_is_none_and_one_of_1_is_the_cell() -> None:
    assert windows((9, 9), (3, 4), 7).all()
    own = windows((6, 6), (3, 3), 1)
    assert (own.sum(1) == 1).all()
    x = torch.randn(1, 36, 4)
    means = x.view(3, 2, 3, 2, 4).mean((1, 3)).view(1, 9, 4)
    torch.testing.assert_close(clustered(x, hook_for(window=1), 0).x, means)


def test_every_patch_is_shared_out_once() -> None:
    for changes in ({}, {"iterations": 0}, {"inverse_temperature": None}):
        state = clustered(torch.randn(3, 37, 4), hook_for(**changes))
        assert state.size is not None
        assert torch.equal(state.size[:, 0], torch.ones(3))
        torch.testing.assert_close(state.size[:, 1:].sum(1), torch.full((3,), 36.0))


def test_constant_tokens_come_back_and_root_k_of_them_under_l2() -> None:
    x = torch.randn(1, 1, 4).expand(2, 36, 4)
    hook = hook_for(neighbours=4)
    state = clustered(x, hook, num_prefix=0)
    torch.testing.assert_close(state.x, x[:, :9])
    torch.testing.assert_close(hook.expand(state, state.x), x)
    longer = hook_for(neighbours=4, recovery=Recovery.l2).expand(state, state.x)
    torch.testing.assert_close(longer, 2 * x, rtol=1e-4, atol=1e-5)


def test_prefix_tokens_pass_by_and_nothing_is_drawn() -> None:
    x, hook = torch.randn(2, 4 + 36, 8), hook_for()
    state = clustered(x, hook, num_prefix=4)
    assert torch.equal(state.x[:, :4], x[:, :4])
    again = clustered(x, hook, num_prefix=4)
    assert torch.equal(again.x, state.x)
    assert torch.equal(again.affinity, state.affinity)


def test_the_reducer_has_no_parameters_and_nothing_to_save() -> None:
    assert not list(hook_for().parameters())
    assert not hook_for().state_dict()


def test_far_patches_are_rebuilt_from_their_nearest_and_not_from_nothing() -> None:
    x = 1e3 * torch.randn(1, 36, 8)
    for recovery in (Recovery.soft, Recovery.l2):
        hook = hook_for(inverse_temperature=1.0, recovery=recovery)
        state = clustered(x, hook, num_prefix=0)
        dense = hook.expand(state, state.x)
        assert torch.isfinite(dense).all()
        assert (dense.abs().sum(-1) > 0).all()


def test_more_clusters_than_rows_and_more_neighbours_than_clusters_are_legal() -> None:
    hook = hook_for((3, 11), (5, 4), neighbours=50)
    state = clustered(torch.randn(1, 33, 4), hook, num_prefix=0)
    assert torch.isfinite(hook.expand(state, state.x)).all()


def test_null_follows_the_scale_of_the_features() -> None:
    x, hook = torch.randn(2, 36, 8), hook_for(inverse_temperature=None)
    small, large = clustered(x, hook, 0), clustered(100 * x, hook, 0)
    torch.testing.assert_close(100 * small.x, large.x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(small.affinity, large.affinity, rtol=1e-4, atol=1e-3)
    each = clustered(torch.cat([x[:1], 100 * x[1:]]), hook, 0)  # every image its own
    torch.testing.assert_close(each.affinity[:1], small.affinity[:1])


def test_bilinear_recovery_ignores_who_joined_what() -> None:
    hook = hook_for((4, 4), (2, 2), recovery=Recovery.bilinear)
    state = clustered(torch.randn(1, 16, 4), hook, num_prefix=0)
    dense = hook.expand(state, torch.tensor([[[0.0], [4.0], [0.0], [4.0]]])).view(4, 4)
    assert torch.equal(dense, torch.tensor([0.0, 1.0, 3.0, 4.0]).expand(4, 4))


def test_clustering_stays_in_float32_under_autocast() -> None:
    x, hook = torch.randn(2, 37, 8), hook_for()
    state = clustered(x, hook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = clustered(x, hook)
        dense = hook.expand(mixed, mixed.x)
    assert torch.equal(mixed.x, state.x)
    assert torch.equal(dense, hook.expand(state, state.x))
    half = clustered(x.bfloat16(), hook)
    assert half.x.dtype == torch.bfloat16
    assert half.affinity.dtype == torch.float32


def test_the_whole_model_under_bf16_autocast_is_near_float32() -> None:
    method = build("expedite").eval()
    features = next(part for part in method.exports() if isinstance(part, ImageFeatures))
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        exact = method.class_logits(images)  # type: ignore[operator]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = method.class_logits(images)  # type: ignore[operator]
            maps = features.patch_features(images)
    assert torch.isfinite(maps).all()
    torch.testing.assert_close(mixed.float(), exact, rtol=0.1, atol=0.05)  # 8 bits of mantissa


def test_a_step_trains_the_plain_model() -> None:
    method = build("expedite").eval()
    assert isinstance(method, Expedite)
    batch = smoke_batch("expedite")
    loss = method.step(batch, context()).losses["class"]
    reduction = next(part for part in method.exports() if isinstance(part, ReducedTokens))
    _, targets = method.mix(batch["image"], batch["label"], context())
    with torch.no_grad():
        logits = {"plain": reduction.plain, "reduced": reduction.reduced}
        losses = {
            name: -(targets * forward(batch["image"]).log_softmax(-1)).sum(-1).mean()
            for name, forward in logits.items()
        }
    torch.testing.assert_close(loss.detach(), losses["plain"])
    assert not torch.isclose(loss.detach(), losses["reduced"])


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_dense_features_lie_on_the_grid_of_patches(name: str) -> None:
    encoder = make(name)
    cfg = ExpediteConfig(alpha=1, clusters=[2, 2], neighbours=1, inverse_temperature=None)
    hook = Clustering(encoder.spec.grid, encoder.spec.depth, cfg)
    images = images_for(encoder)
    with torch.no_grad():
        dense = EncoderFeatures(encoder, hook).patch_features(images)
        out = encoder(images, hook=hook)
    assert dense.shape == (2, 48, 4, 4)
    assert out.tokens.shape == (2, 4, 48)
    assert isinstance(out.state, ClusteredState)
    for row, column in product(range(4), range(4)):  # one neighbour: a copy of the nearest
        owner = out.state.owner[0, row * 4 + column] - encoder.spec.num_prefix
        torch.testing.assert_close(dense[0, :, row, column], out.tokens[0, owner])


def test_groups_are_the_nearest_clusters() -> None:
    method = build("expedite").eval()
    reduction = next(part for part in method.exports() if isinstance(part, ReducedTokens))
    [(title, groups)] = reduction.groups(torch.rand(2, 3, 32, 32))
    assert title == "layer 2"
    assert groups.shape == (2, 64)
    assert groups.min() >= 1
    assert groups.max() <= 16


@pytest.mark.slow
def test_no_graph_breaks_under_compile() -> None:
    method = build("expedite").eval()
    images = torch.rand(2, 3, 32, 32)
    features = next(part for part in method.exports() if isinstance(part, ImageFeatures))
    for forward in (method.class_logits, features.patch_features):
        # One graph, traced with its backward; generating code for it is torch's business.
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")  # type: ignore[call-overload]
        with torch.no_grad():
            expected = forward(images)  # type: ignore[operator]
            torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-5)


def test_a_dense_task_without_recovery_is_refused_in_one_line() -> None:
    encoder = make("deit_tiny_patch16_224")
    cfg = ExpediteConfig(alpha=1, clusters=[2, 2], recovery=Recovery.none)
    hook = Clustering(encoder.spec.grid, 2, cfg)
    features = EncoderFeatures(encoder, hook)
    assert features.image_features(images_for(encoder)).shape == (2, 48)
    with pytest.raises(ConfigError, match=r"method\.recovery=none .* set method.recovery=soft"):
        features.patch_features(images_for(encoder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": [0, 4]}, r"method\.clusters=\[0, 4\]"),
        ({"clusters": [16]}, r"method\.clusters=\[16\] .*rows,columns"),
        ({"window": 4}, r"method\.window=4 must be odd"),
        ({"alpha": 0}, r"method\.alpha=0 must be 1 or more"),
        ({"iterations": -1}, r"method\.iterations=-1"),
        ({"neighbours": 0}, r"method\.neighbours=0"),
        ({"inverse_temperature": 0.0}, r"method\.inverse_temperature=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExpediteConfig(**changes)


def test_a_layer_past_the_depth_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"method\.alpha=13: the encoder has 12 layers"):
        Clustering((14, 14), 12, ExpediteConfig(alpha=13)).plan(196, 1, 12)
    with pytest.raises(ConfigError, match="14x14 patches; 100 came"):
        Clustering((14, 14), 12, ExpediteConfig()).plan(100, 1, 12)
