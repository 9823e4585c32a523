"""Train the demo checkpoint, on text prompts and exemplar tasks: `python -m training.train --help`.

One process, one device. Scenes are drawn on the device; batch n of a run depends only on the run's seed and
on n. The learning rate follows the elapsed time (`--minutes`) or the number of steps (`--steps`), and ends at
zero in both cases. The same command resumes an interrupted run from its folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from sam3_runner.network.model import SAM3Network
from sam3_runner.weights.load import to_network
from training.architecture import demo_config
from training.batches import BatchMaker
from training.learner import compile_layers, losses, match, predict
from training.score import score_weights
from training.weights import save_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from training.batches import Batch

_EMA_DECAY = 0.999
_LOG_STEPS = 100
_EMBEDDING_STD = 0.02
"""transformers' initializer_range."""
VALIDATION_SEED = 700_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Configuration of a training run."""

    folder: Path = Path("training/runs/demo")
    init_from: Path | None = None
    minutes: float = 9.4
    steps: int | None = None
    scenes: int = 64
    rate: float = 6e-4
    weight_decay: float = 0.03
    warm_up: float = 0.03
    decay_from: float = 0.4
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compiled: bool = True
    validate_every_s: float = 100.0
    validate_scenes: int = 512
    save_every_s: float = 60.0


class Trainer:
    """The model, its averaged weights, the optimiser and the position in the schedule."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        torch.manual_seed(plan.seed)
        torch.set_float32_matmul_precision("high")
        self.model = initial_model()
        if plan.init_from is not None:
            self.model.load_state_dict(to_network(load_file(plan.init_from / "model.safetensors")))
        self.model.to(plan.device)
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(requires_grad=False)
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, plan.weight_decay),
            lr=torch.tensor(plan.rate, device=plan.device),
            betas=(0.9, 0.98),
            fused=True,
            capturable=plan.device == "cuda",
        )
        self._batches = BatchMaker(
            scenes=plan.scenes, seed=plan.seed, device=plan.device, compiled=plan.compiled
        )
        if plan.compiled:
            compile_layers(self.model)
        self._graph: _UpdateGraph | None = None
        self.step = 0
        self.seconds = 0.0
        self.preparation_s = 0.0

    @property
    def progress(self) -> float:
        """0 at the start of the schedule, 1 at its end."""
        if self.plan.steps is not None:
            return self.step / self.plan.steps
        return self.seconds / (60.0 * self.plan.minutes - self.preparation_s)

    def train_step(self) -> dict[str, torch.Tensor]:
        """One update; returns the losses and the gradient's norm, still on the device."""
        batch = self._batches.make(self.step)
        if self.plan.device == "cuda" and self._graph is None:
            self._set_rate(0.0)
            self._graph = _UpdateGraph(self._update, batch)
        self._set_rate(self.plan.rate * self._rate_factor())
        terms = self._update(batch) if self._graph is None else self._graph.replay(batch)
        self.step += 1
        self._average()
        return terms

    def _update(self, batch: Batch) -> dict[str, torch.Tensor]:
        self._optimizer.zero_grad(set_to_none=True)
        predictions = predict(self.model, batch)
        assigned = match(predictions, batch)
        terms = losses(self.model, predictions, batch, assigned)
        torch.autograd.backward(torch.stack(list(terms.values())).sum())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return {name: term.detach() for name, term in terms.items()} | {"gradient": norm}

    def _set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"].fill_(rate)

    def save(self) -> None:
        """Write the complete state, to resume from, and the averaged weights."""
        self.plan.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        unfinished = self.plan.folder / "state.unfinished"
        torch.save(state, unfinished)
        unfinished.replace(self.plan.folder / "state.pt")
        save_weights(self.averaged, self.plan.folder / "checkpoint")

    def resume(self) -> bool:
        """Load the folder's state, if there is one; returns whether there was."""
        path = self.plan.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.plan.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        settings = [dict(group) for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update({name: own[name] for name in ("lr", "fused", "capturable")})
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def _rate_factor(self) -> float:
        """Linear warm-up, constant, then a cosine down to zero."""
        plan, progress = self.plan, min(self.progress, 1.0)
        if progress < plan.warm_up:
            return max(progress / plan.warm_up, 1e-3)
        if progress < plan.decay_from:
            return 1.0
        return 0.5 + 0.5 * math.cos(math.pi * (progress - plan.decay_from) / (1.0 - plan.decay_from))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(_EMA_DECAY, self.step / (self.step + 10.0))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), 1.0 - decay)


