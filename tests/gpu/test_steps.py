"""On a GPU: each step's kernel, and the whole network with kernels, against the definitions in PyTorch.

    python -m pytest -c /dev/null --rootdir . --noconftest tests/gpu

The shapes are those of SAM 3 and of the demo checkpoint. Both results are compared with the definition in
float32 over the same inputs: a kernel may differ from it by half precision's rounding.
"""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Sam3Config

from sam3_runner.images.square import to_square
from sam3_runner.inference.passes import Passes
from sam3_runner.network import operations
from sam3_runner.network.masks import mask_logits
from sam3_runner.network.model import SAM3Network
from sam3_runner.network.positions import cells, rotary_angles, sine_periods
from sam3_runner.network.precision import set_precision
from sam3_runner.prompts import PromptTokenizer
from sam3_runner.weights.checkpoint import find_checkpoint
from sam3_runner.weights.load import load_network

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU that torch can use")

Inputs = tuple[Any, ...]
"""Tensors, modules and numbers: the arguments of a step."""
SAMPLE = Path(__file__).parents[2] / "examples" / "sample.jpg"
HALVES = (torch.float16, torch.bfloat16)
MAX_PEAK_ERROR = 8.0
"""Largest error of a value, in units of the dtype's epsilon times the largest value."""
MAX_FLOAT32_ERROR = 2e-5
"""Of boxes, which are float32 in the kernel too."""
KERNEL_OF = {
    **dict.fromkeys(("gelu", "rotary"), "product"),
    "attention": "attend",
    "grid_attention": "attend_grid",
    "boxes": "refined_boxes",
    "group_norm": "group_norm_relu",
    **{name: name for name in ("patches", "norm", "box_bias")},
}
"""The function of `kernels` that a step calls. `relu` and `residual` call PyTorch's own."""


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a checkpoint.

    Attributes:
        grid: cells on a side of the image.
        window: cells on a side of a window.
        width: of the vision encoder, with `heads` heads and `hidden` hidden channels.
        fused: D, of everything after it, with `fused_heads` heads and `fused_hidden` hidden channels.
        queries: Q.
    """

    grid: int
    window: int
    width: int
    heads: int
    hidden: int
    fused: int
    fused_heads: int
    fused_hidden: int
    queries: int


SAM3 = Model(72, 24, 1024, 16, 4736, 256, 8, 2048, 200)
DEMO = Model(24, 12, 192, 4, 384, 64, 4, 256, 24)
IMAGES, PAIRS, PROMPT_TOKENS = 2, 3, 33
PATCH_PX = 14
WAVES_OF_ROTATION = 10_000.0


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a step.

    Attributes:
        step: of `operations.STEPS`.
        name: of the call.
        call: the function of `operations`.
        inputs: by the precision of the products. Drawn on the GPU.
        has_kernel: the kernel takes these shapes; otherwise the definition must run.
    """

    step: str
    name: str
    call: Callable[..., Any]
    inputs: Callable[[torch.dtype], Inputs]
    has_kernel: bool = True


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def product(inner: int, outer: int, dtype: torch.dtype) -> nn.Linear:
    """A product that keeps the scale of its input."""
    layer = nn.Linear(inner, outer, device="cuda")
    nn.init.normal_(layer.weight, std=inner**-0.5)
    nn.init.normal_(layer.bias, std=0.1)
    return layer.to(dtype)


def layer_norm(width: int) -> nn.LayerNorm:
    """A norm with its weights, which are float32 in every precision."""
    layer = nn.LayerNorm(width, eps=1e-6, device="cuda")
    nn.init.normal_(layer.weight, mean=1.0, std=0.1)
    nn.init.normal_(layer.bias, std=0.1)
    return layer


