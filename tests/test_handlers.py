"""Handlers on small ignite engines."""

import csv
import os

import numpy as np
import pytest
import torch
from conftest import SMALL, TINY
from ignite.engine import Engine, Events
from monai.data import MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import MeanDice
from monai.inferers import SliceInferer, SlidingWindowInferer
from monai.transforms import Activationsd, AsDiscreted, Compose

from monai_morse import InputError, Morse, MorseLoss
from monai_morse.data import ToScanGridd
from monai_morse.handlers import (
    BestModel,
    BoundaryErrors,
    CasePictures,
    CaseReport,
    ClassMetrics,
    EpochSeed,
    FiniteLoss,
    RenderSchedule,
    TrainingState,
    WeightsLoader,
    evaluation,
)
from monai_morse.inferers import AutocastInferer, CoordinatesInferer, FineGridInferer
from monai_morse.losses import render_weight
from monai_morse.metrics import boundary_distance
from monai_morse.visualize import boundary_picture


def start_after(engine, epoch, length):
    @engine.on(Events.STARTED)
    def _(engine):
        engine.state.epoch, engine.state.iteration = epoch, epoch * length


def test_lambda_follows_the_trainers_iterations_across_a_resume():
    seen, loss = [], MorseLoss()

    def trainer():
        engine = Engine(lambda engine, batch: seen.append(loss.weight))
        RenderSchedule(loss, "ramp", 0.1).attach(engine)
        return engine

    first = trainer()
    first.add_event_handler(Events.EPOCH_COMPLETED(once=3), lambda engine: engine.terminate())
    first.run([0] * 5, max_epochs=6)
    second = trainer()
    start_after(second, epoch=3, length=5)
    second.run([0] * 5, max_epochs=6)
    assert seen == pytest.approx([render_weight(t, 30, "ramp") for t in range(1, 31)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training_before_an_update(value):
    network, updates = torch.nn.Linear(2, 1), []
    losses = iter([1.0, 1.0, 1.0, value])
    trainer = SupervisedTrainer(
        "cpu",
        max_epochs=4,
        train_data_loader=[{"image": torch.ones(1, 2), "label": torch.zeros(1, 1)}] * 3,
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), 0.1),
        loss_function=lambda pred, label: pred.sum() * next(losses),
        train_handlers=[FiniteLoss()],
    )
    trainer.add_event_handler(IterationEvents.MODEL_COMPLETED, lambda engine: updates.append(1))
    with pytest.raises(InputError, match="loss is (nan|-?inf) at iteration 4, epoch 2"):
        trainer.run()
    assert len(updates) == 3 and network.weight.isfinite().all()


def test_epochs_draw_the_same_numbers_wherever_training_starts():
    def draw(start, seed=5):
        drawn = {}

        def step(engine, batch):
            numbers = torch.rand(1).item(), np.random.rand()  # noqa: NPY002
            drawn.setdefault(engine.state.epoch, []).append(numbers)

        engine = Engine(step)
        EpochSeed(seed).attach(engine)
        start_after(engine, epoch=start, length=3)
        engine.run([0] * 3, max_epochs=4)
        return drawn

    whole = draw(0)
    assert draw(2) == {e: whole[e] for e in (3, 4)}
    assert len({str(v) for v in whole.values()}) == 4
    assert not {str(v) for v in whole.values()} & {str(v) for v in draw(0, seed=6).values()}  # neighbours share nothing


@pytest.mark.parametrize("seed", [-1, 1.5, None, "x"])
def test_a_seed_that_cannot_be_one_is_an_error_at_once(seed):
    with pytest.raises(InputError, match="seed must be a whole number in"):
        EpochSeed(seed)


class Evaluator(Engine):
    """An evaluator with a best metric, as MONAI's."""

    def __init__(self):
        super().__init__(lambda engine, batch: None)
        self.state.best_metric, self.state.best_metric_epoch = -1.0, -1
        self.state.key_metric_name = "dice"


def files(folder):
    return sorted(name for name in os.listdir(folder) if name != ".training.lock")


def training(tmp_path, resume, epochs, evaluator=None, settings=None):
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, 6)

    def step(engine, batch):
        optimizer.zero_grad()
        net(torch.rand(4, 2)).pow(2).sum().backward()
        optimizer.step()

    engine = Engine(step)
    engine.state.device = torch.device("cpu")
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: scheduler.step())
    EpochSeed(0).attach(engine)
    TrainingState(tmp_path / "last.pt", net, optimizer, scheduler, evaluator, resume, settings).attach(engine)
    engine.run([0] * 3, max_epochs=epochs)
    return net


