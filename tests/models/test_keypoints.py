"""The keypoint interpreter against a plain computation of the same formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from labelmint.models.interpreter import InterpreterSpec
from labelmint.models.keypoints import KeypointInterpreter, bernoulli_entropy, heat_targets, locate
from labelmint.models.tasks import build_interpreter

pytestmark = pytest.mark.torch


SPEC = InterpreterSpec(
    layout="paper",
    resolution=32,
    channels={4: 6, 8: 5, 16: 4, 32: 3},
    num_heads=3,
    hidden=(8, 4),
    class_names=("left_eye", "right_eye"),
    palette=((255, 0, 0), (0, 0, 255)),
    task="keypoints",
)


@pytest.fixture()
def interpreter() -> KeypointInterpreter:
    torch.manual_seed(0)
    built = build_interpreter(SPEC)
    assert isinstance(built, KeypointInterpreter)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return built


@torch.no_grad()
def test_equals_the_naive_form(interpreter: KeypointInterpreter) -> None:
    rng = torch.Generator().manual_seed(1)
    features = {r: torch.randn(2, c, r, r, generator=rng) for r, c in SPEC.channels.items()}
    upsampled = [F.interpolate(x, (32, 32), mode="bilinear", align_corners=False) for x in features.values()]
    stacked = torch.cat(upsampled, dim=1).permute(0, 2, 3, 1)  # [B,R,R,D]
    weight1 = torch.cat([interpreter.projection[str(r)] for r in SPEC.channels], dim=1)  # [N*h1,D]
    hidden = torch.relu(stacked @ weight1.t() + interpreter.bias1).unflatten(3, (3, 8))  # [B,R,R,N,h1]
    hidden = torch.relu(torch.einsum("byxnh,noh->byxno", hidden, interpreter.weight2) + interpreter.bias2)
    heat = torch.einsum("byxnh,noh->byxno", hidden, interpreter.weight3) + interpreter.bias3  # [B,R,R,N,K]
    p = heat.clamp(0, 1).double()
    mixture_entropy, mean_entropy = bernoulli_entropy(p.mean(3)).sum(3), bernoulli_entropy(p).mean(3).sum(3)  # [B,R,R]
    js = mixture_entropy - mean_entropy

    keypoints, confidence, js_map, js_score = interpreter(features)

    flat = heat.mean(3).permute(0, 3, 1, 2).flatten(2)  # [B,K,P]
    index = flat.argmax(2)
    torch.testing.assert_close(keypoints, torch.stack([index % 32, index // 32], 2).float())
    torch.testing.assert_close(confidence, flat.amax(2))
    torch.testing.assert_close(js_map.double(), js, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(js_score.double(), js.flatten(1).sum(1, keepdim=True), rtol=1e-4, atol=1e-3)
    for score_kind, entropy in (("mixture_entropy", mixture_entropy), ("mean_entropy", mean_entropy)):
        interpreter.score_kind = score_kind
        *_, same_map, score = interpreter(features)
        assert torch.equal(same_map, js_map)
        torch.testing.assert_close(score.double(), entropy.flatten(1).sum(1, keepdim=True), rtol=1e-4, atol=1e-3)


def test_heads_that_agree_have_no_divergence_and_heads_that_differ_at_most_ln_2() -> None:
    interpreter = build_interpreter(SPEC)
    interpreter.bias3.data = torch.tensor([[0.3, 7.0]] * 3)  # clipped to 1: certain
    features = {r: torch.zeros(1, c, r, r) for r, c in SPEC.channels.items()}
    _, confidence, js_map, _ = interpreter(features)
    assert float(js_map.detach().abs().max()) < 1e-6
    torch.testing.assert_close(confidence, torch.tensor([[0.3, 7.0]]))
    interpreter.bias3.data = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    third, two_thirds = np.log(3.0) / 3, np.log(1.5) * 2 / 3
    assert float(interpreter(features)[2][0, 0, 0].detach()) == pytest.approx(third + two_thirds, abs=1e-6)


def test_locate_takes_the_first_of_equals_row_by_row() -> None:
    heat = torch.zeros(1, 4, 1, 4)  # [B,R,K,R]
    heat[0, 1, 0, 3] = heat[0, 2, 0, 0] = 0.5
    keypoints, confidence = locate(heat)
    assert keypoints.tolist() == [[[3.0, 1.0]]] and confidence.tolist() == [[0.5]]


def test_targets_peak_at_the_keypoint_and_vanish_where_it_is_absent() -> None:
    keypoints = torch.tensor([[10.0, 20.0, 1.0], [5.0, 5.0, 0.0]])
    rows, columns = torch.tensor([20, 20, 5]), torch.tensor([10, 12, 5])
    targets = heat_targets(keypoints, rows, columns, resolution=128)
    torch.testing.assert_close(targets[:, 0], torch.tensor([1.0, float(np.exp(-0.5)), 0.0]))
    assert float(targets[:, 1].abs().max()) == 0.0


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'depth'; known: segmentation, keypoints"):
        InterpreterSpec("paper", 8, {4: 1, 8: 1}, 2, (4, 4), ("a", "b"), ((0, 0, 0), (1, 1, 1)), task="depth")