class _UpdateGraph:
    """One update as a CUDA graph: launching its thousands of kernels takes longer than running them."""

    def __init__(self, update: Callable[[Batch], dict[str, torch.Tensor]], batch: Batch) -> None:
        self._batch = replace(
            batch, **{each.name: getattr(batch, each.name).clone() for each in fields(batch)}
        )
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compile and select kernels, which is not possible during a capture
                update(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._terms = update(self._batch)

    def replay(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Update with another batch."""
        for each in fields(batch):
            getattr(self._batch, each.name).copy_(getattr(batch, each.name))
        self._graph.replay()
        return self._terms


def initial_model() -> SAM3Network:
    """A model whose activations keep their scale, and whose queries start at different reference points."""
    model = SAM3Network(demo_config())
    nn.init.normal_(model.vision_encoder.backbone.embeddings.position_embeddings, std=_EMBEDDING_STD)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=_EMBEDDING_STD)
        elif isinstance(getattr(module, "bias", None), torch.Tensor):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=module.in_channels**-0.5)
    decoder: Any = model.detr_decoder
    nn.init.normal_(decoder.query_embed.weight, std=1.0)
    nn.init.zeros_(decoder.box_head.layer3.weight)
    columns, rows = torch.meshgrid(torch.arange(6), torch.arange(4), indexing="ij")
    count = decoder.reference_points.num_embeddings
    points = torch.stack([(columns.flatten() + 0.5) / 6, (rows.flatten() + 0.5) / 4], dim=1)
    points = points.repeat(-(-count // len(points)), 1)[:count]
    decoder.reference_points.weight.data = torch.cat([points, torch.full((count, 2), 0.2)], dim=1).logit()
    model.mask_decoder.instance_projection.weight.data *= 0.1
    return model


def train(plan: Plan) -> Path:
    """Run or resume the training; returns the folder of the averaged weights."""
    started_s = time.monotonic()
    trainer = Trainer(plan)
    resumed = trainer.resume()
    plan.folder.mkdir(parents=True, exist_ok=True)
    log = (plan.folder / "log.jsonl").open("a", encoding="utf-8")
    log.write(json.dumps({"resumed": resumed, "step": trainer.step, **asdict(plan)}, default=str) + "\n")
    trainer.train_step()  # compiles; the schedule uses the remaining time
    saved_s = validated_s = time.monotonic()
    trainer.preparation_s = saved_s - started_s
    schedule_start_s = saved_s - trainer.seconds
    with tqdm(total=1.0, initial=min(trainer.progress, 1.0), mininterval=5.0, disable=None) as bar, log:
        while trainer.progress < 1.0:
            terms = trainer.train_step()
            now_s = time.monotonic()
            trainer.seconds = now_s - schedule_start_s
            if trainer.step % _LOG_STEPS == 0:
                values = {name: round(float(term), 4) for name, term in terms.items()}
                _write(log, step=trainer.step, seconds=round(trainer.seconds, 1), **values)
                bar.update(min(trainer.progress, 1.0) - bar.n)
            if now_s - validated_s > plan.validate_every_s:
                validated_s = now_s
                _write(log, step=trainer.step, validation=_validate(trainer))
            if now_s - saved_s > plan.save_every_s:
                saved_s = now_s
                trainer.save()
        trainer.save()
        _write(
            log,
            step=trainer.step,
            finished=True,
            preparation_s=round(trainer.preparation_s, 1),
            validation=_validate(trainer),
        )
    return plan.folder / "checkpoint"


def _validate(trainer: Trainer) -> dict[str, dict[str, float | int]]:
    plan = trainer.plan
    tallies = score_weights(
        trainer.averaged, scenes=plan.validate_scenes, seed=VALIDATION_SEED, device=plan.device
    )
    return {kind: tally.figures() for kind, tally in tallies.items()}


def _write(log: Any, **entry: Any) -> None:
    log.write(json.dumps(entry) + "\n")
    log.flush()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay applies to matrices; not to biases, norms and embeddings."""
    decayed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    }
    parameters = list(model.parameters())
    return [
        {"params": [each for each in parameters if id(each) in decayed], "weight_decay": weight_decay},
        {"params": [each for each in parameters if id(each) not in decayed], "weight_decay": 0.0},
    ]


def _parse() -> tuple[Plan, Path | None]:
    default = Plan()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=default.folder, help="state, log and weights of the run"
    )
    parser.add_argument("--init-from", type=Path, help="start from the weights of this transformers folder")
    parser.add_argument("--minutes", type=float, default=default.minutes, help="length by elapsed time")
    parser.add_argument("--steps", type=int, help="number of steps instead: reproducible on one device")
    parser.add_argument("--scenes", type=int, default=default.scenes, help="scenes a step, 6 tasks each")
    parser.add_argument("--rate", type=float, default=default.rate, help="highest learning rate")
    parser.add_argument("--warm-up", type=float, default=default.warm_up, help="share of the run")
    parser.add_argument("--decay-from", type=float, default=default.decay_from, help="share of the run")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--validate-every-s", type=float, default=default.validate_every_s)
    parser.add_argument("--install", type=Path, help="copy the final weights to this folder")
    arguments = vars(parser.parse_args())
    install = arguments.pop("install")
    return Plan(**arguments), install


def main() -> None:
    """Train, and copy the weights to the folder of `--install`."""
    plan, install = _parse()
    checkpoint = train(plan)
    if install is not None:
        for name in ("config.json", "model.safetensors"):
            shutil.copy(checkpoint / name, install / name)


if __name__ == "__main__":
    main()
