"""The factored interpreter against the naive one: upsample everything, concatenate, N MLPs one after the other."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from labelmint.core.calibration import SCORE_KINDS
from labelmint.models.interpreter import (
    InterpreterSpec,
    StyleInterpreter,
    fold_batch_norm,
    hidden_widths,
    interleave,
    sample_features,
    touched_rows,
)
from tests.support.interpreters import CHANNELS, SPEC, features, interpreter, upsampled

pytestmark = pytest.mark.torch


@torch.no_grad()
def naive(built: StyleInterpreter, maps: dict[int, torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, entropy of the mean distribution and mean entropy, in float64, in the order of the paper's text."""
    h1, _ = SPEC.hidden
    stacked = upsampled(maps).permute(0, 2, 3, 1)  # [B,R,R,D]
    weight1 = torch.cat([built.projection[str(r)] for r in CHANNELS], dim=1).double()
    probabilities = []
    for n in range(SPEC.num_heads):
        rows = slice(n * h1, (n + 1) * h1)
        x = F.relu(stacked @ weight1[rows].t() + built.bias1[rows].double())
        x = F.relu(x @ built.weight2[n].double().t() + built.bias2[n].double())
        probabilities.append((x @ built.weight3[n].double().t() + built.bias3[n].double()).softmax(dim=-1))
    p = torch.stack(probabilities)  # [N,B,R,R,K]
    mean = p.mean(dim=0)
    mixture_entropy = -(mean * mean.log()).sum(-1)
    mean_entropy = (-(p * p.log()).sum(-1)).mean(dim=0)  # [B,R,R]
    label = p.argmax(dim=-1).mode(dim=0).values
    return label.numpy(), mixture_entropy.numpy(), mean_entropy.numpy()


@torch.no_grad()
def test_equals_the_naive_ensemble() -> None:
    built = interpreter()
    label, js_map, js_score = built(features())
    want_label, mixture_entropy, mean_entropy = naive(built, features())
    want_js = mixture_entropy - mean_entropy
    assert label.dtype == torch.uint8
    assert (label.numpy() == want_label).mean() >= 0.9999
    np.testing.assert_allclose(js_map.numpy(), want_js, atol=1e-6)
    np.testing.assert_allclose(js_score.numpy()[:, 0], want_js.sum(axis=(1, 2)), rtol=1e-5)


