"""The published 3D U-Net: its size, its wiring, and what it must go through."""

import pytest
import torch
import torch.nn.functional as F
from conftest import check_twins

from monai_morse import InputError
from monai_morse.networks import DecoderFeatures, decoder_names
from monai_morse.networks.unet3d import UNet3D


def small():
    net = UNet3D(2, 3, features=2).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(module.weight, 1, 0.2)
            torch.nn.init.normal_(module.bias)
    return net


def test_parameters_are_the_papers():
    with torch.device("meta"):
        net = UNet3D(3, 3)
    count = {True: 0, False: 0}
    for module in net.modules():
        count[isinstance(module, torch.nn.BatchNorm3d)] += sum(p.numel() for p in module.parameters(recurse=False))
    assert count[False] == 19_069_955  # stated by Cicek et al.; batch norm's scale and shift are not in it
    assert count[True] == 2 * (32 + 64 + 64 + 128 + 128 + 256 + 256 + 512 + 2 * (256 + 128 + 64))


def test_channels_double_before_pooling_and_up_convolutions_keep_them():
    convolutions = [m for m in UNet3D(3, 4).modules() if isinstance(m, (torch.nn.Conv3d, torch.nn.ConvTranspose3d))]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions] == [
        *[(3, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 3), (128, 128, 3), (128, 256, 3), (256, 256, 3), (256, 512, 3)],
        *[(512, 512, 2), (256 + 512, 256, 3), (256, 256, 3)],
        *[(256, 256, 2), (128 + 256, 128, 3), (128, 128, 3)],
        *[(128, 128, 2), (64 + 128, 64, 3), (64, 64, 3)],
        (64, 4, 1),
    ]


def test_forward_equals_the_papers_figure_written_out():
    net = small().double()
    kinds = (torch.nn.Conv3d, torch.nn.ConvTranspose3d, torch.nn.BatchNorm3d)
    layers = iter([m for m in net.modules() if isinstance(m, kinds)])

    def twice(x):
        for _ in range(2):
            conv, norm = next(layers), next(layers)
            x = F.conv3d(x, conv.weight, conv.bias, padding=1)
            x = (x - norm.running_mean.reshape(-1, 1, 1, 1)) / (norm.running_var + 1e-5).sqrt().reshape(-1, 1, 1, 1)
            x = (x * norm.weight.reshape(-1, 1, 1, 1) + norm.bias.reshape(-1, 1, 1, 1)).clamp(min=0)
        return x

    image = torch.rand(2, 2, 16, 8, 24, dtype=torch.float64)
    x, skips = image, []
    for _ in range(3):
        skips.append(twice(x))
        x = F.max_pool3d(skips[-1], 2)
    x = twice(x)
    for skip in reversed(skips):
        x = twice(torch.cat([skip, F.conv_transpose3d(x, next(layers).weight, stride=2)], dim=1))
    last = next(layers)
    expected = F.conv3d(x, last.weight, last.bias)
    got = net(image)
    assert got.shape == (2, 3, 16, 8, 24)
    assert torch.allclose(got, expected, atol=1e-9)


def test_a_side_that_is_no_multiple_of_8_is_an_error_that_names_the_nearest_size():
    with pytest.raises(InputError, match=r"multiple of 8, got \[16, 21, 3\]; the nearest size is \[16, 24, 8\]"):
        small()(torch.rand(1, 2, 16, 21, 3))
    with pytest.raises(InputError, match="features must be at least 1, got 0"):
        UNet3D(features=0)


def test_decoder_features_are_the_bottleneck_and_three_levels():
    net = small()
    features = DecoderFeatures(net).eval()
    assert decoder_names(net) == ["bottleneck", "decoder.0", "decoder.1", "decoder.2"]
    assert [(f.channels, f.reduction[0]) for f in features.info] == [(32, 8), (16, 4), (8, 2), (4, 1)]
    x = torch.rand(1, 2, 16, 8, 24)
    logits, maps = features(x)
    assert torch.equal(logits, net(x))
    assert torch.equal(net.head(maps[-1]), logits)


@pytest.mark.parametrize("wrap", [lambda net: net, DecoderFeatures])
def test_copy_pickle_script_trace_and_export_equal_eager(wrap):
    net = wrap(small()).eval()
    first, second = torch.rand(1, 2, 16, 16, 24), torch.rand(2, 2, 8, 24, 16)
    check_twins(net, (first, second), exported=first)


def test_every_parameter_gets_a_gradient():
    net = small().train()
    net(torch.rand(2, 2, 16, 16, 24)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("conv.bias"):  # batch norm takes away what these add
            assert parameter.grad.abs().sum() > 0, name
