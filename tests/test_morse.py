"""Morse: every cell on every backbone, 2D and 3D, exact at the points, and wherever PyTorch takes a network."""

import copy
import io
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import ROWS, SMALL, TINY, grouped, window
from monai.data import DataLoader, Dataset, MetaTensor, decollate_batch
from monai.losses import DiceCELoss

from monai_morse import InputError, Morse
from monai_morse.networks import DecoderFeatures, decoder_names, register_backbone
from monai_morse.networks import points as geometry
from tools.systems import BACKBONES, CELLS, run_tiny


def image(dims, batch=2):
    return torch.rand(batch, 1, *(32, 48, 16)[:dims])


def morse(backbone="BasicUNet", dims=2, classes=3, **options):
    return Morse(TINY[backbone](dims, classes), **grouped({**SMALL, **options}))


@pytest.mark.parametrize("backbone, dims", ROWS)
def test_every_cell_trains_and_segments_on_every_backbone(backbone, dims):
    errors = {cell: run_tiny(BACKBONES[backbone], dims, *cell) for cell in CELLS}
    assert len(errors) == 12 and not any(errors.values()), errors


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("experts, renderer", CELLS)
def test_shapes_in_train_and_eval_and_gradients(dims, experts, renderer):
    net = morse("BasicUNet", dims, experts=experts, renderer=renderer)
    x = image(dims)
    for mode in (True, False):
        out = net.train(mode)(x)
        assert type(out) is torch.Tensor and out.shape == (2, 3, *x.shape[2:]) and out.isfinite().all()
    out = net.train()(x, return_points=True)
    rendered = 0 if renderer == "none" else 64
    assert out.coarse.shape == (2, 3, *x.shape[2:])
    assert out.point_logits.shape == (2, 0 if experts == renderer == "none" else 3, rendered) and out.point_index.shape == (
        2,
        rendered,
    )
    (out.coarse.sum() + out.point_logits.sum()).backward()
    if experts != "stochastic":  # a dropped expert has no gradient
        trained = [(n, p) for n, p in net.named_parameters() if not n.startswith("decoder.") and p.requires_grad]
        assert [n for n, p in trained if p.grad is None] == []


@pytest.mark.parametrize("backbone, dims", ROWS)
def test_none_none_is_the_backbone_bit_for_bit(backbone, dims):
    bare = TINY[backbone](dims, 3)
    net = Morse(copy.deepcopy(bare), "none", "none")
    x = window(backbone, dims)
    assert len(list(net.parameters())) == len(list(bare.parameters()))
    assert torch.equal(net.eval()(x), bare.eval()(x))
    torch.manual_seed(1)
    expected = bare.train()(x)
    torch.manual_seed(1)
    got = net.train()(x)  # with deep supervision: all its maps
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def check_copies(net, x):
    with torch.no_grad():
        expected = net(x)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(x), expected)
            assert list(twin.state_dict()) == list(net.state_dict())
        assert torch.allclose(torch.jit.trace(net, x, check_trace=False)(x), expected, atol=1e-5)


def check_script(net, *inputs):
    with torch.no_grad():
        expected = [net(x) for x in inputs]
        stored = io.BytesIO()
        torch.jit.save(torch.jit.script(net).train().eval(), stored)
        stored.seek(0)
        loaded = torch.jit.load(stored)
        assert all(torch.allclose(loaded(x), e, atol=1e-5) for x, e in zip(inputs, expected))


UNSCRIPTABLE = ("SwinUNETR", "MedNeXt", "MedNeXt, deep supervision", "DynUNet, deep supervision")


@pytest.mark.parametrize("backbone, dims", ROWS)
def test_copy_pickle_trace_and_script_keep_the_output(backbone, dims):
    net = morse(backbone, dims).eval()
    x = window(backbone, dims)
    check_copies(net, x)
    if backbone not in UNSCRIPTABLE:
        check_script(net, x)


@pytest.mark.parametrize("backbone", UNSCRIPTABLE)
def test_what_does_not_script_does_not_script_bare(backbone):
    with pytest.raises(Exception):  # noqa: B017 (torch raises several kinds)
        torch.jit.script(TINY[backbone](3, 3))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("experts, renderer", CELLS)
