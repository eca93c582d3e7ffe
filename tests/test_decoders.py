"""Decoder features: found, named, checked."""

import copy

import pytest
import torch
from conftest import ROWS, TINY, window
from monai.networks.nets import BasicUNet

from monai_morse import InputError, Morse
from monai_morse.networks import DecoderFeatures, check_window, decoder_names
from tools.systems import BACKBONES


@pytest.mark.parametrize("name, dims", ROWS)
def test_features_are_the_submodules_outputs_and_logits_the_backbones(name, dims):
    backbone = TINY[name](dims, 3)
    names = decoder_names(backbone)
    reference = copy.deepcopy(backbone).eval()
    seen = {}
    for n in names:
        reference.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: seen.__setitem__(n, o))
    features = DecoderFeatures(backbone).eval()
    x = window(name, dims)
    with torch.no_grad():
        expected = reference(x)
        logits, maps = features(x)
    assert torch.equal(logits, expected)
    assert len(maps) >= BACKBONES[name].num_experts
    for info, n, m in zip(features.info, names, maps):
        assert torch.equal(m, seen[n])
        assert (info.name, info.channels) == (n, m.shape[1])
        assert [round(a / r) for a, r in zip(x.shape[2:], info.reduction)] == list(m.shape[2:])
    sizes = [m.shape[2] for m in maps]
    assert sizes == sorted(sizes)
    assert set(features.state_dict()) == {f"backbone.{k}" for k in reference.state_dict()}


def test_the_papers_unet_has_the_released_decoder_widths():
    features = DecoderFeatures(BACKBONES["BasicUNet"].usual(2, 9))
    assert [f.channels for f in features.info] == [256, 128, 64, 32, 16]


def test_a_backbone_run_before_keeps_no_tensor_of_the_dry_run():
    backbone = TINY["DynUNet, deep supervision"](3, 3).train()
    backbone(window("DynUNet", 3))  # it now holds maps with a history, which deepcopy refuses
    kept = list(backbone.heads)
    features = DecoderFeatures(backbone)
    assert all(a is b for a, b in zip(backbone.heads, kept))
    backbone.eval()(window("DynUNet", 3).detach())
    with torch.no_grad():
        features(window("DynUNet", 3))
    assert all(type(h) is torch.Tensor for h in backbone.heads)


def test_backbone_keeps_its_training_mode():
    backbone = TINY["BasicUNet"](2, 3).train()
    backbone.conv_0.eval()
    features = DecoderFeatures(backbone)
    assert features.backbone.training and features.backbone.down_1.training and not features.backbone.conv_0.training


def test_wrong_name_says_which_exist():
    with pytest.raises(InputError, match="no submodule 'upcat_9'.*upcat_1"):
        DecoderFeatures(TINY["BasicUNet"](2, 3), ["upcat_9"])


def test_unused_submodule_is_an_error():
    backbone = TINY["BasicUNet"](2, 3)
    backbone.spare = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(InputError, match="spare.*not called"):
        DecoderFeatures(backbone, ["spare"])


def test_unknown_backbone_asks_for_names_and_takes_them():
    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down = torch.nn.Conv2d(2, 6, 3, stride=2, padding=1)
            self.up = torch.nn.ConvTranspose2d(6, 4, 2, stride=2)
            self.head = torch.nn.Conv2d(4, 3, 1)

        def forward(self, x):
            return self.head(self.up(self.down(x)))

    with pytest.raises(InputError, match="Tiny are not known.*register_backbone"):
        DecoderFeatures(Tiny())
    features = DecoderFeatures(Tiny(), ["down", "up"])
    assert [(f.channels, f.reduction) for f in features.info] == [(6, (2.0, 2.0)), (4, (1.0, 1.0))]
    assert features.num_classes == 3


@pytest.mark.parametrize("name, wanted", [("UNet", "24, 24, 24"), ("BasicUNet", "32, 32, 32"), ("DynUNet", "24, 24, 24")])
@pytest.mark.parametrize("wrap", [False, True])
def test_windows_that_do_not_fit_are_errors_with_one_that_does(name, wanted, wrap):
    net = TINY[name](3, 3)
    net = Morse(net, mixture={"width": 4}, head={"width": 4}) if wrap else net
    net.train()
    next(net.children()).eval()  # a frozen part
    modes = [m.training for m in net.modules()]
    check_window(net, [32, 48, 32])
    assert [m.training for m in net.modules()] == modes
    with pytest.raises(InputError, match=f"of .20, 24, 18. voxels; give --patch_size '.{wanted}.'"):
        check_window(net, [20, 24, 18])
    with pytest.raises(InputError, match="does not take 3 channel"):
        check_window(net, [32, 48, 32], in_channels=3)
    with pytest.raises(InputError, match="size must be a whole number, got 32.5"):
        check_window(net, [32.5, 32, 32])
    for size in (32, "32", [0, 32, 32]):
        with pytest.raises(InputError, match="patch_size must be a list of positive numbers"):
            check_window(net, size)


def test_the_window_that_fits_is_found_with_a_stride_of_three():
    net = Morse(TINY["DynUNet"](3, 3), mixture={"width": 4}, head={"width": 4}, stride=3)
    with pytest.raises(InputError, match="give --patch_size '.24, 48, 24.'"):  # 3 x 8
        check_window(net, [20, 30, 20])


def test_untraceable_forward_is_an_error():
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

    with pytest.raises(InputError, match="Branching cannot be traced"):
        DecoderFeatures(Branching(), ["conv"])


def branching_features(backbone, x):
    feature = backbone.conv(x)
    return backbone.head(feature), [feature]


def test_a_function_gives_the_features_of_what_cannot_be_traced():
    class Branching(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = torch.nn.Conv2d(1, 5, 3, padding=1), torch.nn.Conv2d(5, 3, 1)

        def forward(self, x):
            return self.head(self.conv(x)) if x.sum() > 0 else self.head(self.conv(-x))

    with pytest.raises(InputError, match="Branching cannot be traced.*use DecoderFeatures.network, a function"):
        DecoderFeatures(Branching(), ["conv"])
    net = Morse(DecoderFeatures(Branching(), branching_features), mixture={"width": 4}, head={"width": 4})
    assert [(f.name, f.channels, f.reduction) for f in net.decoder.info] == [("feature 0", 5, (1.0, 1.0))]
    x = torch.rand(2, 1, 12, 10)
    assert net.eval()(x).shape == (2, 3, 12, 10)
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_logits_that_are_no_tensor_are_an_error():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return [self.conv(x), self.conv(x)]

    with pytest.raises(InputError, match="Two in eval mode must return its logits as one tensor"):
        DecoderFeatures(Two(), ["conv"])


def test_unetr_windows_are_of_its_one_size():
    with pytest.raises(InputError, match=r"does not take windows of \[64, 64, 64\].*'\[32, 48, 16\]'"):
        check_window(TINY["UNETR"](3, 3), [64, 64, 64])


class OwnTensor(BasicUNet):
    """Its forward makes a tensor, which a trace would hold as a constant."""

    def forward(self, x):
        return super().forward(x) + torch.ones(1)


def test_a_forward_that_makes_tensors_is_an_error():
    with pytest.raises(InputError, match="the forward of OwnTensor makes tensors of its own"):
        DecoderFeatures(OwnTensor(2, 1, 3, features=(4, 4, 8, 16, 32, 4)))
