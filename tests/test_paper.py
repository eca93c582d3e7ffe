"""The paper's sentences on method and training, one row each: what ``preset: paper`` has for it."""

import math

import pytest
import torch
from conftest import TINY
from ignite.engine import Engine
from monai.networks.nets import UNETR, BasicUNet

from monai_morse import Morse
from monai_morse.networks import ImplicitPointRendHead, Mixture, PointRendHead, TransUNet, UNet3D
from monai_morse.paper import paper_setup


@pytest.fixture(scope="module")
def setup():
    return paper_setup(BasicUNet(spatial_dims=2, out_channels=9, features=(16, 32, 64, 128, 256, 16)))


SENTENCES = {
    "we first use multiple small MLPs .. hidden dimensions [256, 256] with ReLU activations": lambda s: (
        [
            [layer.out_channels if hasattr(layer, "out_channels") else "ReLU" for layer in mlp.layers]
            for mlp in s.network.mixture.experts
        ]
        == [[256, "ReLU", 256, "ReLU"]] * 5
    ),
    "the dimension of expert features is 256": lambda s: s.network.mixture.out_channels == 256,
    "gating network: four 3 x 3 convolutional layers with channels [256, 256, 256, N] and ReLU activations": lambda s: (
        [
            (layer.out_channels, layer.kernel_size) if hasattr(layer, "kernel_size") else "ReLU"
            for layer in s.network.mixture.gate
        ]
        == [(256, (3, 3)), "ReLU", (256, (3, 3)), "ReLU", (256, (3, 3)), "ReLU", (5, (3, 3))]
    ),
    "concatenates all the expert features along channels": lambda s: s.network.mixture.gate[0].in_channels == 5 * 256,
    "weight matrices W in R^(H x W x d)": lambda s: s.network.mixture.gate_stride == [1, 1],
    "feed the resultant output to another MLP to fuse": lambda s: len(s.network.mixture.fuse.layers) == 4,
    "x_out is the coarse feature": lambda s: s.network.classifier.layers[0].in_channels == 256,
    "we empirically set alpha as 0.7": lambda s: s.network.options.dropout == 0.7,
    "standard dropout to multiple experts: zeroed with alpha, the others scaled by 1 / (1 - alpha)": lambda s: (
        s.network.mixture.dropout.masks.unique().tolist() == [0, pytest.approx(1 / 0.3)]
    ),
    "the omission of experts follows a Bernoulli(alpha) distribution": lambda s: torch.allclose(
        s.network.mixture.dropout.chance.double(),
        torch.tensor(
            [0.3 ** bin(code).count("1") * 0.7 ** (5 - bin(code).count("1")) for code in range(32)], dtype=torch.float64
        ),
    ),
    "as for inference, there is no dropout mask": lambda s: torch.equal(s.network.mixture.dropout.eval()(2), torch.ones(2, 5)),
    "softmax .. sum_i W_i = 1, over all experts": lambda s: not s.network.mixture.renormalize,
    "N_p is 2048 and 8192 for training and testing": lambda s: (s.network.num_train, s.network.num_eval) == (2048, 8192),
    "k_p, rho are 3, 0.75": lambda s: (s.network.oversample, s.network.importance_ratio) == (3, 0.75),
    "L frequencies, trainable, [w_k, v_k] Gaussian": lambda s: (
        s.network.renderer.encoding.frequencies.shape == (128, 2) and s.network.renderer.encoding.frequencies.requires_grad
    ),
    "a 3-layer MLP on encoding and x_out": lambda s: (
        s.network.renderer.mlp.layers[0].in_channels == 2 * 128 + 256 and len(s.network.renderer.mlp.layers) == 5
    ),
    "the rendered logits replace the coarse ones": lambda s: not s.network.renderer.residual,
    "nothing but coordinates and x_out is read": lambda s: not s.network.reads_patch and not s.network.read_features,
    "lambda_rend is 0.1, eq. 4": lambda s: (s.schedule.schedule, s.schedule.lambda_rend) == ("ramp", 0.1),
    "AdamW, 5e-4": lambda s: isinstance(s.optimizer, torch.optim.AdamW) and s.optimizer.param_groups[0]["lr"] == 5e-4,
    "polynomial decay, 30 K iterations": lambda s: s.lr_scheduler.total_iters == 30_000,
    "N is 5 for UNet": lambda s: s.network.options.num_experts == 5,
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_papers_sentence_is_what_one_call_makes(sentence, setup):
    assert SENTENCES[sentence](setup)


@pytest.mark.parametrize(
    "backbone, n",
    [
        (lambda: TransUNet(1, 9, 32, hidden_size=16, num_layers=1, num_heads=2, mlp_dim=32, resnet_units=(1, 1, 1)), 3),
        (lambda: UNet3D(1, 2, features=4), 3),
        (lambda: UNETR(1, 2, (32, 32, 32), 4, hidden_size=16, mlp_dim=32, num_heads=2), 3),
        (lambda: TINY["UNet"](2, 3), 4),  # of four levels it has no fifth feature
    ],
)
def test_n_is_the_papers_for_each_backbone(backbone, n):
    setup = paper_setup(backbone(), num_experts=n if n == 4 else None)
    assert setup.network.options.num_experts == len(setup.network.mixture.experts) == n


def test_lambda_t_is_equation_4_at_every_iteration(setup):
    seen = []
    trainer = Engine(lambda engine, batch: seen.append(setup.loss.weight))
    setup.schedule.attach(trainer)
    trainer.run([0] * 10, max_epochs=2)
    assert seen == pytest.approx([0.1 * (t > 10) * (t - 10) / 20 for t in range(1, 21)])


def test_the_learning_rate_decays_polynomially():
    setup = paper_setup(TINY["BasicUNet"](2, 3), iterations=10)
    rates = []
    for _ in range(10):
        rates.append(setup.optimizer.param_groups[0]["lr"])
        setup.optimizer.step()
        setup.lr_scheduler.step()
    assert rates == pytest.approx([5e-4 * (1 - t / 10) ** 0.9 for t in range(10)])


def test_standard_dropout_has_the_expectation_of_all_experts():
    """Of the sum of W_i F_i, over all masks: what is dropped and what is scaled even out."""
    m = Mixture([3, 2, 4], 2, width=4, drop_prob=0.7, min_active=0, renormalize=False).double()
    logits = torch.randn(1, 3, 5, dtype=torch.float64)
    mean = sum(
        c * m.train().weights(logits, mask[None]) for c, mask in zip(m.dropout.chance.double(), m.dropout.masks.double())
    )
    assert torch.allclose(mean, m.eval().weights(logits, torch.ones(1, 3)), atol=1e-6)


def test_implicit_pointrend_generates_as_many_parameters_as_its_source():
    head = ImplicitPointRendHead(32, num_classes=9, spatial_dims=2, context_channels=4, width=256, num_frequencies=128)
    layers = [(256 + 32, 256), (256, 256), (256, 256), (256, 9)]
    assert head.generator.out_features == sum((i + 1) * o for i, o in layers) == 207_881
    assert not head.encoding.frequencies.requires_grad


def test_the_penalty_on_generated_parameters_would_be_nothing_beside_the_loss():
    """Declared: 1e-5 times their mean square, left out."""
    head = ImplicitPointRendHead(32, num_classes=9, spatial_dims=2, context_channels=4, residual=False)
    generated = head.generator(head.hidden(torch.rand(2, 4, 1)).squeeze(2))
    assert 0 < 1e-5 * generated.square().mean() < 1e-6 < 1e-4 * 0.1 * math.log(9)  # the rendering loss at the start


def test_implicit_pointrend_trains_on_uniform_points_in_the_papers_preset():
    net = Morse(
        TINY["BasicUNet"](2, 3), "none", "implicit_pointrend", preset="paper", head={"width": 8}, points={"num_train": 9}
    )
    assert net.importance_ratio == 0 and net(torch.rand(1, 1, 32, 32), return_points=True).point_index.shape == (1, 9)
    given = Morse(TINY["BasicUNet"](2, 3), "none", "implicit_pointrend", preset="paper", points={"importance_ratio": 0.5})
    assert given.importance_ratio == 0.5


def test_pointrends_last_layer_starts_small():
    head = PointRendHead(64, num_classes=9, spatial_dims=2, width=256, residual=False)
    weight = head.predictor.layers[0].weight
    assert abs(weight.std().item() - 1e-3) < 1e-4 and head.predictor.layers[0].bias.abs().max() == 0


def test_at_least_one_active_expert_lowers_the_share_of_dropped_ones():
    """What docs/paper.md declares of the light preset: alpha 0.7 and N = 3 drop 54 % of the experts, not 70 %."""
    dropped = {}
    for min_active in (0, 1):
        dropout = Mixture([1, 1, 1], 2, width=1, drop_prob=0.7, min_active=min_active).dropout
        chance = dropout.chance / dropout.chance.sum()
        dropped[min_active] = float((chance * (1 - dropout.masks).mean(1)).sum())
    assert dropped[0] == pytest.approx(0.7) and round(dropped[1], 2) == 0.54
    assert dropped[1] == pytest.approx((0.7 - 0.7**3) / (1 - 0.7**3))


def test_frequencies_decay_as_all_weights_do(setup):
    """Declared: AdamW's default weight decay acts on the encoding's frequencies too."""
    (group,) = setup.optimizer.param_groups
    assert any(p is setup.network.renderer.encoding.frequencies for p in group["params"]) and group["weight_decay"] == 0.01
    assert math.isclose(
        (1 - 5e-4 * 0.01) ** (30_000 / 1.9), 0.924, abs_tol=0.001
    )  # what is left of them, learning rates decaying
