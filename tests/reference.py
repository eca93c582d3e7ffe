"""Slow, obvious references in NumPy: loops over samples, voxels and points, with nothing of the package in them."""

import itertools
import math

import numpy as np
import torch
from conftest import grouped
from torch import nn

from monai_morse import Morse
from monai_morse.networks import DecoderFeatures
from monai_morse.networks.renderers import AnatomicalHead, PointRendHead

CLOSE = {"rtol": 0, "atol": 1e-9}
AT_VOXELS = {"rtol": 1e-6, "atol": 1e-6}  # coordinates of voxels are float32, see ``point_coordinates``

# --- the references -------------------------------------------------------------------------------------------------------


def voxels(size):
    return list(itertools.product(*[range(n) for n in size]))


def centre(voxel, size):
    """Coordinates of a voxel's centre, -1 and 1 being the outer faces, ordered like the axes."""
    return [2 * (i + 0.5) / n - 1 for i, n in zip(voxel, size)]


def value(x, voxel):
    """The vector of channels of ``x`` (C, *S) at one voxel."""
    return x[(slice(None), *voxel)]


def value_at(x, place):
    """Linear interpolation of ``x`` (C, *S) at one place, corner by corner; beyond the outermost centres the edge's value."""
    axes = []
    for c, n in zip(place, x.shape[1:]):
        position = min(max((c + 1) / 2 * n - 0.5, 0.0), n - 1.0)
        low = math.floor(position)
        axes.append([(low, 1 - (position - low)), (min(low + 1, n - 1), position - low)])
    total = np.zeros(x.shape[0])
    for corner in itertools.product(*axes):
        total += math.prod(w for _, w in corner) * value(x, [i for i, _ in corner])
    return total


def weights_of(module):
    """(matrix, bias) of each layer, in order; a kernel of size 1 is a matrix."""
    numbers = [p.detach().numpy() for p in module.parameters()]
    return [(w[..., 0] if w.ndim == 3 else w, b) for w, b in zip(numbers[::2], numbers[1::2])]


def mlp(layers, v, last_relu):
    for i, (w, b) in enumerate(layers):
        v = w @ v + b
        if last_relu or i + 1 < len(layers):
            v = np.maximum(v, 0)
    return v


def convolve(x, kernel, bias):
    """A convolution of size 3 with zeros around the map, one tap at a time."""
    size = x.shape[1:]
    out = np.zeros((len(bias), *size))
    for voxel in voxels(size):
        total = bias.copy()
        for tap in voxels([3] * len(size)):
            source = [i + t - 1 for i, t in zip(voxel, tap)]
            if all(0 <= i < n for i, n in zip(source, size)):
                total += kernel[(slice(None), slice(None), *tap)] @ value(x, source)
        out[(slice(None), *voxel)] = total
    return out


