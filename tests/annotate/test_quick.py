"""The quick interpreter: exact features, additive sums, and the label of linear heads."""

import numpy as np
import pytest
import torch

from labelmint.models.draw import draw
from labelmint.models.quick import Basis, Sums, fit_quick, preview, quick_interpreter, quick_spec, sums_of
from tests.annotate.conftest import Truth
from tests.support.interpreters import upsampled

pytestmark = pytest.mark.torch


def test_labels_an_image_as_the_linear_heads_label_its_pixels(truth: Truth) -> None:
    """The interpreter projects, then upsamples; the linear scores of S* itself must give the same."""
    dataset = truth.dataset(range(4))
    spec = quick_spec(truth.generator, dataset, "paper")
    basis, sums = sums_of(spec, dataset, truth.features)
    whole = Sums.together(sums.values())
    interpreter = quick_interpreter(spec, basis, whole)
    maps = draw(truth.generator, 50, 1.0, layout="paper")[1]
    pixels = basis.project(upsampled(maps)[0].float().flatten(1).t())  # [R*R,Q]
    means = whole.mixed / whole.targets[:, None]
    within = (whole.gram - (means.t() * whole.targets) @ means) / whole.pixels + 0.3 * torch.eye(len(whole.total))
    inverse = torch.linalg.inv(within)
    distance = torch.stack([((pixels - mean) @ inverse * (pixels - mean)).sum(dim=1) for mean in means], dim=1)
    label, entropy = preview(interpreter, maps)
    assert (label.flatten() == distance.argmin(dim=1)).float().mean() > 0.999, "the nearest mean, by Mahalanobis"
    probability = torch.softmax(-0.5 * distance, dim=1)
    want = -(probability * probability.clamp(min=1e-30).log()).sum(dim=1)
    torch.testing.assert_close(entropy.flatten(), want, atol=2e-3, rtol=1e-2)


def test_sums_add_up(truth: Truth) -> None:
    rng = torch.Generator().manual_seed(0)
    features, targets = torch.randn(60, 12, generator=rng), torch.randint(3, (60,), generator=rng)
    projected = Basis.of(features).project(features)
    parts = Sums.together(Sums.of(x, y, 3) for x, y in zip(projected.split(17), targets.split(17), strict=True))
    whole = Sums.of(projected, targets, 3)
    for name in ("gram", "mixed", "total", "targets"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), atol=1e-4, rtol=1e-5)
    assert parts.pixels == whole.pixels == 60


def test_the_basis_can_be_repeated_and_leaves_the_random_state_alone() -> None:
    features = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    first = Basis.of(features)
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), drawn)
    torch.manual_seed(8)
    assert torch.equal(Basis.of(features).directions, first.directions)


def test_a_class_that_was_not_drawn_is_never_found(truth: Truth) -> None:
    dataset = truth.dataset(range(0, 8, 2))  # no image with a spot
    interpreter = fit_quick(truth.generator, dataset, "paper")
    for seed in range(100, 110):
        label, entropy = preview(interpreter, draw(truth.generator, seed, 1.0, layout="paper")[1])
        assert int(label.max()) == 1 and torch.isfinite(entropy).all()


def test_is_more_uncertain_where_it_is_wrong(truth: Truth) -> None:
    dataset = truth.dataset(range(1))
    spec = quick_spec(truth.generator, dataset, "paper")
    basis, sums = sums_of(spec, dataset, truth.features)
    interpreter = quick_interpreter(spec, basis, sums[0])
    right, wrong = [], []
    for seed in range(100, 120, 2):
        label, entropy = preview(interpreter, draw(truth.generator, seed, 1.0, layout="paper")[1])
        hit = label.numpy() == truth.mask(seed)
        right.append(entropy.numpy()[hit])
        wrong.append(entropy.numpy()[~hit])
    assert np.concatenate(wrong).mean() > 1.2 * np.concatenate(right).mean()


def test_finds_keypoints(truth: Truth) -> None:
    dataset = truth.points(range(24))
    interpreter = fit_quick(truth.generator, dataset, "paper")
    above = []
    for seed in range(100, 120):
        points, _ = preview(interpreter, draw(truth.generator, seed, 1.0, layout="paper")[1])
        x, y = points[0].int().tolist()
        feature = truth.feature(seed)
        above.append((feature > feature[y, x]).mean())
    assert np.median(above) < 0.25  # guessing gives a half
