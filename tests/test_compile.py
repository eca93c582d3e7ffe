"""MONAI's ``compile``: a compiled network trains to the losses of one that is not, and its checkpoints know nothing of it."""

import pytest
import torch
from conftest import ROOT, SMALL, TINY, window
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.engines import SupervisedTrainer
from monai.utils import set_determinism

from monai_morse import Morse, MorseLoss
from monai_morse.engines import prepare_batch_with_points
from monai_morse.handlers import CoarsePrediction, EpochSeed, TrainingState
from monai_morse.inferers import MorseInferer


def train(folder, compiled, epochs=2, resume=False, handlers=()):
    """The losses of a training, two batches an epoch, and its network."""
    torch._dynamo.reset()
    set_determinism(0)
    network = Morse(TINY["DynUNet"](2, 3), stride=2, **SMALL)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    image = torch.cat([window("DynUNet", 2)] * 2, dim=-1)
    batch = {"image": MetaTensor(image), "label": MetaTensor((image * 3).long().float())}
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=[batch, batch],
        network=network,
        optimizer=optimizer,
        loss_function=MorseLoss(),
        inferer=MorseInferer(),
        prepare_batch=prepare_batch_with_points,
        train_handlers=[EpochSeed(0), TrainingState(f"{folder}/last.pt", network, optimizer, resume=resume), *handlers],
        decollate=False,
        compile=compiled,
        compile_kwargs={"backend": "aot_eager", "fullgraph": True},
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(float(engine.state.output["loss"])))
    trainer.run()
    return losses, network


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    return train(tmp_path_factory.mktemp("eager"), False)[0]


@pytest.mark.parametrize("handlers", [[], [CoarsePrediction()]], ids=["points", "coarse"])
def test_a_compiled_training_has_the_same_losses(tmp_path, eager, handlers):
    losses, network = train(tmp_path, True, handlers=handlers)
    assert losses == pytest.approx(eager, rel=1e-4) and len(set(losses)) == 4
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert saved.keys() == network.state_dict().keys() and not any("_orig_mod" in name for name in saved)


@pytest.mark.parametrize("first", [True, False])
def test_a_training_goes_on_compiled_or_not(tmp_path, eager, first):
    begun, _ = train(tmp_path, first, epochs=1)
    ended, _ = train(tmp_path, not first, resume=True)
    assert begun + ended == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("words, expected", [({}, False), ({"compile": "false"}, False), ({"compile": "true"}, True)])
@pytest.mark.parametrize("bundle", ["hippocampus_mri_morse", "liver_mpmri_morse", "synapse_ct_morse"])
def test_every_bundle_hands_the_word_to_its_trainer(bundle, words, expected):
    config = ConfigParser()
    config.read_config(ROOT / "bundles" / bundle / "configs" / "train.yaml")
    config.update(words)
    assert config.get_parsed_content("train#trainer#compile") is expected
    assert config.get_parsed_content("train#trainer#compile_kwargs") == {"options": {"fallback_random": True}}
