"""What heads kept of a picture, as it is drawn; where the demo's picture stands in its prompt."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sparsemm_vllm.commands.demo.prompt import picture_in_prompt
from sparsemm_vllm.commands.kept_map import KeptPicture, draw_kept, grey, token_map
from sparsemm_vllm.data.pictures import DEMO_SEEDS, make_demo_sample
from sparsemm_vllm.geometry.grid import BLANK, Geometry, cells
from sparsemm_vllm.reader import reader_folder

WIDTH, HEIGHT = 12, 8  # pixels; patches of 4
GREEN = (48, 192, 80)


def make_geometry() -> Geometry:
    """Two rows of three patches, and a token that shows nothing, such as the end of a line."""
    columns = np.arange(3)[:, None] * 4 + [0, 4]
    rows = np.arange(2)[:, None] * 4 + [0, 4]
    return Geometry((WIDTH, HEIGHT), np.vstack([cells(columns, rows).reshape(-1, 4), BLANK]))


def make_picture(by_head: dict[tuple[int, int], np.ndarray]) -> KeptPicture:
    """The image tokens stand at positions 3 to 9 of a prompt of 20 tokens."""
    image = Image.new("RGB", (WIDTH, HEIGHT), GREEN)
    return KeptPicture(image, make_geometry(), np.arange(3, 10), 20, 4, by_head)


def test_a_head_shows_the_patches_that_it_kept() -> None:
    picture = make_picture({(2, 1): np.array([0, 3, 8, 9])})
    axes = Figure().subplots()
    draw_kept(axes, picture, (2, 1))
    (shown,) = axes.images
    pixels = np.asarray(shown.get_array())
    washed_out = grey(picture.image, 0.12)
    for token, (left, top, right, bottom) in enumerate(picture.geometry.patches[:6].astype(int)):
        patch = slice(top, bottom), slice(left, right)
        wanted = np.asarray(picture.image) if token in (0, 5) else washed_out
        np.testing.assert_array_equal(pixels[patch], wanted[patch])
    assert list(shown.get_extent()) == [0, WIDTH, HEIGHT, 0]
    assert axes.get_title() == "layer 2, KV head 1"
    assert axes.get_xlabel() == "keeps 8 tokens, 3 of the picture"


def test_a_title_moves_the_head_into_the_note() -> None:
    axes = Figure().subplots()
    draw_kept(axes, make_picture({(0, 0): np.array([4])}), (0, 0), "the best visual head")
    assert axes.get_xlabel() == "layer 0, KV head 0:\n5 tokens, 1 of the picture"


def test_nothing_pruned_shows_everything() -> None:
    picture = make_picture({})
    axes = Figure().subplots()
    draw_kept(axes, picture, (0, 0))
    np.testing.assert_array_equal(axes.images[0].get_array(), np.asarray(picture.image))
    assert axes.get_xlabel() == "keeps 20 tokens, 7 of the picture"


def test_values_of_tokens_as_pixels() -> None:
    """Patches that reach over the edge are cut, overlapping ones averaged."""
    patches = np.array([[-2.0, 0, 2, 4], [0, 0, 4, 4], BLANK])
    values = token_map(Geometry((6, 4), patches), np.array([1.0, 3.0, 9.0]))
    assert values.tolist() == [[2, 2, 3, 3, 0, 0]] * 4


def test_the_demos_picture_in_its_prompt() -> None:
    """The tokens that the bundled model is asked with; see `test_demo` for what a server counts."""
    sample = make_demo_sample(DEMO_SEEDS[3], "read")
    asked = reader_folder(), sample.image, sample.question
    geometry, positions = picture_in_prompt(*asked, prompt_tokens=214)
    assert len(positions) == geometry.num_tokens == 196
    assert (np.diff(positions) == 1).all()
    assert 0 < positions[0] <= positions[-1] < 213
    with pytest.raises(ValueError, match="214 tokens by the model's processor, and 215 by the"):
        picture_in_prompt(*asked, prompt_tokens=215)
