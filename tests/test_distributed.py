"""Two processes, each with half of a batch, learn what one learns from the whole of it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import TINY
from monai.losses import DiceCELoss
from torch.nn.parallel import DistributedDataParallel

from monai_morse import Morse, MorseLoss

# every voxel a point: nothing is drawn at random
ALL_POINTS = {"num_train": 16**3, "num_eval": 100}


def train(experts, renderer, rank, processes):
    """Losses of three steps, the mean over the processes, and the weights after them.

    In float64: float32's rounding depends on the batch's size and the CPU, and grows from step to step. With a loss that is a
    mean of samples, which the default is not: its Dice is that of a process's batch.
    """
    torch.manual_seed(0)
    net = Morse(TINY["DynUNet"](3, 3), experts, renderer, mixture={"width": 8}, head={"width": 8}, points=ALL_POINTS).double()
    images, labels = torch.rand(3, 4, 1, 16, 16, 16, dtype=torch.float64), torch.randint(0, 3, (3, 4, 1, 16, 16, 16))
    model = DistributedDataParallel(net, find_unused_parameters=True) if processes > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses, samples = [], DiceCELoss(softmax=True, to_onehot_y=True)
    for step, (image, label) in enumerate(zip(images, labels)):
        own = slice(rank, None, processes)
        criterion = MorseLoss(loss=samples)
        criterion.weight = 0.5 * step  # 0 at first, as in a ramp
        loss = criterion(model(image[own], return_points=True), label[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if processes > 1:
            dist.all_reduce(total)
        losses.append(total.item() / processes)
    return losses, [p.detach() for p in net.parameters()]


def process(rank, experts, renderer, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    result = train(experts, renderer, rank, 2)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("experts, renderer", [("dense", "anatomical"), ("none", "none")])
def test_two_processes_have_the_losses_and_weights_of_one_with_the_joint_batch(experts, renderer, tmp_path):
    mp.spawn(process, (experts, renderer, str(tmp_path)), nprocs=2)
    losses, weights = torch.load(tmp_path / "result.pt", weights_only=True)
    expected_losses, expected_weights = train(experts, renderer, 0, 1)
    assert losses == pytest.approx(expected_losses, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(weights, expected_weights, strict=True))
