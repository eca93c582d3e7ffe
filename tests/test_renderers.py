"""The encoding (equation 3) and the anatomical head, worked by hand and in loops."""

import math

import pytest
import torch

from monai_morse.networks import AnatomicalHead, FourierEncoding

NO_CONTEXT = torch.zeros(2, 0)


def test_encoding_by_hand():
    encoding = FourierEncoding(2, 2)
    encoding.frequencies.data = torch.tensor([[1.0, 0.5], [0.25, 0.0]])
    # row y = -0.5, column x = 0.5: phases 2 pi (-0.25) and 2 pi (-0.125)
    got = encoding(torch.tensor([[[-0.5, 0.5]]]))[0, :, 0].tolist()
    assert got == pytest.approx([-1.0, -math.sqrt(0.5), 0.0, math.sqrt(0.5)], abs=1e-6)


@pytest.mark.parametrize("dims", [2, 3])
def test_encoding_equals_its_formula(dims):
    encoding = FourierEncoding(dims, 5).double()
    coordinates = torch.rand(3, 7, dims, dtype=torch.float64) * 2 - 1
    got = encoding(coordinates)
    assert got.shape == (3, 10, 7)
    for b in range(3):
        for p in range(7):
            for k in range(5):
                phase = 2 * math.pi * sum(encoding.frequencies[k, a].item() * coordinates[b, p, a].item() for a in range(dims))
                assert got[b, k, p].item() == pytest.approx(math.sin(phase), abs=1e-6)
                assert got[b, 5 + k, p].item() == pytest.approx(math.cos(phase), abs=1e-6)


def test_frequencies_are_gaussian_trainable_and_128_by_default():
    encoding = FourierEncoding(3)
    assert encoding.frequencies.shape == (128, 3) and encoding.frequencies.requires_grad
    assert abs(encoding.frequencies.std().item() - 1) < 0.15
    encoding(torch.rand(1, 4, 3)).sum().backward()
    assert encoding.frequencies.grad.abs().sum() > 0


def test_encoding_stays_float32_under_autocast():
    encoding = FourierEncoding(3, 8)
    coordinates = torch.rand(1, 50, 3)
    expected = encoding(coordinates)
    with torch.autocast("cpu", torch.bfloat16):
        got = encoding(coordinates)
    assert got.dtype == torch.float32 and torch.equal(got, expected)


def test_head_is_a_three_layer_mlp_on_encoding_and_feature():
    head = AnatomicalHead(5, 3, 2, width=6, num_frequencies=4, residual=False).double()
    features, coordinates, coarse = torch.randn(2, 5, 4), torch.rand(2, 4, 2), torch.randn(2, 3, 4)
    features, coordinates, coarse = features.double(), coordinates.double(), coarse.double()
    got = head(features, coordinates, coarse, NO_CONTEXT)
    linear = [layer for layer in head.mlp.layers if isinstance(layer, torch.nn.Conv1d)]
    assert len(linear) == 3
    encoded = head.encoding(coordinates)
    for b in range(2):
        for p in range(4):
            v = torch.cat([encoded[b, :, p], features[b, :, p]])
            for i, layer in enumerate(linear):
                v = layer.weight[:, :, 0] @ v + layer.bias
                v = v.clamp(min=0) if i < 2 else v
            assert torch.allclose(got[b, :, p], v, atol=1e-9)


def test_untrained_residual_head_changes_nothing_and_can_learn():
    head = AnatomicalHead(5, 3, 2, width=6, num_frequencies=4)
    coarse = torch.randn(2, 3, 4)
    out = head(torch.randn(2, 5, 4), torch.rand(2, 4, 2), coarse, NO_CONTEXT)
    assert torch.equal(out, coarse)
    out.sum().backward()
    assert head.mlp.layers[-1].weight.grad.abs().sum() > 0
