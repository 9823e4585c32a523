"""A training run: its forward pass, its matching and losses, and how it is resumed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sam3_runner.network.model import SAM3Network
from training import train as train_module
from training.architecture import demo_config
from training.batches import BatchMaker
from training.exemplars import TASKS_PER_SCENE
from training.learner import assign, generalised_iou, predict
from training.train import Plan, Trainer, train
from training.weights import load_weights

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = demo_config()
    backbone = config.vision_config.backbone_config
    backbone.hidden_size, backbone.intermediate_size, backbone.num_attention_heads = 48, 48, 2
    backbone.num_hidden_layers, backbone.global_attn_indexes = 2, [1]
    config.vision_config.fpn_hidden_size = 32
    for part in ("detr_encoder", "detr_decoder", "geometry_encoder", "mask_decoder"):
        getattr(config, f"{part}_config").hidden_size = 32
    monkeypatch.setattr(train_module, "demo_config", lambda: config)


def _plan(folder: Path, **changes: Any) -> Plan:
    settings: dict[str, Any] = {"steps": 24, "scenes": 1, "device": "cpu", "compiled": False, "rate": 2e-3}
    return Plan(folder=folder, validate_scenes=0, **(settings | changes))


def test_training_uses_the_forward_pass_of_serving() -> None:
    """Text tasks as served, and no influence of padded boxes on them."""
    torch.manual_seed(0)
    network = SAM3Network(demo_config())
    batch = BatchMaker(scenes=2, seed=1, device="cpu", compiled=False).make(0)
    text_task = ~batch.exemplars_valid.any(dim=1)
    scene = torch.arange(len(batch.ids)) // TASKS_PER_SCENE
    padding = 32 - batch.ids.shape[1]
    ids = torch.nn.functional.pad(batch.ids, (0, padding), value=49407)
    with torch.no_grad():
        image = network.encode_image(batch.pixels)
        text = network.encode_text(ids, torch.nn.functional.pad(batch.ids_valid, (0, padding)))
        served = network.decode(image.attended[scene], image.geometry_token[scene], text.tokens, text.valid)
        predictions = predict(network, batch)

    assert int(text_task.sum()) >= 8
    assert not text_task.all()
    scores, boxes = predictions.logits[-1].sigmoid(), predictions.boxes[-1]
    assert torch.allclose(scores[text_task], served.scores[text_task], atol=1e-5)
    assert not torch.allclose(scores[~text_task], served.scores[~text_task], atol=1e-5)
    assert torch.allclose(boxes[text_task], served.boxes[text_task], atol=1e-5)
    assert torch.allclose(predictions.queries[text_task], served.queries[-1][text_task], atol=1e-4)


def test_auction_is_close_to_the_optimal_assignment() -> None:
    generator = torch.Generator().manual_seed(5)
    cost = 4.0 * torch.rand(64, 7, 24, generator=generator)
    matching = torch.rand(64, 7, generator=generator) < 0.5
    assigned = assign(cost, matching)

    assert torch.equal(assigned >= 0, matching)
    for row in range(64):
        rows = matching[row].nonzero().flatten()
        queries = assigned[row][rows]
        costs = cost[row][rows].numpy()
        optimum = costs[linear_sum_assignment(costs)].sum()
        assert len(set(queries.tolist())) == len(rows)
        assert float(cost[row][rows, queries].sum()) <= optimum + 7 * 0.02 + 1e-4


def test_generalised_iou() -> None:
    box = torch.tensor([0.0, 0.0, 0.5, 0.5])

    assert float(generalised_iou(box, box)) == pytest.approx(1.0)
    assert float(generalised_iou(box, box + 0.5)) == pytest.approx(-0.5)


@pytest.mark.usefixtures("_tiny")
def test_a_tiny_model_overfits_one_scene(tmp_path: Path) -> None:
    trainer = Trainer(_plan(tmp_path, steps=24))
    batch = BatchMaker(scenes=1, seed=9, device="cpu", compiled=False).make(0)
    trainer._batches = SimpleNamespace(make=lambda _step: batch)  # type: ignore[assignment]
    totals = []
    for _ in range(24):
        terms = trainer.train_step()
        totals.append(sum(float(term) for name, term in terms.items() if name != "gradient"))

    assert totals[-1] < 0.6 * totals[0]


@pytest.mark.usefixtures("_tiny")
def test_a_resumed_run_continues_from_its_last_step(tmp_path: Path) -> None:
    uninterrupted = Trainer(_plan(tmp_path))
    uninterrupted.train_step()
    uninterrupted.train_step()
    uninterrupted.save()
    expected = uninterrupted.train_step()
    resumed = Trainer(_plan(tmp_path))

    assert resumed.resume()
    assert resumed.step == 2
    assert {name: float(term) for name, term in resumed.train_step().items()} == pytest.approx(
        {name: float(term) for name, term in expected.items()}
    )


@pytest.mark.usefixtures("_tiny")
def test_a_run_saves_weights_that_can_be_loaded(tmp_path: Path) -> None:
    folder = train(_plan(tmp_path / "first", steps=3))
    model = load_weights(folder)
    again = Trainer(_plan(tmp_path / "second", init_from=folder))

    assert (folder / "config.json").exists()
    assert not model.training
    assert torch.equal(
        again.model.detr_decoder.query_embed.weight.detach(), model.detr_decoder.query_embed.weight.detach()
    )