def test_resumed_training_ends_with_the_same_weights(tmp_path):
    whole = training(tmp_path / "a", False, 6)
    training(tmp_path / "b", False, 2)  # PolynomialLR is over 6 epochs in both
    resumed = training(tmp_path / "b", True, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_best_metric_survives_a_resume(tmp_path):
    evaluator = Evaluator()
    evaluator.state.best_metric, evaluator.state.best_metric_epoch = 0.8, 2
    training(tmp_path, False, 2, evaluator)
    fresh = Evaluator()
    training(tmp_path, "true", 3, fresh)
    assert (fresh.state.best_metric, fresh.state.best_metric_epoch) == (0.8, 2)


def test_a_fresh_start_keeps_the_earlier_training(tmp_path):
    training(tmp_path, False, 2)
    before = (tmp_path / "last.pt").read_bytes()
    training(tmp_path, "false", 1)
    assert (tmp_path / "last.previous.pt").read_bytes() == before


def test_a_fresh_start_leaves_nothing_of_another_training_to_resume(tmp_path):
    training(tmp_path, False, 2)
    engine, net = Engine(lambda engine, batch: engine.terminate()), torch.nn.Linear(2, 2)  # ends before its first epoch does
    TrainingState(tmp_path / "last.pt", net, torch.optim.SGD(net.parameters(), 0.1)).start(engine)
    assert files(tmp_path) == ["last.previous.pt"]


def test_resume_of_a_training_with_other_settings_is_an_error(tmp_path):
    settings = {"fold": 0, "class_names": ["a", "b"]}
    training(tmp_path, False, 2, settings=settings)
    training(tmp_path, True, 3, settings=settings)
    training(tmp_path, True, 4, settings={**settings, "class_names": ("a", "b")})  # as a command line gives lists
    with pytest.raises(InputError, match="last.pt is a training with fold 0, not 1"):
        training(tmp_path, True, 5, settings={**settings, "fold": 1})


def test_resume_without_a_file_starts_and_of_a_finished_training_says_so(tmp_path):
    training(tmp_path, True, 2)
    with pytest.raises(InputError, match="already 2 epochs.*--max_epochs"):
        training(tmp_path, True, 2)
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "last.pt")
    with pytest.raises(InputError, match="weights alone"):
        training(tmp_path, True, 3)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    training(tmp_path, False, 1)
    before = (tmp_path / "last.pt").read_bytes()

    def broken_disk(path, content):
        path.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.write_bytes", broken_disk)
    with pytest.raises(OSError):
        training(tmp_path, True, 2)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert files(tmp_path) == ["last.pt"]


def test_best_model_is_saved_only_when_better(tmp_path):
    net, engine = torch.nn.Linear(2, 2), Evaluator()
    handler = BestModel(tmp_path / "model.pt", net)
    saved = []
    for epoch, metric in ((1, 0.5), (2, 0.4), (3, 0.6)):
        engine.state.epoch = epoch
        if metric > engine.state.best_metric:
            engine.state.best_metric, engine.state.best_metric_epoch = metric, epoch
        torch.nn.init.constant_(net.weight, epoch)
        handler(engine)
        saved.append(torch.load(tmp_path / "model.pt", weights_only=True)["weight"][0, 0].item())
    assert saved == [1, 1, 3]


@pytest.mark.parametrize("interval", [1, 2, 10])
def test_an_earlier_trainings_model_is_kept_and_its_own_is_not(tmp_path, interval):
    (tmp_path / "model.pt").write_bytes(b"shipped")
    net = torch.nn.Linear(2, 2)
    data = [{"image": torch.zeros(1, 2), "label": torch.zeros(1, 1)}]
    metric = MeanDice(output_transform=lambda output: ([torch.ones(1, 2)], [torch.ones(1, 2)]))
    evaluator = SupervisedEvaluator(
        "cpu", data, net, key_val_metric={"dice": metric}, val_handlers=[BestModel(tmp_path / "model.pt", net)]
    )
    for epoch in range(interval, 3 * interval + 1, interval):
        evaluator.run(epoch)
    (kept,) = tmp_path.glob("model.2*.pt")
    assert kept.read_bytes() == b"shipped"
    assert torch.load(tmp_path / "model.pt", weights_only=True).keys() == net.state_dict().keys()