def test_every_cell_copies_traces_and_scripts_to_other_sizes(dims, experts, renderer):
    net = morse("DynUNet", dims, experts=experts, renderer=renderer).eval()
    check_copies(net, image(dims))
    check_script(net, image(dims), torch.rand(1, 1, *(48, 64, 32)[:dims]))


@pytest.mark.parametrize("backbone, dims", [(name, backbone.dims[-1]) for name, backbone in BACKBONES.items()])
def test_export_keeps_the_output(backbone, dims):
    net = morse(backbone, dims).eval()
    x = window(backbone, dims)
    with torch.no_grad():
        try:
            torch.export.export(TINY[backbone](dims, 3).eval(), (x,))
        except Exception as error:
            pytest.skip(f"torch {torch.__version__} does not export a bare {backbone}: {type(error).__name__}")
        assert torch.allclose(torch.export.export(net, (x,)).module()(x), net(x), atol=1e-5)


@pytest.mark.parametrize("experts, coarse", [("none", "backbone"), ("dense", "experts"), ("dense", "backbone")])
@pytest.mark.parametrize("dims", [2, 3])
def test_inference_changes_the_most_uncertain_voxels_and_no_other(dims, experts, coarse):
    net = morse("DynUNet", dims, experts=experts, coarse=coarse, points={"num_eval": 37}).eval()
    x = image(dims)
    with torch.no_grad():
        seen = net.inspect(x)
        coarse_logits, mask = seen["coarse"], seen["rendered"]
        out = net(x)
        assert torch.equal(seen["logits"], out)
        grid = [2 * n for n in x.shape[2:]]
        finer = net.inspect(x, grid)
        changed = (net(x, grid=grid) != finer["coarse"]).any(1, keepdim=True)
        assert changed.any() and (finer["rendered"][changed] == 1).all()
    if coarse == "backbone":
        assert torch.equal(coarse_logits, net.decoder.backbone(x))
    top = coarse_logits.sort(1).values
    score = (top[:, -2] - top[:, -1]).flatten(1)
    changed = (out != coarse_logits).any(1).flatten(1)
    assert changed.sum() >= 70  # a rendered logit may happen to equal the coarse one
    for b in range(2):
        expected = set(sorted(range(score.shape[1]), key=lambda i: -score[b, i].item())[:37])
        assert set(changed[b].nonzero().flatten().tolist()) <= expected
        assert set(mask[b].flatten().nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("dims", [2, 3])
def test_without_experts_a_point_reads_every_decoder_feature_there(dims):
    net = morse("DynUNet", dims, experts="none", image_patch=0).eval()
    x = image(dims, batch=1)
    size = list(x.shape[2:])
    with torch.no_grad():
        maps = net._maps(x)
        coarse, features = maps.coarse, maps.features
        index = torch.arange(math.prod(size))[None]
        mode = "bilinear" if dims == 2 else "trilinear"
        up = [torch.nn.functional.interpolate(f, size, mode=mode, align_corners=False).flatten(2) for f in features]
        coordinates = geometry.point_coordinates(index, size)
        expected = net.renderer(torch.cat(up, 1), coordinates, coarse.flatten(2), torch.zeros(1, 0))
        assert torch.allclose(net._render(maps, coordinates, coarse.flatten(2), None), expected, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_any_number_of_experts_takes_the_finest_features(n):
    net = morse(num_experts=n)
    assert [f.name for f in net.decoder.info] == ["down_4", "upcat_4", "upcat_3", "upcat_2", "upcat_1"][5 - n :]
    assert net(image(2)).shape == (2, 3, 32, 48)


@pytest.mark.parametrize("classes", [1, 2, 9])
def test_number_of_classes(classes):
    assert morse(classes=classes).eval()(image(2)).shape == (2, classes, 32, 48)


def test_window_with_fewer_voxels_than_points():
    net = morse(points={"num_train": 10**6, "num_eval": 10**6})
    out = net(image(2), return_points=True)
    assert out.point_index.shape == (2, 32 * 48)
    assert net.eval()(image(2)).shape == (2, 3, 32, 48)


def test_autocast_stays_close():
    net = morse(dims=3, experts="dense").eval()
    x = image(3)
    with torch.no_grad():
        expected = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x)
            points = net.train()(x, return_points=True)
    assert (out.float() - expected).abs().mean() < 0.05 * expected.abs().mean() + 0.01
    assert points.point_logits.isfinite().all()


def test_training_mode_is_a_sample_of_the_experts_and_eval_is_not():
    net = morse(num_experts=3, dropout=0.5, renderer="none")
    x = image(2, batch=1)
    with torch.no_grad():
        assert len({net(x).sum().item() for _ in range(12)}) > 1
        assert len({net.eval()(x).sum().item() for _ in range(3)}) == 1


def test_meta_tensor_in_meta_tensor_out():
    x = MetaTensor(image(2), meta={"filename_or_obj": "scan.nii.gz"})
    out = morse().eval()(x)
    assert isinstance(out, MetaTensor) and out.meta["filename_or_obj"] == "scan.nii.gz"


def test_a_collated_batch_comes_out_as_one_and_can_be_taken_apart():
    network = morse().eval()
    names = ["a.nii.gz", "b.nii.gz"]
    affines = [torch.diag(torch.tensor([s, s, s, 1.0])) for s in (1, 2)]
    scans = [  # as LoadImage leaves them
        {"image": MetaTensor(image(2)[0], affine=a, meta={"filename_or_obj": n, "original_channel_dim": float("nan")})}
        for n, a in zip(names, affines)
    ]
    batch = next(iter(DataLoader(Dataset(scans), batch_size=2)))["image"]
    out = decollate_batch(network(batch))
    assert [o.meta["filename_or_obj"] for o in out] == names and [o.shape for o in out] == [network(image(2))[0].shape] * 2
    assert all(torch.equal(o.affine.float(), a) for o, a in zip(out, affines))


def test_threads_share_one_network():
    net = morse(dims=3).eval()
    windows = [image(3, batch=1) for _ in range(8)]
    with torch.no_grad():
        expected = [net(x) for x in windows]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: net(x).detach(), windows * 3))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, expected * 3))


