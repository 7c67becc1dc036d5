"""Muon against its definition by singular values."""

import pytest
import torch

from ft_dist.optim.muon import RMS_OF_ADAMW, Muon, orthogonal
from ft_dist.optim.partition import Segment


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 33), (1, 7)])
def test_singular_values_approach_one(shape):
    torch.manual_seed(0)
    found = orthogonal(torch.randn(shape))
    values = torch.linalg.svdvals(found)
    assert found.shape == shape
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_the_singular_vectors_are_kept():
    torch.manual_seed(1)
    matrix = torch.randn(16, 24)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = u.T @ orthogonal(matrix) @ v.T
    assert (kept - torch.diag(kept.diag())).abs().max() < 1e-4


def test_a_step_is_orthogonalised_momentum_and_decay():
    torch.manual_seed(2)
    weights = torch.nn.Parameter(torch.randn(6 * 4 + 3))
    before = weights.detach().clone()
    optimizer = Muon(
        [{"params": [weights], "orthogonal": True, "weight_decay": 0.1}], momentum=0.9, betas=(0.9, 0.99), eps=1e-8
    )
    segment = Segment("w", (6, 4), 0, 24, weights, 0)
    optimizer.hold({weights: [segment]})
    optimizer.param_groups[0]["lr"] = 0.5
    weights.grad = torch.randn(27)
    gradient = weights.grad[:24].view(6, 4)
    optimizer.step()
    nesterov = 0.9 * (0.1 * gradient) + 0.1 * gradient
    expected = before[:24].view(6, 4) * (1 - 0.5 * 0.1) - 0.5 * RMS_OF_ADAMW * 6**0.5 * orthogonal(nesterov)
    torch.testing.assert_close(segment.of(weights.data).view(6, 4), expected)


def test_an_update_is_as_large_as_adamws():
    torch.manual_seed(3)
    for shape in ((64, 64), (256, 32)):
        update = RMS_OF_ADAMW * max(shape) ** 0.5 * orthogonal(torch.randn(shape))
        assert update.square().mean().sqrt() == pytest.approx(RMS_OF_ADAMW, rel=0.35)
