"""L_total and lambda_t against slow references."""

import math

import pytest
import torch
from monai.losses import DiceCELoss, DiceLoss
from reference import loss_by_hand, shares

from monai_morse import InputError, MorseLoss
from monai_morse.losses import render_weight
from monai_morse.networks import MorseOutput


@pytest.mark.parametrize("batch, classes, size", [(1, 2, (3, 5)), (3, 3, (2, 3, 4)), (1, 9, (3, 4))])
def test_total_loss_equals_its_definition(batch, classes, size):
    logits = torch.randn(batch, classes, *size)
    target = torch.randint(0, classes, (batch, 1, *size)).float()
    index = torch.stack([torch.randperm(math.prod(size))[:4] for _ in range(batch)])
    points = torch.randn(batch, classes, 4)
    rendered = 0.0
    for b in range(batch):
        for k in range(4):
            label = int(target[b].flatten()[index[b, k]])
            rendered -= math.log((torch.exp(points[b, label, k]) / torch.exp(points[b, :, k]).sum()).item()) / (4 * batch)
    expected = loss_by_hand(logits.flatten(2).double().numpy(), shares(target, classes, size))
    assert MorseLoss()(logits, target).item() == pytest.approx(expected, abs=1e-5)
    total = MorseLoss(weight=0.3)(MorseOutput(logits, points, index), target)
    assert total.item() == pytest.approx(expected + 0.3 * rendered, abs=1e-5)


def test_a_slice_without_a_class_is_no_reason_to_suppress_the_class():
    """Dice of one slice falls from 1 to 0 as the last trace of an absent class goes; over the batch a trace costs a trace."""
    target = torch.zeros(2, 1, 16, 16)
    target[0, 0, 4:12, 4:12] = 1  # the second slice is without class 1
    right = torch.where(target == 1, 4.0, -4.0)
    logits = torch.cat([-right, right], 1)
    purged = logits.clone()
    purged[1, 1] = -40
    loss = MorseLoss()
    assert loss(purged, target) < loss(logits, target) < loss(purged, target) + 0.05


def test_at_weight_zero_the_points_get_no_gradient_not_one_of_zero():
    coarse, points = torch.randn(1, 3, 4, 5, requires_grad=True), torch.randn(1, 3, 6, requires_grad=True)
    output, target = MorseOutput(coarse, points, torch.arange(6)[None]), torch.randint(0, 3, (1, 1, 4, 5))
    resting = MorseLoss()
    resting.weight = 0.0  # as RenderSchedule sets it
    resting(output, target).backward()
    assert points.grad is None and coarse.grad is not None
    MorseLoss(weight=0.1)(output, target).backward()
    assert points.grad is not None


def test_one_class_channel_is_a_sigmoid():
    logits, target = torch.randn(2, 1, 4, 5), torch.randint(0, 2, (2, 1, 4, 5)).float()
    index = torch.randint(0, 20, (2, 6))
    points = torch.randn(2, 1, 6)
    supervised, total = MorseLoss()(logits, target), MorseLoss(1.0)(MorseOutput(logits, points, index), target)
    p = torch.sigmoid(points[:, 0])
    y = target.flatten(2)[:, 0].gather(1, index)
    assert (total - supervised).item() == pytest.approx(-(y * p.log() + (1 - y) * (1 - p).log()).mean().item(), abs=1e-5)


def test_gradient_by_finite_differences():
    logits = torch.randn(1, 3, 2, 3, requires_grad=True)
    points = torch.randn(1, 3, 2, requires_grad=True)
    target, index = torch.randint(0, 3, (1, 1, 2, 3)), torch.tensor([[1, 4]])
    loss = MorseLoss(weight=0.5)

    def total():
        return loss(MorseOutput(logits, points, index), target)

    total().backward()
    for x in (logits, points):
        for i in range(x.numel()):
            with torch.no_grad():
                flat = x.view(-1)
                flat[i] += 1e-2
                up = total().item()
                flat[i] -= 2e-2
                down = total().item()
                flat[i] += 1e-2
            assert x.grad.view(-1)[i].item() == pytest.approx((up - down) / 2e-2, abs=2e-4)


@pytest.mark.parametrize(
    "schedule, t, expected",
    [
        ("ramp", 0, 0.0), ("ramp", 500, 0.0), ("ramp", 501, 0.1 * 1 / 1000), ("ramp", 750, 0.025), ("ramp", 1000, 0.05),
        ("half", 500, 0.0), ("half", 501, 0.1), ("half", 1000, 0.1), ("scratch", 0, 0.1), ("scratch", 1000, 0.1),
    ],
)  # fmt: skip
def test_schedule(schedule, t, expected):
    assert render_weight(t, 1000, schedule) == pytest.approx(expected)


def test_unknown_schedule_is_an_error():
    with pytest.raises(InputError, match="'ramp', 'half', 'scratch'.*'linear'"):
        render_weight(0, 1, "linear")


def test_another_loss_gets_what_the_bare_backbone_gives_and_the_points_are_added():
    coarse, target = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 1, 8, 8))
    index = torch.randint(0, 64, (2, 5))
    output = MorseOutput(coarse, torch.randn(2, 3, 5), index)
    theirs = DiceLoss(softmax=True, to_onehot_y=True)
    labels = target.flatten(2)[:, 0].gather(1, index)
    expected = theirs(coarse, target) + 0.3 * torch.nn.functional.cross_entropy(output.point_logits, labels)
    assert torch.allclose(MorseLoss(0.3, theirs)(output, target), expected)
    one_hot = torch.nn.functional.one_hot(target[:, 0], 3).movedim(-1, 1)
    onehot_theirs = DiceLoss(softmax=True)
    expected += onehot_theirs(coarse, one_hot) - theirs(coarse, target)
    assert torch.allclose(MorseLoss(0.3, onehot_theirs)(output, one_hot), expected)
    finer = torch.randint(0, 3, (2, 1, 16, 16))
    assert torch.isfinite(MorseLoss(1e-9, theirs)(output, finer))  # on the labels' grid
    stacked = MorseLoss(1e-9, lambda logits, target: logits.sum())(torch.ones(2, 4, 3, 8, 8), target)
    assert stacked == 2 * 4 * 3 * 64  # a bare backbone's deep supervision, as it comes


def test_classes_that_do_not_exclude_one_another_have_a_sigmoid_each():
    coarse, target = torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8) > 0.5
    index = torch.randint(0, 64, (2, 5))
    output = MorseOutput(coarse, torch.randn(2, 3, 5), index)
    labels = torch.stack([target[b].flatten(1)[:, index[b]] for b in range(2)]).float()
    points = torch.nn.functional.binary_cross_entropy_with_logits(output.point_logits, labels)
    whole = DiceCELoss(sigmoid=True, batch=True, lambda_dice=0.5, lambda_ce=0.5)(coarse, target.float())
    assert torch.allclose(MorseLoss(0.3, multilabel=True)(output, target), whole + 0.3 * points)
    theirs = DiceLoss(sigmoid=True, squared_pred=True)  # which takes no bool
    expected = theirs(coarse, target.float()) + 0.3 * points
    assert torch.allclose(MorseLoss(0.3, theirs, multilabel=True)(output, target), expected)
    numbered = torch.randint(0, 3, (2, 1, 8, 8))
    channels = torch.nn.functional.one_hot(numbered[:, 0], 3).movedim(-1, 1)
    loss = MorseLoss(0.3, multilabel=True)
    assert torch.allclose(loss(output, numbered), loss(output, channels))