def test_same_seed_same_points():
    net, x = morse(), image(2)
    first, second = [], []
    for found in (first, second):
        torch.manual_seed(3)
        out = net(x, return_points=True)
        found += [out.point_index, out.point_logits]
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": "sparse"}, "experts must be one of .*'stochastic'.*'sparse'"),
        ({"renderer": "nerf"}, "renderer must be one of .*'nerf'"),
        ({"coarse": "fine"}, "coarse must be one of .*'fine'"),
        ({"num_experts": 9}, "num_experts must be 1 to 5.*got 9"),
        ({"num_experts": 0}, "num_experts must be 1 to 5"),
        ({"dropout": 1.0}, "dropout .alpha. must be a number in .0, 1., got 1.0"),
        ({"mixture": {"widht": 8}}, "mixture: unknown option 'widht'.*did you mean width"),
        ({"head": {"depth": 8}}, "head: .*depth"),
        ({"points": {"n": 8}}, "points: .*'n'"),
        ({"renderer": "none", "coarse": "backbone"}, "experts without a renderer"),
    ],
)
def test_bad_options_are_errors(options, message):
    with pytest.raises(InputError, match=message):
        morse(**options)


@pytest.mark.parametrize("options, most", [({}, 60), ({"oversample": 3}, 384)])
def test_training_points_are_as_uncertain_as_those_rendered_at_inference(options, most):
    """Of 1536 voxels 60 are rendered: training draws its uncertain points from those, with the paper's k_p from a quarter."""
    points = {"num_train": 40, "num_eval": 60, **options}
    net = morse(experts="none", points=points).eval()
    x = image(2, batch=1)
    with torch.no_grad():
        score = geometry.uncertainty(net.inspect(x)["coarse"])[0]
        ranks = torch.empty(score.numel(), dtype=torch.long)
        ranks[score.argsort(descending=True)] = torch.arange(score.numel())
        drawn = torch.cat([ranks[net(x, return_points=True).point_index[0, :30]] for _ in range(200)])
    assert drawn.float().mean() == pytest.approx(most / 2, rel=0.05)
    assert most > 60 or drawn.max() == 59


def test_a_window_that_is_rendered_whole_draws_points_anywhere():
    net = morse(experts="none", points={"num_train": 100, "num_eval": 5000})
    assert net(image(2), return_points=True).point_index.shape == (2, 100)