def load(path, net):
    engine = Engine(lambda engine, batch: None)
    engine.state.device = torch.device("cpu")
    WeightsLoader(str(path), net).attach(engine)
    engine.run([0])


def test_weights_load_plain_or_under_model_and_fail_with_a_reason(tmp_path):
    source = torch.nn.Linear(3, 2)
    for content in (source.state_dict(), {"model": source.state_dict()}):
        torch.save(content, tmp_path / "w.pt")
        net = torch.nn.Linear(3, 2)
        load(tmp_path / "w.pt", net)
        assert torch.equal(net.weight, source.weight)
    with pytest.raises(InputError, match="w.pt is a checkpoint of another architecture: 0 .*, 0 .*, 2 of another.*--experts"):
        load(tmp_path / "w.pt", torch.nn.Linear(4, 5))
    with pytest.raises(InputError, match="2 entries missing, 2 unknown"):
        load(tmp_path / "w.pt", torch.nn.Sequential(torch.nn.Linear(3, 2)))
    bias = torch.nn.Linear(4, 2)
    before = bias.bias.clone()
    with pytest.raises(InputError, match="1 of another shape"):
        load(tmp_path / "w.pt", bias)
    assert torch.equal(bias.bias, before)  # all or none
    with pytest.raises(InputError, match="no checkpoint at .*nowhere"):
        load(tmp_path / "nowhere.pt", source)
    (tmp_path / "w.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:200])
    with pytest.raises(InputError, match="w.pt is truncated or damaged"):
        load(tmp_path / "w.pt", source)


def test_class_metrics_are_means_over_cases_that_have_the_class():
    engine = Engine(lambda engine, batch: None)
    engine.state.metrics = {}
    engine.state.metric_details = {"dice": torch.tensor([[0.5, 1.0], [float("nan"), 0.5]])}
    ClassMetrics("dice", ["a", "b"])(engine)
    assert engine.state.metrics == {"dice_a": 0.5, "dice_b": 0.75}


def one_hot(label):
    return torch.stack([(label == c).float() for c in range(3)])


def test_case_report_in_mm_by_hand(tmp_path):
    truth = torch.zeros(8, 8, 8)
    truth[2:6, 2:6, 2:6] = 1
    pred = torch.zeros(8, 8, 8)
    pred[2:6, 2:6, 3:7] = 1  # shifted by one voxel along the axis of 3 mm
    affine = torch.diag(torch.tensor([1.0, 1.0, 3.0, 1.0]))
    label = MetaTensor(one_hot(truth), affine=affine, meta={"filename_or_obj": "/data/case_7.nii.gz"})
    image = MetaTensor(truth[None], affine=affine, meta={"filename_or_obj": "/data/case_7_arterial.nii.gz"})
    output = {"image": image, "pred": MetaTensor(one_hot(pred), affine=affine), "label": label}
    engine = Engine(lambda engine, batch: [output])
    engine.register_events(*IterationEvents)
    CaseReport(tmp_path / "metrics.csv", ["one", "two"]).attach(engine)
    engine.run([0])
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["class"]) for r in rows] == [("case_7_arterial", "one"), ("case_7_arterial", "two")]
    assert float(rows[0]["dice"]) == pytest.approx(2 * 48 / 128)
    assert float(rows[0]["jaccard"]) == pytest.approx(48 / 80)
    assert float(rows[0]["hd95_mm"]) == pytest.approx(3.0)
    assert 0 < float(rows[0]["asd_mm"]) < 3
    assert float(rows[0]["paper_dice"]) == pytest.approx(2 * 48 / 128)
    assert float(rows[0]["paper_hd95"]) == 1  # voxels
    assert [rows[1][f] for f in CaseReport.FIGURES] == [""] * 4  # nothing there, nothing found: no figure
    assert [float(rows[1][f]) for f in CaseReport.PAPER_FIGURES] == [0] * 4  # the paper's rule


