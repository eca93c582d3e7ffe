"""TransUNet: the published size, what it computes, the public weights by name, and what it must go through."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import check_twins
from scipy import ndimage

from monai_morse import InputError
from monai_morse.networks import DecoderFeatures, decoder_names
from monai_morse.networks.transunet import TransUNet

SMALL = {
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_dim": 40,
    "resnet_units": (1, 2, 1),
    "width_factor": 0.125,
    "decoder_channels": (16, 8, 8, 4),
}
PUBLIC = {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_dim": 3072, "resnet_units": (3, 4, 9), "width_factor": 1}


def small(in_channels=1, out_channels=3, img_size=64, **options):
    """A small network in eval mode none of whose parts is zero or one."""
    net = TransUNet(in_channels, out_channels, img_size, **{**SMALL, **options}).eval()
    torch.nn.init.normal_(net.transformer.positions)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return net


def public_shapes(hidden_size, num_layers, num_heads, mlp_dim, resnet_units, width_factor, side=14):
    """Names and shapes of what R50+ViT-B_16.npz holds, or would hold for a network of other sizes."""
    width = int(64 * width_factor)
    head = hidden_size // num_heads

    def norm(key, *shape):
        return {f"{key}/scale": shape, f"{key}/bias": shape}

    shapes = {"conv_root/kernel": (7, 7, 3, width), **norm("gn_root", 1, 1, 1, width)}
    channels = width
    for b, units in enumerate(resnet_units, 1):
        mid = width * 2 ** (b - 1)
        for u in range(1, units + 1):
            unit = f"block{b}/unit{u}"
            shapes |= {f"{unit}/conv1/kernel": (1, 1, channels, mid), **norm(f"{unit}/gn1", 1, 1, 1, mid)}
            shapes |= {f"{unit}/conv2/kernel": (3, 3, mid, mid), **norm(f"{unit}/gn2", 1, 1, 1, mid)}
            shapes |= {f"{unit}/conv3/kernel": (1, 1, mid, 4 * mid), **norm(f"{unit}/gn3", 1, 1, 1, 4 * mid)}
            if u == 1:
                shapes |= {f"{unit}/conv_proj/kernel": (1, 1, channels, 4 * mid), **norm(f"{unit}/gn_proj", 1, 1, 1, 4 * mid)}
            channels = 4 * mid
    shapes |= {"embedding/kernel": (1, 1, channels, hidden_size), "embedding/bias": (hidden_size,)}
    shapes |= {"cls": (1, 1, hidden_size), "Transformer/posembed_input/pos_embedding": (1, 1 + side * side, hidden_size)}
    for n in range(num_layers):
        block = f"Transformer/encoderblock_{n}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        shapes |= {**norm(f"{block}/LayerNorm_0", hidden_size), **norm(f"{block}/LayerNorm_2", hidden_size)}
        for part in ("query", "key", "value"):
            shapes |= {
                f"{attention}/{part}/kernel": (hidden_size, num_heads, head),
                f"{attention}/{part}/bias": (num_heads, head),
            }
        shapes |= {f"{attention}/out/kernel": (num_heads, head, hidden_size), f"{attention}/out/bias": (hidden_size,)}
        shapes |= {f"{block}/MlpBlock_3/Dense_0/kernel": (hidden_size, mlp_dim), f"{block}/MlpBlock_3/Dense_0/bias": (mlp_dim,)}
        shapes |= {
            f"{block}/MlpBlock_3/Dense_1/kernel": (mlp_dim, hidden_size),
            f"{block}/MlpBlock_3/Dense_1/bias": (hidden_size,),
        }
    return {**shapes, **norm("Transformer/encoder_norm", hidden_size), "head/kernel": (hidden_size, 5), "head/bias": (5,)}


def public_arrays(**options):
    sizes = {key: value for key, value in SMALL.items() if key in PUBLIC}
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(s, dtype=np.float32) for key, s in public_shapes(**{**sizes, **options}).items()}


def saved(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def public(tmp_path):
    arrays = public_arrays()
    return saved(tmp_path / "public.npz", arrays), {key: torch.from_numpy(value) for key, value in arrays.items()}


def test_parameters_are_the_published_networks():
    # counted in the authors' code, github.com/Beckschen/TransUNet, for R50-ViT-B_16, n_classes 9, n_skip 3, img_size 224
    for channels in (1, 3):
        with torch.device("meta"):
            net = TransUNet(channels, 9)
        assert sum(p.numel() for p in net.parameters()) == 105_277_081


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (64, 64), (96, 32), (80, 112)])
def test_any_sides_that_are_multiples_of_16(size):
    assert small()(torch.rand(1, 1, *size)).shape == (1, 3, *size)


def test_other_sides_are_an_error_that_names_the_nearest_size():
    with pytest.raises(InputError, match=r"multiple of 16, got \[30, 70\]; the nearest size is \[32, 64\]"):
        small()(torch.rand(1, 1, 30, 70))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"img_size": 100}, "img_size must be .* multiples of 16, got 100"),
        ({"img_size": (32, 32, 32)}, "img_size"),
        ({"num_heads": 5}, "multiple of num_heads, got 24 and 5"),
        ({"resnet_units": (3, 4)}, "resnet_units must be three"),
        ({"decoder_channels": (8, 8, 8)}, "decoder_channels must be four"),
        ({"num_skips": 4}, "num_skips must be 0 to 3, got 4"),
        ({"width_factor": 0.001}, "width_factor"),
    ],
)
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(InputError, match=message):
        small(**options)


def test_grey_equals_the_colour_network_on_the_repeated_image():
    grey, colour = small(1), small(3)
    colour.load_state_dict(grey.state_dict())
    x = torch.rand(2, 1, 48, 32)
    assert torch.equal(grey(x), colour(x.repeat(1, 3, 1, 1)))


def test_other_channel_counts_have_a_stem_of_their_own_and_take_no_grey_image():
    net, x = small(2), torch.rand(1, 2, 48, 32)
    assert net.encoder.root.conv.in_channels == 2 and net(x).shape == (1, 3, 48, 32)
    with pytest.raises(RuntimeError, match="channels"):
        net(x[:, :1])


def test_positions_are_interpolated_where_the_grid_differs_and_untouched_where_not():
    net = small(img_size=(64, 96))
    x, seen = torch.rand(1, 1, 96, 64), []
    net.transformer.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for size in ((64, 96), (96, 64)):
        seen.clear()
        net(F.interpolate(x, size))
        got = seen[0] - net.transformer.embedding(net.encoder(F.interpolate(x, size))[0])
        zoom = (1, 1, size[0] / 64, size[1] / 96)
        expected = ndimage.zoom(net.transformer.positions.detach().numpy(), zoom, order=1)  # how ViT's authors resample
        assert np.allclose(got.detach(), expected, atol=1e-4)


def test_kernels_are_standardised():
    conv = small().encoder.stages[0][0].conv2
    image = torch.rand(1, conv.in_channels, 6, 5)
    kernels = []
    for weight in conv.weight.detach():
        mean = weight.sum() / weight.numel()
        variance = ((weight - mean) ** 2).sum() / weight.numel()
        kernels.append((weight - mean) / math.sqrt(variance + 1e-5))
    assert torch.allclose(conv(image), F.conv2d(image, torch.stack(kernels), padding=1), atol=1e-4)


def test_maps_of_the_encoder_fit_their_skips():
    maps = small().encoder(torch.rand(1, 1, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(128, 4, 6), (64, 8, 12), (32, 16, 24), (8, 32, 48)]
    assert maps[2][:, :, -1].abs().max() == 0 and maps[2][..., -1].abs().max() == 0  # the pooling's lost row and column
    assert maps[2][:, :, -2, :-1].abs().max() > 0 and maps[2][:, :, :-1, -2].abs().max() > 0


@pytest.mark.parametrize("num_skips", [0, 1, 2, 3])
def test_skips_go_to_the_coarsest_blocks(num_skips):
    net = small(num_skips=num_skips)
    skips = [block.convolutions[0].conv.in_channels - c for block, c in zip(net.decoder, (32, 16, 8, 8))]
    assert skips == [64, 32, 8][:num_skips] + [0] * (4 - num_skips)
    assert net(torch.rand(1, 1, 32, 32)).shape == (1, 3, 32, 32)


def test_the_public_file_lands_where_it_should(public):
    path, arrays = public
    net = small(img_size=(64, 96))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    loaded = net.load_imagenet21k(path)
    assert set(loaded.values()) == {key for key in arrays if not key.startswith(("head/", "cls"))}
    assert set(loaded) == {name for name, _ in net.named_parameters() if name.startswith(("encoder.", "transformer."))}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items() if name not in loaded)

    kernel, weight = arrays["block2/unit2/conv2/kernel"], net.encoder.stages[1][1].conv2.weight
    assert all(weight[o, i, y, x] == kernel[y, x, i, o] for o, i, y, x in np.ndindex(*weight.shape))
    assert torch.equal(net.encoder.stages[2][0].shortcut.gn_proj.bias, arrays["block3/unit1/gn_proj/bias"].flatten())
    assert torch.equal(net.encoder.root.gn.weight, arrays["gn_root/scale"].flatten())
    grid = arrays["Transformer/posembed_input/pos_embedding"][0, 1:].reshape(14, 14, 24).numpy()
    expected = ndimage.zoom(grid, (4 / 14, 6 / 14, 1), order=1)  # the authors' way
    assert np.allclose(net.transformer.positions.detach()[0].permute(1, 2, 0), expected, atol=1e-5)


def test_a_file_of_the_networks_own_grid_is_not_resampled(public):
    path, arrays = public
    net = small(img_size=224)
    net.load_imagenet21k(path)
    expected = arrays["Transformer/posembed_input/pos_embedding"][0, 1:]
    assert torch.equal(net.transformer.positions[0].flatten(1).T, expected)


def test_the_transformer_computes_what_the_file_means(public):
    path, arrays = public
    net = small()
    net.load_imagenet21k(path)
    image = torch.rand(2, 128, 4, 4)
    x = torch.einsum("bchw,co->bhwo", image, arrays["embedding/kernel"][0, 0]) + arrays["embedding/bias"]
    x = x.reshape(2, 16, 24) + net.transformer.positions[0].flatten(1).T

    def norm(x, key):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * arrays[f"{key}/scale"] + arrays[f"{key}/bias"]

    for n in range(2):
        block = f"Transformer/encoderblock_{n}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        y = norm(x, f"{block}/LayerNorm_0")
        q, k, v = (
            torch.einsum("bte,ehd->bthd", y, arrays[f"{attention}/{part}/kernel"]) + arrays[f"{attention}/{part}/bias"]
            for part in ("query", "key", "value")
        )
        weights = (torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(6)).softmax(-1)
        mixed = torch.einsum("bhts,bshd->bthd", weights, v)
        x = x + torch.einsum("bthd,hde->bte", mixed, arrays[f"{attention}/out/kernel"]) + arrays[f"{attention}/out/bias"]
        y = norm(x, f"{block}/LayerNorm_2")
        y = F.gelu(y @ arrays[f"{block}/MlpBlock_3/Dense_0/kernel"] + arrays[f"{block}/MlpBlock_3/Dense_0/bias"])
        x = x + y @ arrays[f"{block}/MlpBlock_3/Dense_1/kernel"] + arrays[f"{block}/MlpBlock_3/Dense_1/bias"]
    expected = norm(x, "Transformer/encoder_norm").transpose(1, 2).reshape(2, 24, 4, 4)
    assert torch.allclose(net.transformer(image), expected, atol=1e-3)


def test_the_public_file_at_full_size(tmp_path):
    shapes = public_shapes(**PUBLIC)
    path = tmp_path / "R50+ViT-B_16.npz"
    arrays = {key: np.full(shape, i, np.float32) for i, (key, shape) in enumerate(shapes.items())}
    saved(path, arrays)
    with torch.device("meta"):
        net = TransUNet(1, 9, img_size=256)
    net.to_empty(device="cpu")  # spares drawing 105 million numbers
    loaded = net.load_imagenet21k(path)
    path.unlink()
    assert len(loaded) == len(shapes) - 3 == 353
    numbers = {key: i for i, key in enumerate(shapes)}
    for name, key in loaded.items():
        low, high = net.get_parameter(name).detach().aminmax()
        assert low.item() == pytest.approx(numbers[key]) and high.item() == pytest.approx(numbers[key]), name


def unreadable(path, kind):
    if kind == "text":
        path.write_text("not an archive")
    if kind == "empty":
        path.touch()
    if kind == "one array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    if kind == "truncated":
        whole = saved(path, public_arrays()).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    if kind == "pickled":
        saved(path, {**public_arrays(), "gn_root/bias": np.array([{}], dtype=object)})


@pytest.mark.parametrize("kind", ["absent", "text", "empty", "one array", "truncated", "pickled"])
def test_what_is_no_npz_file_of_arrays_is_refused(tmp_path, kind):
    path = tmp_path / "weights.npz"
    unreadable(path, kind)
    with pytest.raises(InputError, match="cannot read .*weights.npz"):
        small().load_imagenet21k(path)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"weight": np.zeros(3)}, "weights.npz has no 'Transformer/posembed_input/pos_embedding' .* names missing"),
        ({k: v for k, v in public_arrays().items() if k != "block2/unit2/gn3/scale"}, "no 'block2/unit2/gn3/scale' .1 of"),
        (public_arrays(num_layers=1), "no 'Transformer/encoderblock_1/LayerNorm_0/scale'"),
        (public_arrays(hidden_size=32), r"pos_embedding of shape \(1, 197, 32\) does not fit transformer.positions"),
        (public_arrays(num_heads=3), r"query/bias of shape \(3, 8\) does not fit .* 4 heads"),
        ({**public_arrays(), "embedding/kernel": np.zeros((4, 4), np.float32)}, r"embedding/kernel of shape \(4, 4\)"),
        ({**public_arrays(), "Transformer/posembed_input/pos_embedding": np.zeros((1, 8, 24), np.float32)}, r"\(1, 8, 24\)"),
    ],
)
def test_another_networks_file_is_refused_whole(tmp_path, arrays, message):
    path = saved(tmp_path / "weights.npz", arrays)
    net = small()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match=message):
        net.load_imagenet21k(path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_decoder_features_are_the_four_upsampling_blocks():
    net = small()
    features = DecoderFeatures(net).eval()
    assert decoder_names(net) == ["decoder.0", "decoder.1", "decoder.2", "decoder.3"]
    assert [(f.channels, f.reduction[0]) for f in features.info] == [(16, 8), (8, 4), (8, 2), (4, 1)]
    x = torch.rand(1, 1, 48, 32)
    logits, maps = features(x)
    assert torch.equal(logits, net(x))
    assert torch.equal(net.head(maps[-1]), logits)


@pytest.mark.parametrize("wrap", [lambda net: net, DecoderFeatures])
def test_copy_pickle_script_trace_and_export_equal_eager(wrap):
    net = wrap(small()).eval()
    first, second = torch.rand(1, 1, 64, 64), torch.rand(2, 1, 32, 48)
    check_twins(net, (first, second), exported=second)  # interpolates the position embeddings


def test_every_parameter_gets_a_gradient():
    net = small().train()
    net(torch.rand(2, 1, 48, 32)).square().mean().backward()  # another grid than the position embeddings'
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("to_k.bias"):  # softmax takes away what it adds
            assert parameter.grad.abs().sum() > 0, name