@pytest.mark.parametrize("preset", ["light", "paper"])
def test_the_renderer_reads_the_decoder_features_beside_x_out(preset):
    """Another mixture, the same features: with both the light preset's points change, without x_out nothing would."""
    head = {"width": 8, "num_frequencies": 4, "residual": False}
    net = morse(preset=preset, coarse="backbone", image_patch=0, head=head).eval()
    channels = sum(f.channels for f in net.decoder.info)
    assert net.renderer.mlp.layers[0].in_channels == 2 * 4 + net.mixture.out_channels + (channels if preset == "light" else 0)
    x, places = image(2, batch=1), torch.rand(1, 5, 2)
    with torch.no_grad():
        before = net.render_at(x, places)
        for p in net.mixture.fuse.parameters():
            p.zero_()  # x_out is nothing now: what is left are coordinates and, in the light preset, features
        after, other = net.render_at(x, places), net.render_at(image(2, batch=1) + 1, places)
    assert not torch.equal(before, after)
    assert torch.equal(after, other) == (preset == "paper")


@pytest.mark.parametrize("dims", [2, 3])
def test_with_a_stride_the_backbone_sees_averages_and_the_renderer_the_image(dims):
    net = morse("DynUNet", dims, experts="none", renderer="anatomical", stride=2, image_patch=3, head={"width": 8}).eval()
    x = image(dims)
    blocks = x.unfold(2, 2, 2).unfold(3, 2, 2) if dims == 2 else x.unfold(2, 2, 2).unfold(3, 2, 2).unfold(4, 2, 2)
    averaged = blocks.flatten(2 + dims).mean(-1)
    with torch.no_grad():
        upsampled = F.interpolate(net.decoder.backbone(averaged), x.shape[2:], mode="bilinear" if dims == 2 else "trilinear")
        assert torch.allclose(net(x), upsampled, atol=1e-5)  # an untrained renderer changes nothing
        for parameter in net.renderer.mlp.layers[-1].parameters():  # the bias too: all 8 channels may be dead somewhere
            torch.nn.init.normal_(parameter)
        changed = (net(x) != upsampled).any(1, keepdim=True)
        assert torch.equal(changed.float(), net.inspect(x)["rendered"])
        # the same averages, another image: the coarse map stays, what is rendered does not
        other = x.clone()
        other[:, :, ::2] += 0.1
        other[:, :, 1::2] -= 0.1
        a, b = (net(v, return_points=True) for v in (x, other))
        assert torch.allclose(a.coarse, b.coarse, atol=1e-5)
        assert not torch.allclose(net(x)[changed.expand(-1, 3, *x.shape[2:])], net(other)[changed.expand(-1, 3, *x.shape[2:])])
    check_copies(net, x)
    check_script(net, x, torch.rand(1, 1, *(48, 64, 32)[:dims]))


@pytest.mark.parametrize("experts, renderer", CELLS)
def test_every_cell_takes_a_stride_and_reads_the_image(experts, renderer):
    net = morse("DynUNet", 3, experts=experts, renderer=renderer, stride=2, image_patch=3)
    out = net(image(3), return_points=True)
    assert out.coarse.shape == (2, 3, 32, 48, 16)
    (out.coarse.sum() + out.point_logits.sum()).backward()


@pytest.mark.parametrize(
    "dims, stride, preset, side",
    [(2, 1, "light", 3), (3, 1, "light", 3), (2, 2, "light", 7), (3, 2, "light", 5), (3, 2, "paper", 0)],
)
def test_the_coarser_the_backbone_sees_the_image_the_more_of_it_is_read(dims, stride, preset, side):
    net, blind = (morse("DynUNet", dims, stride=stride, preset=preset, image_patch=patch) for patch in (None, 0))
    assert net.image_patch == [side] * dims
    inputs = [n.renderer.mlp.layers[0].weight.shape[1] for n in (net, blind)]
    assert inputs[0] - inputs[1] == (side**dims + 2 if side else 0)  # the voxels, their mean and spread