@pytest.mark.parametrize("missing", ["pred", "label"])
def test_a_class_missed_or_made_up_is_a_dice_of_zero_without_a_distance(tmp_path, missing, caplog):
    label = torch.zeros(8, 8, 8)
    label[2:6, 2:6, 2:6] = 1
    full = {k: MetaTensor(one_hot(label)) for k in ("pred", "label")}
    outputs = iter([full, {**full, missing: MetaTensor(one_hot(torch.zeros(8, 8, 8)))}])
    engine = Engine(lambda engine, batch: [next(outputs)])
    engine.register_events(*IterationEvents)
    CaseReport(tmp_path / "metrics.csv", ["one", "two"]).attach(engine)
    with caplog.at_level("INFO"):
        engine.run([0, 0])
    with open(tmp_path / "metrics.csv") as file:
        row = list(csv.DictReader(file))[2]
    assert float(row["dice"]) == float(row["jaccard"]) == 0
    assert row["hd95_mm"] == row["asd_mm"] == ""
    assert [float(row[f]) for f in CaseReport.PAPER_FIGURES] == ([0, 0, 0, 0] if missing == "pred" else [1, 1, 0, 0])
    assert "one: dice 0.5000, jaccard 0.5000, hd95_mm 0.0000 (1 of 2)" in caplog.text
    assert f"paper_dice {0.5 if missing == 'pred' else 1:.4f}" in caplog.text


def test_figures_of_the_cases_done_survive_a_crash(tmp_path):
    label = MetaTensor(one_hot(torch.ones(8, 8, 8)))

    def step(engine, batch):
        if batch:
            raise RuntimeError("disk on fire")
        return [{"pred": label, "label": label}]

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    CaseReport(tmp_path / "metrics.csv", ["one", "two"]).attach(engine)
    with pytest.raises(RuntimeError):
        engine.run([0, 1])
    with open(tmp_path / "metrics.csv") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_weights_that_match_a_part_are_loaded_when_asked_for(tmp_path):
    source, net = torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.save({"0.weight": source.weight.data, "other": torch.zeros(1)}, tmp_path / "part.pt")
    engine = Engine(lambda engine, batch: None)
    WeightsLoader(str(tmp_path / "part.pt"), net, matching=True).attach(engine)
    engine.run([0])
    assert torch.equal(net[0].weight, source.weight) and not torch.equal(net[0].bias, source.bias)


def evaluator(network, inferer, scan, *val_handlers):
    """Of one scan that was stored on a grid twice as fine along its first axis, its label on that grid."""
    shape = (2 * scan[0], *scan[1:])
    meta = {"original_affine": torch.eye(4), "spatial_shape": shape, "filename_or_obj": "/scans/scan_3.nii.gz"}
    affine = torch.diag(torch.tensor([2.0, 1, 1, 1]))
    affine[0, 3] = 0.5
    image = MetaTensor(torch.rand(1, *scan), affine=affine, meta=meta)
    truth = torch.zeros(1, *shape)
    truth[:, 4:20, 3:12, 2:9] = 1
    label = MetaTensor(truth, affine=torch.eye(4))
    postprocessing = [
        Activationsd("pred", softmax=True),
        ToScanGridd("pred"),
        AsDiscreted(["pred"], argmax=True),
        AsDiscreted(["pred", "label"], to_onehot=3),
    ]
    return SupervisedEvaluator(
        "cpu",
        torch.utils.data.DataLoader([{"image": image, "label": label}], collate_fn=list_data_collate),
        network,
        inferer=inferer,
        postprocessing=Compose(postprocessing),
        val_handlers=list(val_handlers),
    )


@pytest.mark.parametrize("renderer", ["none", "anatomical"])
@pytest.mark.parametrize("dims, scale", [(3, 1), (3, 2), (2, 1)])
def test_pictures_show_coarse_and_rendered_maps_on_the_scans_grid(dims, scale, renderer, tmp_path, monkeypatch):
    scan, drawn = (16, 24, 12), []
    monkeypatch.setattr(evaluation, "boundary_picture", lambda *args: drawn.append(args) or boundary_picture(*args))
    network = Morse(TINY["DynUNet"](dims, 3), "none", renderer, **{**SMALL, "points": {"num_eval": 10}})
    if dims == 2:
        inferer = SliceInferer(roi_size=(16, 24), spatial_dim=2, sw_batch_size=4)
    else:
        windows = CoordinatesInferer(SlidingWindowInferer((16, 16, 16), overlap=0.25), "volume")
        inferer = AutocastInferer(FineGridInferer(windows, scale), enabled=False)
    engine = evaluator(network, inferer, scan, CasePictures(tmp_path, slices=2))
    engine.run()
    (path, image, truth, maps, points, title, slices, spacing), whole = drawn[0], (32, 24, 12)
    assert path.name == "scan_3.png" and path.read_bytes()[:4] == b"\x89PNG" and title == "scan_3"
    assert image.shape == truth.shape == points.shape == whole and list(maps) == ["coarse", "refined"]
    assert (truth == 1).sum() == 16 * 9 * 7 and slices == 2 and spacing == [1, 1, 1]
    assert all(m.shape == whole for m in maps.values())
    assert points.any() == (renderer != "none")
    changed = maps["coarse"] != maps["refined"]
    if renderer == "none":
        assert not changed.any()
    elif scale == 1:
        # changed where voxels were re-rendered; resampling smears a voxel over its neighbours along the first axis
        near = points | np.roll(points, 1, 0) | np.roll(points, -1, 0) | np.roll(points, 2, 0) | np.roll(points, -2, 0)
        assert not (changed & ~near).any()