def average_or_interpolate(x, size):
    """``x`` (C, *S) on another grid: the mean of the voxels that a new one touches, or linear along axes that grow."""
    for axis, n in enumerate(size, 1):
        old = np.moveaxis(x, axis, 1)
        m = old.shape[1]
        new = np.zeros((old.shape[0], n, *old.shape[2:]))
        for i in range(n):
            if n < m:
                new[:, i] = old[:, i * m // n : -(-(i + 1) * m // n)].mean(1)
            else:
                position = min(max((i + 0.5) * m / n - 0.5, 0.0), m - 1.0)
                low = math.floor(position)
                new[:, i] = old[:, low] * (1 - position + low) + old[:, min(low + 1, m - 1)] * (position - low)
        x = np.moveaxis(new, 1, axis)
    return x


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def mixture_by_hand(m, features, size, counts=None):
    """Equations 1 and 2 for one sample: a function of a place that returns x_out and the experts' weights W there.

    ``counts`` is what each expert counts in training, 0 where it is dropped."""

    def expert(i, d):
        e = np.zeros((m.out_channels, *d.shape[1:]))
        for voxel in voxels(d.shape[1:]):
            e[(slice(None), *voxel)] = mlp(weights_of(m.experts[i]), value(d, voxel), last_relu=True)
        return e if counts is None else e * counts[i]

    experts = [expert(i, d) for i, d in enumerate(features)]
    gate_size = [math.ceil(n / k) for n, k in zip(size, m.gate_stride)]
    # the gate reads experts of averaged features, upsampled where they are coarser than its grid
    averaged = [average_or_interpolate(d, [min(a, b) for a, b in zip(d.shape[1:], gate_size)]) for d in features]
    logits = np.concatenate([average_or_interpolate(expert(i, d), gate_size) for i, d in enumerate(averaged)])
    if m.gate is None:
        logits = np.zeros((1, *gate_size))
    layers = list(m.gate or [])
    assert sum(hasattr(layer, "kernel_size") for layer in layers) in (0, 4)
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            logits = np.maximum(logits, 0)
        elif hasattr(layer, "kernel_size"):
            logits = convolve(logits, layer.weight.detach().numpy(), layer.bias.detach().numpy())
        else:
            normal = (logits - logits.mean()) / math.sqrt(((logits - logits.mean()) ** 2).mean() + 1e-5)
            for c, (scale, shift) in enumerate(zip(layer.weight.tolist(), layer.bias.tolist())):
                logits[c] = normal[c] * scale + shift

    def at(place):
        v, w = value_at(logits, place), np.zeros(len(experts))
        active = [i for i in range(len(experts)) if counts is None or counts[i] or not m.renormalize]
        if active:
            w[active] = softmax(v[active])
        mixed = sum(w[i] * value_at(e, place) for i, e in enumerate(experts))
        return mlp(weights_of(m.fuse), mixed, last_relu=True), w

    return at


def encode(frequencies, place):
    """Equation 3: all sines, then all cosines."""
    phases = [2 * math.pi * sum(f * c for f, c in zip(row, place)) for row in frequencies.detach().tolist()]
    return np.array([math.sin(p) for p in phases] + [math.cos(p) for p in phases])


def head_by_hand(head, feature, place, coarse, context):
    """Logits of one point."""
    if isinstance(head, AnatomicalHead):
        out = mlp(weights_of(head.mlp), np.concatenate([encode(head.encoding.frequencies, place), feature]), last_relu=False)
    elif isinstance(head, PointRendHead):
        (w1, b1), (w2, b2), (w3, b3), (w4, b4) = weights_of(head)
        h = np.maximum(w1 @ np.concatenate([feature, coarse]) + b1, 0)
        h = np.maximum(w2 @ np.concatenate([h, coarse]) + b2, 0)
        h = np.maximum(w3 @ np.concatenate([h, coarse]) + b3, 0)
        out = w4 @ np.concatenate([h, coarse]) + b4
    else:
        # 6 linear maps: 2 hidden ones, then the generator, whose output is matrix, bias, four times over
        w, b = head.generator.weight.detach().numpy(), head.generator.bias.detach().numpy()
        numbers = iter((w @ mlp(weights_of(head.hidden), context, last_relu=True) + b).tolist())
        v = np.concatenate([encode(head.encoding.frequencies, place), feature])
        width = head.hidden.layers[0].out_channels
        for layer, length in enumerate((width, width, width, len(coarse))):
            matrix = [[next(numbers) for _ in range(len(v))] for _ in range(length)]
            bias = [next(numbers) for _ in range(length)]
            v = np.array([sum(m * x for m, x in zip(row, v)) + b for row, b in zip(matrix, bias)])
            v = np.maximum(v, 0) if layer < 3 else v
        assert next(numbers, None) is None
        out = v
    return coarse + out if head.residual else out


def moved(window_affine, place):
    """A place in the window -> the place in the volume, by an affine map."""
    return [sum(a * c for a, c in zip(row[:-1], place)) + row[-1] for row in window_affine.tolist()]


def morse_by_hand(net, x, b, window_affine=None):
    """Sample ``b`` in eval mode: its coarse map (K, *S), and a function of a place that returns the rendered logits there."""
    backbone, size = net.decoder.backbone, list(x.shape[2:])
    with torch.no_grad():
        features = [f(x[b : b + 1])[0].numpy() for f in backbone.features]
        coarse = backbone.logits(x[b : b + 1])[0].numpy()
    if net.mixture is not None:
        mixture = mixture_by_hand(net.mixture, features, size)
    if net.classifier is not None:
        coarse = np.zeros_like(coarse)
        for voxel in voxels(size):
            x_out = mixture(centre(voxel, size))[0]
            coarse[(slice(None), *voxel)] = mlp(weights_of(net.classifier), x_out, last_relu=False)
    context = np.concatenate([[channel.mean() for channel in f] for f in features])

    def render(place):
        read = [] if net.mixture is None else [mixture(place)[0]]
        if net.mixture is None or net.read_features:
            read += [value_at(f, place) for f in features]
        if net.reads_patch:
            steps = itertools.product(*(range(-(side // 2), side // 2 + 1) for side in net.image_patch))
            around = [value_at(x[b].numpy(), [c + 2 * k / n for c, k, n in zip(place, step, size)]) for step in steps]
            patch = np.array(around).T
            if net.patch_norm:
                mean, deviation = patch.mean(1, keepdims=True), np.sqrt(patch.var(1, keepdims=True) + 0.01)
                patch = np.concatenate([(patch - mean) / deviation, mean, deviation], axis=1)
            read.append(patch.flatten())
        encoded = place if window_affine is None else moved(window_affine[b], place)
        return head_by_hand(net.renderer, np.concatenate(read), encoded, value_at(coarse, place), context)

    return coarse, render


def most_uncertain(logits, number):
    """The voxels of (K, *S) whose two largest logits differ least."""
    lead = {}
    for voxel in voxels(logits.shape[1:]):
        *_, second, largest = sorted(value(logits, voxel).tolist())
        lead[voxel] = largest - second
    order = sorted(lead, key=lambda v: lead[v])
    assert lead[order[number]] - lead[order[number - 1]] > 1e-9, "a tie: which voxels are meant is not defined"
    return set(order[:number])


def loss_by_hand(logits, target):
    """0.5 cross-entropy + 0.5 Dice loss over the batch, of logits and shares of classes (B, K, V); K = 1 is a sigmoid."""
    batch, classes, number = logits.shape
    entropy, overlap, both = 0.0, np.zeros(classes), np.zeros(classes)
    for b in range(batch):
        p = np.zeros((classes, number))
        for v in range(number):
            if classes == 1:
                p[0, v] = 1 / (1 + math.exp(-logits[b, 0, v]))
                t = target[b, 0, v]
                entropy -= (t * math.log(p[0, v]) + (1 - t) * math.log(1 - p[0, v])) / (batch * number)
            else:
                p[:, v] = softmax(logits[b, :, v])
                entropy -= sum(t * math.log(q) for t, q in zip(target[b, :, v], p[:, v])) / (batch * number)
        for k in range(classes):
            overlap[k] += (p[k] * target[b, k]).sum()
            both[k] += p[k].sum() + target[b, k].sum()
    return 0.5 * entropy + 0.5 * (1 - (2 * overlap + 1e-5) / (both + 1e-5)).mean()


def shares(labels, classes, size):
    """Labels (B, 1, *fine) -> the share of each class in the voxels of a coarser grid, (B, K, V)."""
    fine = labels.shape[2:]
    out, each = np.zeros((labels.shape[0], classes, *size)), math.prod(size) / math.prod(fine)
    for b in range(labels.shape[0]):
        for voxel in voxels(fine):
            label = int(labels[(b, 0, *voxel)])
            place = [i * n // m for i, n, m in zip(voxel, size, fine)]
            if classes == 1:
                out[(b, 0, *place)] += label * each
            else:
                out[(b, label, *place)] += each
    return out.reshape(*out.shape[:2], -1)


def total_by_hand(coarse, points, index, labels, weight):
    """L_total of a :class:`MorseOutput`'s three arrays."""
    batch, classes, number = points.shape
    total = loss_by_hand(coarse.reshape(batch, classes, -1), shares(labels, classes, coarse.shape[2:]))
    for b in range(batch):
        flat = labels[b, 0].flatten()
        for i in range(number):
            label, v = int(flat[index[b, i]]), points[b, :, i]
            chance = softmax(v)[label] if classes > 1 else 1 / (1 + math.exp(-v[0] if label else v[0]))
            total -= weight * math.log(chance) / (batch * number)
    return total


# --- networks with weights that mean nothing ------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """A backbone with decoder features of any width and reduction, one convolution each, and logits, another."""

    def __init__(self, dims, classes, channels, strides):
        super().__init__()
        conv = nn.Conv2d if dims == 2 else nn.Conv3d
        self.features = nn.ModuleList(conv(1, c, 3, stride=s, padding=1) for c, s in zip(channels, strides))
        self.logits = conv(1, classes, 3, padding=1)

    def forward(self, x):
        for feature in self.features:
            feature(x)
        return self.logits(x)


def randomised(module):
    """Random weights everywhere, in layers that start at zero too: few dead units, no layer that magnifies rounding errors."""
    for name, p in module.named_parameters():
        if p.ndim > 1:
            nn.init.kaiming_normal_(p)
            p.data *= 0.25 if "generator" in name else 0.6  # a generator's output is the matrices of a whole MLP
        else:
            nn.init.normal_(p, mean=0.5, std=0.3)
            p.data *= 0.4 if "generator" in name else 1
    return module.double().eval()


def pyramid_morse(dims, classes, channels, strides, num_eval=7, gate_stride=1, **options):
    names = [f"features.{i}" for i in range(len(channels))]
    backbone = DecoderFeatures(Pyramid(dims, classes, channels, strides), names)
    sizes = {"mixture": {"width": 6, "gate_stride": gate_stride}, "points": {"num_eval": num_eval, "num_train": 9}}
    sizes["head"] = {"width": 4, "num_frequencies": 3, "residual": False, **options.pop("head", {})}
    return randomised(Morse(backbone, **grouped({**sizes, **options})))


WINDOWS = [  # batch, classes, size, channels and strides of the decoder features
    (1, 2, [6, 5], [3], [1]),
    (3, 9, [4, 5], [4, 2, 3], [(2, 3), (1, 2), 1]),
    (3, 2, [3, 4, 2], [4, 3], [2, 1]),
    (1, 9, [4, 2, 3], [2, 3, 1, 2, 3], [4, (2, 1, 3), 2, (1, 1, 2), 1]),
]
COARSE = [("none", "backbone"), ("dense", "experts"), ("dense", "backbone"), ("stochastic", "experts")]
RENDERERS = ["anatomical", "pointrend", "implicit_pointrend"]
