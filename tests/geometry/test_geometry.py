"""Image tokens against the models' own code: a region is painted, and its tokens must change.

The pictures go through the HF processor and a small HF model of the family whose vision tower does
not attend: each image feature then depends on its own patch and nothing else.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils import fetch_image
from transformers import AutoImageProcessor, AutoProcessor, CLIPVisionConfig
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

from sparsemm_vllm.geometry import Box, Geometry, Size, image_tokens
from support.painted import (
    MAKERS,
    PATCH,
    PINPOINTS,
    TOWER,
    Family,
    clip_processor,
    llava,
    llava_next,
    qwen,
)

# Wide, tall, square, smaller than a patch, sizes at which nothing or all is resized.
SIZES = [
    (56, 56),
    (112, 112),
    (100, 75),
    (75, 101),
    (300, 60),
    (31, 200),
    (9, 7),
    (23, 3),
    (640, 480),
]


def boxes(size: Size) -> list[tuple[int, int, int, int]]:
    """The whole picture, its corners and edges, and pieces at odd places."""
    width, height = size
    x, y = max(1, width // 3), max(1, height // 3)
    found = [
        (0, 0, width, height),
        (0, 0, x, y),
        (width - x, height - y, width, height),
        (0, height - y, width, height),
        (width - 1, 0, width, height),
        (width // 2, height // 2, width // 2 + x, height // 2 + y),
    ]
    return sorted({(a, b, min(c, width), min(d, height)) for a, b, c, d in found})


def grown(box: Box, size: Size, by: float) -> Box:
    left, top, right, bottom = box
    return max(0, left - by), max(0, top - by), min(size[0], right + by), min(size[1], bottom + by)


def check(
    changed: set[int], geometry: Geometry, box: tuple[int, int, int, int], out: float, into: float
) -> None:
    """The tokens of the box change, and no others, but for a margin that the resizing needs."""
    covered = set(geometry.covered(grown(box, geometry.image_size, out)).tolist())
    assert changed <= covered
    left, top, right, bottom = core = grown(box, geometry.image_size, -into)
    if left < right and top < bottom:
        assert set(geometry.covered(core).tolist()) <= changed


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_painted_regions(families: Callable[[str], Family], name: str, size: Size) -> None:
    family = families(name)
    scale = family.pixels_per_pixel(size, family.inputs(Image.new("RGB", size)))
    for box in boxes(size):
        # A picked pixel lies in its patch; a box narrower than their distance may be missed.
        changed = family.changed(size, box, family.nearest)
        check(changed, family.geometry(size), box, 0.01, scale + 0.01)
        # The bicubic filter reaches two pixels of the coarser picture further.
        reach = 2 * max(scale, 1) + 1
        changed = family.changed(size, box)
        check(changed, family.geometry(size), box, reach, reach + scale / 2)


# Sizes at which the finest view is the picture itself, pixel for pixel: odd and even margins.
EXACT = [
    ("llava-crop", (97, 56)),  # crops 20 of 41 on the left
    ("llava-crop", (56, 80)),
    ("llava-pad", (56, 33)),  # pads 11 of 23 above
    ("llava-pad", (42, 56)),
    ("llava_next", (112, 101)),  # pads 5 of 11; tokens reach over the edge
    ("llava_next", (93, 112)),
    ("llava_next", (168, 19)),  # 3 rows of tokens are left out on either side
    ("llava_next-siglip", (94, 70)),
    ("llava_next-siglip", (41, 94)),
    ("qwen2_vl", (140, 84)),
    ("qwen2_5_vl", (84, 140)),
]


@pytest.mark.parametrize(("name", "size"), EXACT, ids=str)
def test_single_pixels_where_nothing_is_resized(
    families: Callable[[str], Family], name: str, size: Size
) -> None:
    family = families(name)
    geometry = family.geometry(size)
    tiles = 0 if "next" not in name else (family.config.vision_config.image_size // PATCH) ** 2
    rng = np.random.default_rng(0)
    for x, y in rng.integers(size, size=(40, 2)).tolist():
        changed = family.changed(size, (x, y, x + 1, y + 1), family.nearest)
        covered = set(geometry.covered((x, y, x + 1, y + 1)).tolist())
        assert {t for t in changed if t >= tiles} == {t for t in covered if t >= tiles}
        assert changed <= covered


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=15)
@given(size=st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_tokens_are_counted_as_the_processor_counts_them(
    families: Callable[[str], Family], name: str, size: Size
) -> None:
    family = families(name)
    if max(size) > 40 * min(size):  # the processors make gigantic pictures of these
        return
    assert family.geometry(size).num_tokens == family.placeholders(size)


@given(size=st.tuples(st.integers(1, 400), st.integers(1, 400)))
def test_tiles_are_resized_and_padded_to_the_pixel(
    families: Callable[[str], Family], size: Size
) -> None:
    """Painting does not tell 32 from 33 pixels: here are the numbers of the processor itself."""
    family = families("llava_next")
    picture = np.empty((3, size[1], size[0]))
    best = select_best_resolution(size[::-1], PINPOINTS)
    resized = get_patch_output_size(picture, best, "channels_first")
    left, top, _, _ = family.processor.image_processor._get_padding_size(resized, best)

    tiles = family.geometry(size).patches[16:]
    tiles = tiles[~np.isnan(tiles).any(axis=1)]
    if len(tiles):  # of a very long picture, none may be left
        x0, y0, x1, y1 = tiles[0] * np.tile(np.divide(resized[::-1], size), 2)
        assert (x1 - x0, y1 - y0) == pytest.approx((PATCH, PATCH))
        assert (x0 + left) / PATCH == pytest.approx(round((x0 + left) / PATCH), abs=1e-6)
        assert (y0 + top) / PATCH == pytest.approx(round((y0 + top) / PATCH), abs=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_the_whole_picture_covers_every_token_that_shows_some_of_it(
    families: Callable[[str], Family], name: str, size: Size
) -> None:
    family = families(name)
    geometry = family.geometry(size)
    features = family.features(Image.new("RGB", size))
    assert geometry.num_tokens == len(features) == family.placeholders(size)

    whole = geometry.covered((0, 0, *size))
    blank = np.isnan(geometry.patches).any(axis=1)
    if "next" in name:
        newline = (features == family.model.model.image_newline).all(dim=-1).numpy()
        assert np.array_equal(blank, newline)
        assert newline.any() or size == (23, 3)  # no row of tiles is left of that one
    else:
        assert np.flatnonzero(blank).tolist() == ([0] if name == "llava-full" else [])
    if name != "llava-pad":  # where whole tokens are padding
        assert np.array_equal(whole, np.flatnonzero(~blank))
    assert whole.dtype == np.int64


@pytest.mark.parametrize(
    "name", ["llava-crop", "llava-pad", "llava-siglip", "llava_next", "qwen2_vl"]
)
def test_the_processors_of_the_pillow_backend(
    families: Callable[[str], Family], name: str, tmp_path: Path
) -> None:
    family = families(name)
    family.processor.save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    processor.image_processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert processor.image_processor.backend == "pil"
    processor.image_processor.resample = Image.Resampling.NEAREST
    for size in [(100, 75), (75, 101)]:
        scale = family.pixels_per_pixel(size, family.inputs(Image.new("RGB", size)))
        for box in boxes(size):
            changed = family.changed(size, box, processor)
            check(changed, family.geometry(size, processor), box, 0.01, 1.5 * scale)


def test_a_box_outside_of_the_crop_covers_nothing(families: Callable[[str], Family]) -> None:
    geometry = families("llava-crop").geometry((168, 56))  # columns 56 to 111 are seen
    assert geometry.covered((0, 0, 56, 56)).tolist() == []
    assert geometry.covered((112, 0, 168, 56)).tolist() == []
    assert geometry.covered((0, 0, 57, 56)).tolist() == [0, 4, 8, 12]
    assert geometry.covered((111, 0, 168, 1)).tolist() == [3]


def test_a_box_in_several_views(families: Callable[[str], Family]) -> None:
    geometry = families("llava_next").geometry((112, 112))  # 16 tokens, then 8 rows of 8 + newline
    assert geometry.num_tokens == 16 + 8 * 9
    assert geometry.covered((14, 28, 28, 42)).tolist() == [4, 16 + 2 * 9 + 1]


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("llava", (1000, 700), 24 * 24),
        ("llava_next", (672, 672), 24 * 24 + 48 * (48 + 1)),
        ("llava_next", (1000, 700), 24 * 24 + 34 * (48 + 1)),  # 48 * 0.7 = 33.6 rows, evenly cut
        ("qwen2_vl", (1000, 700), 36 * 25),
        ("qwen2_5_vl", (4000, 3000), 41 * 30),  # at most 1280 tokens
    ],
)
def test_sizes_of_published_models(tmp_path: Path, name: str, size: Size, tokens: int) -> None:
    tower = CLIPVisionConfig(**{**TOWER, "image_size": 336})
    if name == "llava":
        family = llava(tmp_path, clip_processor(side=336), tower)
    elif name == "llava_next":
        pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        family = llava_next(tmp_path, tower, pinpoints)
    else:
        family = qwen(tmp_path, name, size=None)
    assert family.geometry(size).num_tokens == family.placeholders(size) == tokens
    box = (411, 302, 530, 377)
    scale = family.pixels_per_pixel(size, family.inputs(Image.new("RGB", size)))
    changed = family.changed(size, box, family.nearest)
    check(changed, family.geometry(size), box, 0.01, scale + 0.01)


@pytest.mark.parametrize("size", [(640, 480), (100, 75), (56, 300), (23, 3)], ids=str)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_pictures_resized_by_qwen_vl_utils(
    families: Callable[[str], Family], name: str, size: Size
) -> None:
    """Limits of its own: the processor may resize once more."""
    family = families(name)
    for limits in ({}, {"min_pixels": 28 * 28, "max_pixels": 10 * 28 * 28}):
        resized_to = fetch_image({"image": Image.new("RGB", size), **limits}).size
        geometry = image_tokens(family.config, family.processor, size, resized_to)
        for box in boxes(size):
            black, painted = Image.new("RGB", size), Image.new("RGB", size)
            painted.paste((255, 255, 255), box)
            before, after = (
                family.features(fetch_image({"image": image, **limits}))
                for image in (black, painted)
            )
            assert len(before) == geometry.num_tokens
            changed = set(torch.nonzero((before != after).any(dim=-1)).ravel().tolist())
            _, rows, columns = family.inputs(black.resize(resized_to))["image_grid_thw"][0].tolist()
            coarsest = min(columns * PATCH / size[0], rows * PATCH / size[1], 1)
            coarsest = min(coarsest, resized_to[0] / size[0], resized_to[1] / size[1])
            reach = 2 * (2 / coarsest + 1)  # two bicubic filters
            check(changed, geometry, box, reach, reach + 1 / coarsest)


def test_borders_on_whole_pixels_are_exact(families: Callable[[str], Family]) -> None:
    """No neighbour is touched by a rounding error, whatever the picture's width."""
    family = families("llava-siglip-default")  # patches 1 to 15 of 4 x 4
    for width in range(1, 140):
        geometry = family.geometry((4 * width, 56))
        assert geometry.covered((width, 0, 2 * width, 56)).tolist() == [0, 4, 8, 12]

    family = families("qwen2_vl")  # 84 pixels are three tokens
    for width in range(30, 170):
        size = (3 * width, 84)
        geometry = image_tokens(family.config, family.processor, size, resized_to=(84, 84))
        assert geometry.covered((width, 0, 2 * width, 84)).tolist() == [1, 4, 7]
    geometry = image_tokens(family.config, family.processor, (100, 84), resized_to=(84, 84))
    assert geometry.covered((33, 0, 33.3, 84)).tolist() == [0, 3, 6]  # the border is at 33.33


def test_a_picture_that_is_not_resized(tmp_path: Path) -> None:
    family = qwen(tmp_path, "qwen2_vl", do_resize=False)
    geometry = family.geometry((56, 84))
    assert geometry.num_tokens == family.placeholders((56, 84)) == 6
    assert geometry.covered((28, 27, 29, 28)).tolist() == [1]
    with pytest.raises(ValueError, match="57 x 84 pixels are no multiple of 28"):
        family.geometry((57, 84))