@pytest.mark.parametrize("renderer", ["none", "anatomical"])
def test_errors_are_counted_by_their_distance_to_the_boundary(renderer, tmp_path):
    kept = []
    network = Morse(TINY["DynUNet"](3, 3), "none", renderer, **{**SMALL, "points": {"num_eval": 400}})
    windows = CoordinatesInferer(SlidingWindowInferer((16, 16, 16), overlap=0.25), "window")
    engine = evaluator(network, windows, (16, 24, 12), BoundaryErrors(tmp_path / "b.csv", (0, 2, 3, 5, 100)))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: kept.extend(engine.state.output))
    engine.run()
    with open(tmp_path / "b.csv") as file:
        rows = list(csv.DictReader(file))
    truth = kept[0]["label"].argmax(0).numpy()
    rendered = kept[0]["pred"].argmax(0).numpy()
    to_scan = ToScanGridd(["image", "coarse"])({k: kept[0][k] for k in ("image", "coarse")})["coarse"].argmax(0).numpy()
    voxels = np.array(list(np.ndindex(truth.shape)))
    spacing = np.array(kept[0]["label"].pixdim.tolist())
    values = truth[tuple(voxels.T)]
    expected = {}
    for v in range(0, len(voxels), 7):  # a slow look at every seventh voxel
        other = voxels[values != values[v]]
        expected[tuple(voxels[v])] = np.sqrt((((other - voxels[v]) * spacing) ** 2).sum(1)).min()
    distance = boundary_distance(truth, spacing)
    for voxel, d in expected.items():
        assert distance[voxel] == pytest.approx(d)
    assert [(r["from_mm"], r["to_mm"]) for r in rows] == [("0", "2"), ("2", "3"), ("3", "5"), ("5", "100")]
    for row in rows:
        inside = (distance > float(row["from_mm"])) & (distance <= float(row["to_mm"]))
        assert row["case"] == "scan_3" and int(row["voxels"]) == inside.sum()
        assert int(row["rendered_wrong"]) == (inside & (rendered != truth)).sum()
        assert int(row["coarse_wrong"]) == (inside & (to_scan != truth)).sum()
    assert sum(int(r["voxels"]) for r in rows) == truth.size
    changed = sum(int(r["rendered_wrong"]) != int(r["coarse_wrong"]) for r in rows)
    assert (changed == 0) == (renderer == "none")


def test_without_a_boundary_no_voxel_is_near_one():
    assert np.isinf(boundary_distance(np.ones((3, 4)))).all()


def test_pictures_of_another_network_are_an_error(tmp_path):
    engine = evaluator(torch.nn.Conv3d(1, 3, 1), SlidingWindowInferer((16, 16, 16)), (16, 24, 12), CasePictures(tmp_path))
    with pytest.raises(InputError, match="CasePictures needs a Morse network, this is a Conv3d"):
        engine.run()


def test_slices_are_spread_over_the_structures(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shown = []
    original = Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda self, x, *a, **k: shown.append(x) or original(self, x, *a, **k))
    image = np.broadcast_to(np.arange(20.0), (8, 9, 20)) + np.zeros((8, 9, 20))
    truth = np.zeros((8, 9, 20), int)
    truth[2:4, 2:4, 5:15] = 1
    truth[2:6, 2:6, [6, 12]] = 1  # the largest of each half
    for slices, expected in ((1, [6]), (2, [6, 12])):
        shown.clear()
        boundary_picture(tmp_path / "p.png", image, truth, {"a": truth}, truth > 0, slices=slices, spacing=(1, 2, 5))
        assert [int(x[0, 0]) for x in shown[::3]] == expected
    boundary_picture(tmp_path / "empty.png", image, 0 * truth, {"a": truth}, truth > 0)
    assert (tmp_path / "empty.png").is_file()
