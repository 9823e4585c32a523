"""The features of images that a predictor keeps: same answers, fewer passes, bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from sam3_runner import FeaturesNotHeld, SAM3Predictor
from sam3_runner.images.decoded import DecodedImage, LocalImage
from sam3_runner.inference.features import FeatureCache, ImageRow, _bytes_of
from sam3_runner.inference.passes import Decoded, Passes
from sam3_runner.instances import packed_union
from sam3_runner.network.model import ImageFeatures
from tests.breaking import TOO_MANY_FLOATS
from tests.concepts import concepts

if TYPE_CHECKING:
    from sam3_runner.instances import UnionResult
    from sam3_runner.weights.checkpoint import Checkpoint

SIDE_PX = 112
KEPT_SCORE = 0.01
"""So low that the untrained model keeps many queries."""
WIDTH, HEIGHT = 90, 60
MAX_DIFFERENT = 1e-3
"""Share of a mask's px: a batch of another size sums in another order."""


def predictor_with(checkpoint: Checkpoint, max_feature_bytes: int) -> SAM3Predictor:
    predictor = SAM3Predictor(
        str(checkpoint.weights_file.parent),
        "cpu",
        score_threshold=KEPT_SCORE,
        max_feature_bytes=max_feature_bytes,
    )
    predictor.load()
    return predictor


@pytest.fixture(scope="module")
def without(tiny_checkpoint: Checkpoint) -> SAM3Predictor:
    """A predictor that keeps nothing."""
    return predictor_with(tiny_checkpoint, 0)


@pytest.fixture(scope="module")
def image_bytes(tiny_checkpoint: Checkpoint) -> int:
    """Bytes of the features of one image."""
    predictor = predictor_with(tiny_checkpoint, 2**30)
    predictor.segment_united([(picture("a"), concepts("cat"))])
    row = predictor._model_in("float32").features.find("a")
    assert row is not None
    return _bytes_of(row)