def heads_of(shape: tuple[int, int, int], heads: int, parts: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """`parts` views (B, heads, N, d) of one tensor, as a product gives them; `shape` is (B, N, heads * d)."""
    *rows, width = shape
    return operations.split_heads(normal(*rows, parts * width, dtype=dtype), parts, heads)


def boxes_of(model: Model) -> Tensor:
    """(P, Q, 4), cx cy w h in 0..1."""
    return torch.rand(PAIRS, model.queries, 4, device="cuda")


def valid_tokens() -> Tensor:
    """(P, L) bool: texts of 4, 11 and 18 tokens, and the geometry token, which is the last one."""
    valid = (
        torch.arange(PROMPT_TOKENS, device="cuda") < torch.arange(4, 4 + 7 * PAIRS, 7, device="cuda")[:, None]
    )
    valid[:, -1] = True
    return valid


def bias_layers(model: Model, dtype: torch.dtype) -> list[nn.Linear]:
    return [product(2, model.fused, dtype), product(model.fused, model.fused_heads, dtype)]


def vision_cases(model: Model) -> Iterator[Case]:
    """The steps of the vision encoder. The demo's width and head width are no powers of two."""
    large = model is SAM3
    tokens, in_window = model.grid**2, model.window**2
    windows, width, heads = tokens // in_window, model.width, model.heads
    side_px = PATCH_PX * model.grid

    def pixels(dtype: torch.dtype) -> Inputs:
        drawn = torch.randint(0, 256, (IMAGES, side_px, side_px, 3), dtype=torch.uint8, device="cuda")
        return drawn.permute(0, 3, 1, 2), model.grid, model.window, dtype

    def hidden(dtype: torch.dtype) -> Inputs:
        layer = product(width, model.hidden, dtype)
        return normal(IMAGES * windows, in_window, width, dtype=dtype), layer.weight, layer.bias

    def rotated(side: int, step: float) -> Callable[[torch.dtype], Inputs]:
        def inputs(dtype: torch.dtype) -> Inputs:
            angles = rotary_angles(side, width // heads, WAVES_OF_ROTATION, step).to("cuda")
            x = normal(IMAGES * tokens // side**2, side**2, width, dtype=dtype)
            return x, product(width, 3 * width, dtype), heads, angles.cos(), angles.sin()

        return inputs

    def residual(dtype: torch.dtype) -> Inputs:
        y = normal(IMAGES, tokens, model.hidden, dtype=dtype)
        return normal(IMAGES, tokens, width, dtype=dtype), y, product(model.hidden, width, dtype).weight

    def with_positions(dtype: torch.dtype) -> Inputs:
        x, position = normal(IMAGES, tokens, width, dtype=dtype), normal(1, tokens, width, dtype=dtype)
        return x, layer_norm(width), {"add": position}

    def with_shift(dtype: torch.dtype) -> Inputs:
        return normal(IMAGES, tokens, width, dtype=dtype), layer_norm(width), {"shift": normal(width)}

    def attended(rows: int, count: int) -> Callable[[torch.dtype], Inputs]:
        return lambda dtype: heads_of((rows, count, width), heads, 3, dtype)

    yield Case("patches", "patches", operations.patches, pixels)
    yield Case("gelu", "hidden", operations.linear_gelu, hidden)
    yield Case("rotary", "window", operations.rotated_qkv, rotated(model.window, 1.0), large)
    step = model.window / model.grid
    yield Case("rotary", "global", operations.rotated_qkv, rotated(model.grid, step), large)
    yield Case("residual", "feed-forward", operations.add_product, residual)
    yield Case("norm", "positions", operations.norm, with_positions, large)
    yield Case("norm", "shift", operations.norm, with_shift, large)
    yield Case("attention", "window", operations.attend, attended(IMAGES * windows, in_window), large)
    yield Case("attention", "global", operations.attend, attended(IMAGES, tokens), large)


def fusion_cases(model: Model) -> Iterator[Case]:
    """The steps of tokens and queries: products, norms, and attention among them and to the prompt."""
    tokens, width, heads, queries = model.grid**2, model.fused, model.fused_heads, model.queries

    def hidden(count: int) -> Callable[[torch.dtype], Inputs]:
        def inputs(dtype: torch.dtype) -> Inputs:
            layer = product(width, model.fused_hidden, dtype)
            return normal(PAIRS, count, width, dtype=dtype), layer.weight, layer.bias

        return inputs

    def sum_and_position(dtype: torch.dtype) -> Inputs:
        x, add = (normal(PAIRS, tokens, width, dtype=dtype) for _ in range(2))
        return x, layer_norm(width), {"add": add, "position": normal(1, tokens, width)}

    def to_float32(dtype: torch.dtype) -> Inputs:
        x = normal(PAIRS, 1 + queries, width, dtype=dtype)
        return x, layer_norm(width), {"dtype": torch.float32}

    def among(count: int) -> Callable[[torch.dtype], Inputs]:
        return lambda dtype: heads_of((PAIRS, count, width), heads, 3, dtype)

    def to_prompt(count: int) -> Callable[[torch.dtype], Inputs]:
        def inputs(dtype: torch.dtype) -> Inputs:
            (query,) = heads_of((PAIRS, count, width), heads, 1, dtype)
            return query, *heads_of((PAIRS, PROMPT_TOKENS, width), heads, 2, dtype), valid_tokens()

        return inputs

    yield Case("relu", "image tokens", operations.linear_relu, hidden(tokens))
    yield Case("relu", "queries", operations.linear_relu, hidden(1 + queries))
    yield Case("norm", "sum and position", operations.norm, sum_and_position)
    yield Case("norm", "float32", operations.norm, to_float32)
    yield Case("attention", "image tokens", operations.attend, among(tokens))
    yield Case("attention", "queries", operations.attend, among(1 + queries))
    yield Case("attention", "tokens to prompt", operations.attend, to_prompt(tokens))
    yield Case("attention", "queries to prompt", operations.attend, to_prompt(1 + queries))
    yield Case("attention", "one token", operations.attend, among(1), has_kernel=False)


def box_cases(model: Model) -> Iterator[Case]:
    """The steps of the decoder's boxes, and the attention to the image with their bias."""
    tokens, width, heads, queries = model.grid**2, model.fused, model.fused_heads, model.queries

    def to_grid(pairs: int) -> Callable[[torch.dtype], Inputs]:
        def inputs(dtype: torch.dtype) -> Inputs:
            (query,) = heads_of((pairs, 1 + queries, width), heads, 1, dtype)
            key, value = heads_of((pairs, tokens, width), heads, 2, dtype)
            along_y, along_x = (normal(pairs, heads, queries, model.grid) for _ in range(2))
            return query, key, value, along_y, along_x

        return inputs

    def bias(dtype: torch.dtype) -> Inputs:
        layers, line = [bias_layers(model, dtype) for _ in range(2)], cells(model.grid).to("cuda")
        return boxes_of(model), *layers, line, normal(1, dtype=dtype)

    def refined(dtype: torch.dtype) -> Inputs:
        periods = sine_periods(width // 2).to("cuda")
        return normal(PAIRS, 1 + queries, 4), boxes_of(model), normal(1, dtype=dtype), periods

    for pairs in (1, PAIRS, 8):
        yield Case("grid_attention", f"{pairs} pairs", operations.attend_grid, to_grid(pairs))
    yield Case("box_bias", "boxes", operations.box_bias, bias)
    yield Case("boxes", "refined", operations.refined_boxes, refined)
    yield Case("boxes", "first layer", operations.refined_boxes, lambda dtype: (None, *refined(dtype)[1:]))


def mask_cases(model: Model) -> Iterator[Case]:
    """The steps of the mask head."""

    def map_of(side: int, dtype: torch.dtype) -> Tensor:
        drawn = normal(PAIRS, model.fused, side, side, dtype=dtype)
        return drawn.to(memory_format=torch.channels_last)

    def group_norm(scale: int, *, doubled: bool) -> Callable[[torch.dtype], Inputs]:
        def inputs(dtype: torch.dtype) -> Inputs:
            layer = nn.GroupNorm(8, model.fused, device="cuda")
            nn.init.normal_(layer.weight, mean=1.0, std=0.1)
            nn.init.normal_(layer.bias, std=0.1)
            conv = nn.Conv2d(model.fused, model.fused, 3, padding=1, device="cuda", dtype=dtype)
            conv = conv.requires_grad_(requires_grad=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            side = scale * model.grid
            finer = map_of(2 * side, dtype) if doubled else None
            return map_of(side, dtype), conv, layer.to(dtype), finer

        return inputs

    yield Case("group_norm", "doubled", operations.convolve_and_norm, group_norm(2, doubled=True))
    yield Case("group_norm", "last", operations.convolve_and_norm, group_norm(4, doubled=False))


CASES = [
    pytest.param(case, id=f"{name}-{case.step}-{case.name}".replace(" ", "-"))
    for name, model in (("sam3", SAM3), ("demo", DEMO))
    for cases in (vision_cases, fusion_cases, box_cases, mask_cases)
    for case in cases(model)
]


@pytest.fixture(autouse=True)
def _all_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel is on; products in float32, which are the reference, are not rounded to TF32."""
    monkeypatch.setattr(operations, "plain_steps", set())
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def test_every_step_has_a_case() -> None:
    """No kernel is left out."""
    assert {parameters.values[0].step for parameters in CASES} == operations.STEPS  # type: ignore[union-attr]


@pytest.mark.parametrize("step", ["group_norm", "norm", "box_bias"])
def test_overflow_is_not_hidden(step: str) -> None:
    """A value that is not finite stays so in a step with a ReLU or a norm, or nothing would notice it."""
    case: Case = next(each.values[0] for each in CASES if each.values[0].step == step)  # type: ignore[union-attr, assignment]
    inputs = case.inputs(torch.float16)
    first = next(each for each in inputs if isinstance(each, Tensor))
    first[(0,) * first.ndim] = torch.nan
    assert not all(found.isfinite().all() for found in flat(run(case, inputs)))


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_kernel_computes_the_step(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs where it takes the shapes, and differs from the step by the rounding of the dtype."""
    inputs = case.inputs(dtype)
    exact = flat(run(case, widened(inputs)))
    operations.plain_steps.add(case.step)
    defined = flat(run(case, inputs))
    operations.plain_steps.clear()
    calls = counted_calls(case.step, monkeypatch)
    found = flat(run(case, inputs, calls))
    assert bool(calls[case.step]) == case.has_kernel
    assert len(found) == len(defined) == len(exact)
    for kernel, definition, reference in zip(found, defined, exact, strict=True):
        assert kernel.shape == definition.shape
        assert kernel.isfinite().all()
        check_close(kernel, definition, reference, dtype)


def check_close(kernel: Tensor, definition: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    """The kernel's error is one of rounding, in the mean and at most."""
    if definition.dtype == torch.float32 and (definition - reference).abs().max() < MAX_FLOAT32_ERROR / 10:
        # Boxes and other values that no product in half precision precedes.
        assert kernel.dtype == torch.float32
        assert (kernel - reference).abs().max() < MAX_FLOAT32_ERROR
        return
    epsilon = torch.finfo(dtype).eps
    error, allowed = (each.float() - reference for each in (kernel, definition))
    root_mean_square = reference.square().mean().sqrt()
    of_definition = allowed.square().mean().sqrt()
    assert error.square().mean().sqrt() <= max(of_definition * 1.5, epsilon * root_mean_square)
    assert error.abs().max() <= MAX_PEAK_ERROR * epsilon * reference.abs().max()


def run(case: Case, inputs: Inputs, calls: Counter[str] | None = None) -> Any:
    """The step; an input that a kernel overwrites is copied before."""
    *arguments, last = inputs
    keywords = last if isinstance(last, dict) else {}
    arguments = arguments if isinstance(last, dict) else [*arguments, last]
    if case.step != "residual":
        return case.call(*arguments, **keywords)
    x = arguments[0].clone()
    result = case.call(x, *arguments[1:])
    if calls is not None and result.data_ptr() == x.data_ptr():
        calls["residual"] += 1
    return result


def counted_calls(step: str, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of the step's kernel from now on."""
    calls: Counter[str] = Counter()
    if step == "residual":  # it overwrites its input, which `run` notices
        return calls
    owner: Any = torch.ops.aten
    name = "_addmm_activation"
    if step in KERNEL_OF:
        owner, name = importlib.import_module("sam3_runner.network.kernels"), KERNEL_OF[step]
    kernel = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[step] += 1
        return kernel(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def widened(value: Any) -> Any:
    """Inputs in float32, with which every step runs as its definition."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, nn.Linear | nn.GroupNorm | nn.Conv2d):
        return _copy_of(value)
    if isinstance(value, torch.dtype):
        return torch.float32
    if isinstance(value, dict):
        return {name: widened(each) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(widened(each) for each in value)
    return value


def _copy_of(layer: nn.Linear | nn.GroupNorm | nn.Conv2d) -> nn.Module:
    wide: nn.Module
    if isinstance(layer, nn.Conv2d):
        return copy.deepcopy(layer).float()
    if isinstance(layer, nn.Linear):
        wide = nn.Linear(layer.in_features, layer.out_features, device="cuda")
    else:
        wide = nn.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, device="cuda")
    wide.load_state_dict(layer.state_dict())
    return wide


def flat(result: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [result] if isinstance(result, Tensor) else [each for part in result for each in flat(part)]


# The whole network.

SCORE_ERROR = {torch.float16: 0.005, torch.bfloat16: 0.04}
"""Between the network with kernels and without."""
MIN_IOU = {torch.float16: 0.99, torch.bfloat16: 0.93}
"""Mean; random weights are less kind to rounding than trained ones."""
BEST = 5
"""Queries of each pair whose masks are compared."""
KNOWN_TO_DEMO = ["purple circle", "triangles", "red shape", "ring"]


@dataclass(frozen=True, slots=True)
class Question:
    """A network, a picture (1, S, S, 3) uint8, and P texts: ids (P, 32) int64, valid (P, 32) bool."""

    network: SAM3Network
    pixels: Tensor
    ids: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """Scores (P, Q), and mask logits (P, K, h, w) of `queries` (P, K)."""

    scores: Tensor
    queries: Tensor
    masks: Tensor


def demo() -> Question:
    """The demo checkpoint, the sample picture, and prompts that the demo knows."""
    checkpoint = find_checkpoint("demo")
    network, _ = load_network(checkpoint, torch.device("cuda"))
    square = to_square(Image.open(SAMPLE), network.input_side_px)
    tokens = PromptTokenizer(checkpoint.tokenizer_file).encode(KNOWN_TO_DEMO)
    pixels = torch.tensor(square.pixels)[None]
    return Question(network, pixels, torch.from_numpy(tokens.ids), torch.from_numpy(tokens.valid))


def random() -> Question:
    """SAM 3's sizes with random weights at scales that keep activations in range, and random inputs."""
    with torch.device("meta"):
        network = SAM3Network(Sam3Config())
    generator = torch.Generator("cuda").manual_seed(20261122)
    drawn = {}
    for name, each in network.state_dict().items():
        values = torch.randn(each.shape, device="cuda", generator=generator)
        if each.ndim > 1:
            drawn[name] = values / (each.numel() / len(each)) ** 0.5
        else:
            drawn[name] = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    network.load_state_dict(drawn, assign=True)
    network = network.to("cuda").eval().requires_grad_(requires_grad=False)
    coarse = torch.rand(1, 3, 24, 24, device="cuda", generator=generator)
    picture = nn.functional.interpolate(coarse, (network.input_side_px,) * 2, mode="bicubic")
    pixels = picture.clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1)
    ids = torch.randint(1000, 40000, (4, 32), device="cuda", generator=generator)
    return Question(network, pixels, ids, torch.arange(32) < torch.tensor([4, 5, 6, 9])[:, None])


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("draw", [demo, random])
def test_network_with_kernels_finds_the_same(draw: Callable[[], Question], dtype: torch.dtype) -> None:
    """Scores and masks of the same queries are those of the network without kernels."""
    question = draw()
    set_precision(question.network, dtype)
    operations.plain_steps.update(operations.STEPS)
    expected = find(question)
    operations.plain_steps.clear()
    found = find(question, expected.queries)
    assert (found.scores - expected.scores).abs().max() < SCORE_ERROR[dtype]
    ours, theirs = found.masks > 0, expected.masks > 0
    union = (ours | theirs).sum((-1, -2))
    ious = (ours & theirs).sum((-1, -2))[union > 0] / union[union > 0]
    assert ious.numel()
    assert ious.mean() > MIN_IOU[dtype]


def find(question: Question, queries: Tensor | None = None) -> Found:
    """What the network finds; masks of `queries`, None: of those with the best scores."""
    passes, pairs = Passes(question.network, 1, recorded=False), len(question.ids)
    image, texts = passes.encode_images(question.pixels), passes.encode_texts(question.ids, question.valid)
    decoded = passes.decode(
        image.attended.expand(pairs, -1, -1),
        image.geometry_token.expand(pairs, -1, -1),
        texts.tokens,
        texts.valid,
    )
    finer = (level.expand(pairs, -1, -1, -1) for level in image.finer)
    features = passes.pixel_features(decoded.fused, decoded.prompt, decoded.prompt_valid, *finer)
    scores = decoded.summary[:, 1 : 1 + decoded.mask_offsets.shape[1]]
    if queries is None:
        queries = scores.topk(BEST, dim=1).indices
    index = queries[..., None].expand(-1, -1, decoded.mask_factors.shape[-1])
    factors, offsets = decoded.mask_factors.gather(1, index), decoded.mask_offsets.gather(1, queries)
    return Found(scores, queries, mask_logits(factors, offsets, features))