@torch.no_grad()
def test_top10_mean_is_the_mean_of_the_top_tenth() -> None:
    built = interpreter("top10_mean")
    _, _, score = built(features())
    _, mixture_entropy, mean_entropy = naive(built, features())
    ordered = np.sort((mixture_entropy - mean_entropy).reshape(2, -1))[:, ::-1]
    np.testing.assert_allclose(score.numpy()[:, 0], ordered[:, : ordered.shape[1] // 10].mean(axis=1), rtol=1e-5)


@torch.no_grad()
def test_entropies_are_summed_over_the_pixels_and_the_js_map_stays() -> None:
    _, *want = naive(interpreter(), features())
    plain = interpreter()(features())
    for score_kind, entropy in zip(("mixture_entropy", "mean_entropy"), want, strict=True):
        label, js_map, score = interpreter(score_kind)(features())
        np.testing.assert_allclose(score.numpy()[:, 0], entropy.sum(axis=(1, 2)), rtol=1e-5)
        assert torch.equal(label, plain[0]) and torch.equal(js_map, plain[1])


@torch.no_grad()
def test_the_js_divergence_is_what_the_mixture_has_more_than_the_heads() -> None:
    score = {kind: interpreter(kind)(features())[2] for kind in SCORE_KINDS}
    assert (score["mean_entropy"] > 0).all()
    torch.testing.assert_close(score["mixture_entropy"] - score["mean_entropy"], score["sum"], rtol=1e-4, atol=0)
    js, entropy = torch.rand(2, 1, 8, 8) * torch.tensor([1e-7, 1.0]).view(2, 1, 1, 1)
    assert (interpreter("mixture_entropy").maps(js, entropy)[-1] >= entropy).all(), "in every pixel, despite rounding"


@torch.no_grad()
def test_entropy_without_disagreement_is_no_divergence() -> None:
    """Heads that hesitate alike: only the entropies see it."""
    score = {}
    for kind in SCORE_KINDS:
        built = interpreter(kind)
        for parameter in built.parameters():
            parameter.zero_()
        score[kind] = built(features(1))[2].item()
    pixels = SPEC.resolution**2
    for kind in ("mixture_entropy", "mean_entropy"):
        assert score[kind] == pytest.approx(pixels * np.log(SPEC.num_classes), rel=1e-5)
    assert score["sum"] < 1e-6 * pixels and score["top10_mean"] < 1e-6


@pytest.mark.parametrize("score_kind", SCORE_KINDS)
@torch.no_grad()
def test_a_head_that_returns_no_number_gives_no_score(score_kind: str) -> None:
    built = interpreter(score_kind)
    built.bias3[2, 1] = float("nan")
    assert built(features())[2].isnan().all()


@pytest.mark.parametrize("strip_rows", [2, 4, 32])
@torch.no_grad()
def test_strips_do_not_show(strip_rows: int) -> None:
    whole = interpreter(strip_rows=32)(features())
    strips = interpreter(strip_rows=strip_rows)(features())
    assert torch.equal(whole[0], strips[0])
    torch.testing.assert_close(whole[1], strips[1], atol=2e-6, rtol=0)


@torch.no_grad()
def test_votes_tie_to_the_smallest_class() -> None:
    votes = torch.zeros(1, 1, 4, 1, dtype=torch.uint8)
    votes[0, 0, :, 0] = torch.tensor([1, 2, 2, 0])
    label, js = interpreter().uncertainty(torch.full((1, 1, 4, 1), 0.25), torch.full((1, 1, 1), 1.5), votes)
    assert label.item() == 1
    assert js.item() == 0.0  # ln 4 - 1.5 is negative: rounding may not make a score smaller


@torch.no_grad()
def test_js_is_zero_for_agreeing_heads_and_ln_2_for_two_sure_halves() -> None:
    built = interpreter()
    sure = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 4, 1)
    split = torch.tensor([0.5, 0.5, 0.0, 0.0]).view(1, 1, 4, 1)
    votes = torch.zeros(1, 1, 4, 1, dtype=torch.uint8)
    no_entropy = torch.zeros(1, 1, 1)
    assert built.uncertainty(sure, no_entropy, votes)[1].item() == 0.0
    assert built.uncertainty(split, no_entropy, votes)[1].item() == pytest.approx(np.log(2.0), abs=1e-6)


@torch.no_grad()
def test_sampled_features_equal_the_upsampled_ones() -> None:
    rows, columns = torch.arange(32), torch.arange(32).flip(0)
    maps = features(1)
    got = sample_features({r: x[0] for r, x in maps.items()}, rows, columns, resolution=32)
    want = upsampled(maps)[0][:, rows, columns].t().float()
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@torch.no_grad()
def test_batch_norm_folds_exactly() -> None:
    rng = torch.Generator().manual_seed(3)
    norm = torch.nn.BatchNorm1d(6).double().eval()
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(torch.randn(6, generator=rng))
    norm.running_var.copy_(torch.rand(6, generator=rng) + 0.1)
    norm.weight.copy_(torch.randn(6, generator=rng))
    norm.bias.copy_(torch.randn(6, generator=rng))
    linear = torch.nn.Linear(6, 3).double()
    x = torch.randn(50, 6, generator=rng).double()
    weight, bias = fold_batch_norm(
        linear.weight,
        linear.bias,
        norm.running_mean,
        variance=norm.running_var,
        gamma=norm.weight,
        beta=norm.bias,
        epsilon=norm.eps,
    )
    torch.testing.assert_close(F.linear(x, weight, bias), linear(norm(x)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("source", [4, 8])
def test_touched_rows_are_those_with_weight(source: int) -> None:
    matrix = interpreter().get_buffer(f"edges_{source}")
    for start in range(0, 16, 4):
        edges = range(start, start + 5)
        used = matrix[edges.start : edges.stop].any(dim=0).nonzero().flatten()
        low, high = touched_rows(source, 16, edges)
        assert low <= int(used[0]) and high >= int(used[-1]) + 1
        assert 0 <= low < high <= source


@pytest.mark.parametrize("levels", [[32], [16, 32], [4, 32], [8, 16], [4], [4, 8, 16, 32]])
@torch.no_grad()
def test_aggregates_whatever_levels_there_are(levels: list[int]) -> None:
    spec = replace(SPEC, channels={r: CHANNELS[r] for r in levels})
    built = StyleInterpreter(spec)
    for parameter in built.parameters():
        parameter.normal_(generator=torch.Generator().manual_seed(4))
    maps = {r: features()[r] for r in levels}
    weight = torch.cat([built.projection[str(r)] for r in levels], dim=1).double()
    want = torch.einsum("od,bdhw->bohw", weight, upsampled(maps)) + built.bias1[:, None, None]
    torch.testing.assert_close(built.aggregate(maps, range(32)).double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(built.aggregate(maps, range(8, 20)).double(), want[:, :, 8:20], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_strips_are_the_image_phase_by_phase() -> None:
    built = interpreter()
    weights = built.weights()
    strips = [interleave(built.outputs(parts, weights)) for parts in built.parts_of_strips(features(), weights)]
    whole = built.layers(built.aggregate(features(), range(32)), weights)  # [B,R,N,K,R]
    torch.testing.assert_close(torch.cat(strips, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_spec_refuses_what_a_label_cannot_hold() -> None:
    assert hidden_widths(31) == (128, 32) and hidden_widths(32) == (256, 128)
    with pytest.raises(ValueError, match="4 class names need as many colours, not 1"):
        InterpreterSpec("paper", 32, CHANNELS, 5, (16, 8), ("a", "b", "c", "d"), ((0, 0, 0),))
    with pytest.raises(ValueError, match="unknown score kind 'max'"):
        StyleInterpreter(SPEC, "max")