def picture(name: str, *, key: bool = True) -> LocalImage:
    """A picture of its own for each name, and its key."""
    generator = np.random.default_rng(list(name.encode()))
    coarse = generator.integers(0, 256, (7, 7, 3), dtype=np.uint8)
    pixels = np.ascontiguousarray(coarse.repeat(SIDE_PX // 7, axis=0).repeat(SIDE_PX // 7, axis=1))
    return LocalImage(pixels, WIDTH, HEIGHT, key=name if key else None)


def only_key(name: str) -> DecodedImage:
    """The same picture by its key alone."""
    return DecodedImage(None, WIDTH, HEIGHT, key=name)


def check_same(one: list[UnionResult], other: list[UnionResult]) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.prompt == second.prompt
        assert first.presence == pytest.approx(second.presence, abs=1e-5)
        assert len(first.instances) == len(second.instances) > 0
        for mine, theirs in zip(first.instances, second.instances, strict=True):
            assert mine.score == pytest.approx(theirs.score, abs=1e-5)
            assert mine.box == pytest.approx(theirs.box, abs=0.01)
        different = np.unpackbits(packed_union([first]) ^ packed_union([second]))
        assert different.mean() <= MAX_DIFFERENT


class Counts:
    """How far the metrics of features have moved since this was made."""

    def __init__(self) -> None:
        self._before = self._read()

    def since(self) -> tuple[float, float, float]:
        """Hits, misses and evictions."""
        hits, misses, evictions = (now - then for now, then in zip(self._read(), self._before, strict=True))
        return hits, misses, evictions

    @staticmethod
    def _read() -> tuple[float, float, float]:
        hits, misses = (
            REGISTRY.get_sample_value("sam3_features_total", {"cache": cache}) or 0.0
            for cache in ("hit", "miss")
        )
        return hits, misses, REGISTRY.get_sample_value("sam3_feature_evictions_total") or 0.0


def feature_bytes() -> float:
    return REGISTRY.get_sample_value("sam3_feature_bytes") or 0.0


def test_hit_gives_the_same_answer(tiny_checkpoint: Checkpoint, without: SAM3Predictor) -> None:
    """A picture known by its key needs no pixels, and gives what its pixels give, for new prompts too."""
    predictor, counts = predictor_with(tiny_checkpoint, 2**30), Counts()
    for prompts in (["cat"], ["dog", "ring"], ["cat", "a red bus"]):
        image = picture("a") if prompts == ["cat"] else only_key("a")
        check_same(
            predictor.segment_united([(image, concepts(*prompts))])[0],
            without.segment_united([(picture("a", key=False), concepts(*prompts))])[0],
        )
    assert counts.since() == (2, 1 + 3, 0)


def test_batch_of_hits_and_misses(tiny_checkpoint: Checkpoint, without: SAM3Predictor) -> None:
    """Each request of a batch gets its own picture's answer, whichever features were held."""
    predictor = predictor_with(tiny_checkpoint, 2**30)
    predictor.segment_united([(picture("b"), concepts("cat")), (picture("d"), concepts("cat"))])
    counts = Counts()
    batch = [picture("a"), only_key("b"), picture("c", key=False), only_key("d"), picture("e")]
    prompts = ["cat", "dog"]
    found = predictor.segment_united([(image, concepts(*prompts)) for image in batch])
    assert counts.since() == (2, 3, 0)
    for name, results in zip("abcde", found, strict=True):
        check_same(results, without.segment_united([(picture(name, key=False), concepts(*prompts))])[0])


def test_one_key_twice_in_a_batch(tiny_checkpoint: Checkpoint, without: SAM3Predictor) -> None:
    """Requests for one picture that come together encode it once; unknown keys are never taken as equal."""
    predictor, counts = predictor_with(tiny_checkpoint, 2**30), Counts()
    batch = [
        (picture("a"), concepts("cat")),
        (picture("b"), concepts("cat")),
        (picture("a"), concepts("dog")),
    ]
    found = predictor.segment_united(batch)
    assert counts.since() == (1, 2, 0)
    for (image, prompts), results in zip(batch, found, strict=True):
        assert image.key is not None
        check_same(results, without.segment_united([(picture(image.key, key=False), prompts)])[0])
    counts = Counts()
    predictor.segment_united(
        [(picture("c", key=False), concepts("cat")), (picture("d", key=False), concepts("cat"))]
    )
    assert counts.since() == (0, 2, 0)


def test_pixels_of_any_request_with_the_key_are_used(tiny_checkpoint: Checkpoint) -> None:
    """Where one request of a batch has the key alone and another the pixels, both are answered."""
    predictor = predictor_with(tiny_checkpoint, 2**30)
    [by_key, by_pixels] = predictor.segment_united(
        [(only_key("a"), concepts("cat")), (picture("a"), concepts("cat"))]
    )
    check_same(by_key, by_pixels)


def test_least_recently_used_makes_room(tiny_checkpoint: Checkpoint, image_bytes: int) -> None:
    """With room for two, the picture that was not used for the longest time is encoded again."""
    predictor, counts = predictor_with(tiny_checkpoint, 2 * image_bytes), Counts()
    for image in (picture("a"), picture("b"), only_key("a"), picture("c")):
        predictor.segment_united([(image, concepts("cat"))])
    assert [predictor.holds(key) for key in "abc"] == [True, False, True]
    assert counts.since() == (1, 3, 1)
    assert feature_bytes() == 2 * image_bytes


def test_memory_is_bounded(tiny_checkpoint: Checkpoint, image_bytes: int) -> None:
    """However many pictures come, one by one and in batches, no more is kept than the limit."""
    limit = 3 * image_bytes + image_bytes // 2
    predictor = predictor_with(tiny_checkpoint, limit)
    for start in range(0, 12, 4):
        names = [f"{start}-{number}" for number in range(4)]
        predictor.segment_united([(picture(name), concepts("cat")) for name in names])
        held = predictor._model_in("float32").features._rows
        # What a view of a batch keeps in memory counts whole.
        stored = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for row in held.values()
            for tensor in (
                *row.batch.finer,
                row.batch.attended,
                row.batch.geometry_token,
                row.batch.coarse,
            )
        }
        assert sum(stored.values()) == feature_bytes() <= limit
        assert sum(predictor.holds(name) for name in names) == 3


@pytest.mark.parametrize("missing_bytes", [0, 1])
def test_picture_larger_than_the_limit(
    tiny_checkpoint: Checkpoint, without: SAM3Predictor, image_bytes: int, missing_bytes: int
) -> None:
    """Features that do not fit are used, and not kept."""
    predictor = predictor_with(tiny_checkpoint, image_bytes - missing_bytes)
    [found] = predictor.segment_united([(picture("a"), concepts("cat"))])
    check_same(found, without.segment_united([(picture("a", key=False), concepts("cat"))])[0])
    assert predictor.holds("a") == (missing_bytes == 0)


def test_key_whose_features_are_not_held(tiny_checkpoint: Checkpoint) -> None:
    """A key without pixels is an error unless its features are held."""
    predictor = predictor_with(tiny_checkpoint, 2**30)
    with pytest.raises(FeaturesNotHeld, match="not held"):
        predictor.segment_united([(only_key("a"), concepts("cat"))])
    predictor.segment_united([(picture("a"), concepts("cat"))])
    assert predictor.segment_united([(only_key("a"), concepts("cat"))])[0][0].instances


class FullOnce(Passes):
    """Passes on a device whose memory is full once: torch's own error."""

    is_full = False

    def decode(
        self,
        attended: torch.Tensor,
        geometry_token: torch.Tensor,
        text_tokens: torch.Tensor,
        text_valid: torch.Tensor,
    ) -> Decoded:
        if self.is_full:
            self.is_full = False
            torch.empty(TOO_MANY_FLOATS)
        return super().decode(attended, geometry_token, text_tokens, text_valid)


def test_full_memory_frees_the_features(tiny_checkpoint: Checkpoint, without: SAM3Predictor) -> None:
    """Where a pass does not fit, kept features are freed, and the same request is answered."""
    predictor = predictor_with(tiny_checkpoint, 2**30)
    model = predictor._model_in("float32")
    passes = model._passes = FullOnce(predictor._network)
    predictor.segment_united([(picture(name), concepts("cat")) for name in "ab"])
    passes.is_full = True
    [found] = predictor.segment_united([(only_key("a"), concepts("cat"))])
    check_same(found, without.segment_united([(picture("a", key=False), concepts("cat"))])[0])
    assert [predictor.holds(key) for key in "ab"] == [False, False]
    assert feature_bytes() == 0
    assert model._pairs_at_once.current == passes.max_pairs, "the size of a pass is not reduced"


def test_features_that_do_not_fit_are_used() -> None:
    """Where the memory has no room for a copy, the features of the pass are used, and not kept."""
    huge = torch.zeros(1).expand(2, TOO_MANY_FLOATS)
    encoded = ImageRow(ImageFeatures(finer=(huge,), attended=huge, geometry_token=huge, coarse=huge), 1)
    cache = FeatureCache(2**60, copies=True)
    assert cache.keep("a", encoded) is encoded
    assert "a" not in cache