@pytest.mark.parametrize(
    "given, patch", [({}, [5, 3, 5]), ({"image_patch": [3, 1, 5]}, [3, 1, 5]), ({"image_patch": 3}, [3] * 3)]
)
def test_strides_and_patches_by_axis(given, patch):
    net = morse("DynUNet", 3, experts="none", stride=[2, 1, 4], **given).eval()
    assert net.image_patch == patch
    x = torch.rand(1, 1, 16, 24, 64)
    averaged = x.unfold(2, 2, 2).unfold(4, 4, 4).flatten(5).mean(-1)
    with torch.no_grad():
        coarse = F.interpolate(net.decoder.backbone(averaged), x.shape[2:], mode="trilinear")
        seen = net.inspect(x)
        assert torch.allclose(seen["coarse"], coarse, atol=1e-5)
        assert seen["rendered"].sum() == 100 and not torch.equal(seen["logits"], coarse)
    check_copies(net, x)
    check_script(net, x, torch.rand(1, 1, 32, 16, 32))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"stride": 0}, "stride must be whole numbers from 1 on, got 0"),
        ({"stride": [2, 2, 1]}, "stride must be a whole number or 2 of them"),
        ({"stride": "fine"}, "stride must be a whole number, got 'fine'"),
        ({"image_patch": 2}, "image_patch must be 0 or odd numbers of voxels"),
        ({"image_patch": -1}, "image_patch must be 0 or odd"),
        ({"image_patch": [3, 0]}, "image_patch must be 0 or odd"),
        ({"mixture": {"gate_stride": [4, 4, 4]}}, "mixture: gate_stride must be a whole number or 2"),
        ({"points": {"multilabel": "maybe"}}, "points: multilabel must be true or false, got 'maybe'"),
        ({"num_experts": "three"}, "num_experts must be a whole number, got 'three'"),
        ({"mixture": 3}, "mixture must be a mapping of coarse, width"),
    ],
)
def test_values_of_the_wrong_kind_are_errors(options, message):
    with pytest.raises(InputError, match=message):
        morse(**options)


def test_words_of_a_command_line_mean_what_they_mean_in_a_file():
    points = {"multilabel": "false", "num_eval": "50", "oversample": None}
    net = morse(num_experts="2", dropout="0.5", image_patch="3", patch_norm="True", points=points)
    file = morse(num_experts=2, dropout=0.5, image_patch=3, patch_norm=True, points={"multilabel": False, "num_eval": 50})
    assert net.options == file.options and not net.multilabel and net.patch_norm


def test_options_are_plain_data_and_print():
    net = morse("DynUNet", 3, stride=[2, 2, 1], preset="light")
    lines = str(net.options).splitlines()
    assert lines[0] == "experts: stochastic" and "stride: [2, 2, 1]" in lines
    assert net.options.mixture["coarse"] == "backbone" and net.options.head["image_patch"] == [5, 5, 3]


def test_points_given_to_another_loss_are_an_error_that_says_so():
    output = morse()(image(2), return_points=True)
    with pytest.raises(AttributeError, match="MorseOutput has no 'dim'.*needs MorseLoss"):
        DiceCELoss(to_onehot_y=True, softmax=True)(output, torch.zeros(2, 1, 32, 48))


@pytest.mark.parametrize("number, names", [(None, ["upcat_3", "upcat_1"]), (1, ["upcat_1"])])
def test_a_backbone_that_names_its_features_decides_which_there_are(number, names):
    features = DecoderFeatures(TINY["BasicUNet"](2, 3), ["upcat_3", "upcat_1"])
    net = Morse(features, num_experts=number, **SMALL)
    assert [f.name for f in net.decoder.info] == names and net.options.num_experts == len(names)
    assert "decoder.backbone.conv_0.conv_0.conv.weight" in net.state_dict()
    with pytest.raises(InputError, match="num_experts must be 1 to 2, the decoder features of BasicUNet, got 3"):
        Morse(features, num_experts=3, **SMALL)


def test_a_registered_class_is_known_and_the_last_registration_counts():
    class Mine(type(TINY["BasicUNet"](2, 3))):
        pass

    mine = Mine(2, 1, 3, features=(4, 4, 8, 16, 32, 4))
    register_backbone(Mine, ["upcat_2", "upcat_1"])
    assert decoder_names(mine) == ["upcat_2", "upcat_1"]
    register_backbone(Mine, lambda net: [f"upcat_{i}" for i in (4, 3)])
    assert [f.name for f in Morse(mine, num_experts=2, **SMALL).decoder.info] == ["upcat_4", "upcat_3"]
    assert len(decoder_names(TINY["BasicUNet"](2, 3))) == 5
    with pytest.raises(InputError, match="must be a list of names, got the string 'up'"):
        register_backbone(Mine, "up")
