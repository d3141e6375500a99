"""`sparsemm look`: where visual heads looked, and what the pruned cache kept."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from sparsemm_vllm.budget.plan import Blocks
from sparsemm_vllm.budget.profile import HeadProfile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.cli import app
from sparsemm_vllm.commands.kept_map import KeptPicture
from sparsemm_vllm.commands.look.draw import draw_sight, print_sight
from sparsemm_vllm.commands.look.run import look, said_words, visual_heads
from sparsemm_vllm.commands.look.sight import SaidWord, Sight
from sparsemm_vllm.data.pictures import DEMO_SEEDS, Sample, make_demo_sample
from sparsemm_vllm.geometry.grid import Geometry, cells
from sparsemm_vllm.profiler.errors import ProfilerError

SIDE, PATCH = 4, 8  # tokens and pixels


def make_sight(**changes: Any) -> Sight:
    """Two layers of two KV heads, a picture of 16 tokens at positions 2 to 17 of 24, window 4."""
    edges = np.arange(SIDE)[:, None] * PATCH + [0, PATCH]
    geometry = Geometry((SIDE * PATCH, SIDE * PATCH), cells(edges, edges).reshape(-1, 4))
    looks = np.zeros(16, dtype=np.int64)
    looks[5] = 3
    fields: dict[str, Any] = {
        "image": Image.new("RGB", (SIDE * PATCH, SIDE * PATCH), "#30c050"),
        "geometry": geometry,
        "positions": np.arange(2, 18),
        "prompt_tokens": 24,
        "window": 4,
        "by_head": {
            (0, 0): np.arange(20),
            (0, 1): np.array([0, 2]),
            (1, 0): np.array([], dtype=np.int64),
            (1, 1): np.array([7, 19]),
        },
    }
    return Sight(
        kept=KeptPicture(**fields | changes),
        question="What is it?",
        answer="GREEN $x$",
        words=[SaidWord("GREEN", looks, 1), SaidWord("$x$", np.zeros(16, dtype=np.int64), 0)],
        heads=[(1, 3)],
        group=2,
        blocks=Blocks(dense=6, peak=8, pruned=3),
    )


def test_kept_tokens_of_the_picture() -> None:
    kept = make_sight().kept
    assert kept.mask_of((0, 0)).all()
    assert kept.mask_of((0, 1)).nonzero()[0].tolist() == [0]
    assert kept.mask_of((1, 1)).nonzero()[0].tolist() == [5]
    assert kept.share()[[0, 5, 9]].tolist() == [0.5, 0.5, 0.25]
    assert [kept.tokens_of(head) for head in kept.by_head] == [24, 6, 4, 6]


def test_the_window_may_reach_into_the_picture() -> None:
    kept = make_sight(prompt_tokens=20).kept
    assert kept.mask_of((1, 0)).nonzero()[0].tolist() == [14, 15]


def test_a_prompt_within_the_budget_is_kept_whole() -> None:
    kept = make_sight(by_head={}).kept
    assert (kept.share() == 1).all()
    assert kept.tokens_of((0, 0)) == 24


def test_words_and_looks() -> None:
    """Tokens: `is: `, `AB`, ` C`, `D AB`; positions 0..2 are text, 3..6 the picture."""
    text, spans = "is: AB CD AB", [(0, 4), (4, 6), (6, 8), (8, 12)]
    keys = np.full((2, 9, 2), -1)
    keys[0, :4, 1] = [3, 4, 5, 6]
    keys[1, :4, 0] = [0, 0, 5, -1]
    tokens = np.array([-1, -1, -1, 0, 1, 2, 3])
    words = said_words(text, spans, "AB CD AB", keys, [(0, 1), (1, 0)], tokens)
    assert [word.text for word in words] == ["AB", "CD", "AB"]
    assert [word.looks.tolist() for word in words] == [[0, 1, 0, 0], [0, 0, 2, 1], [0, 0, 0, 1]]
    assert [word.elsewhere for word in words] == [1, 0, 0]
    assert [word.on_picture for word in words] == [0.5, 1.0, 1.0]
    with pytest.raises(ProfilerError, match="chat template changes answers"):
        said_words("is: ab", spans, "AB", keys, [(0, 1)], tokens)


def test_visual_heads_are_the_best_twentieth() -> None:
    scores = np.ones((5, 8))
    scores[3, 2], scores[0, 7] = 5, 4
    profile = HeadProfile(
        model_id="m",
        num_layers=5,
        num_query_heads=8,
        num_kv_heads=8,
        scores=tuple(map(tuple, scores.tolist())),
    )
    assert visual_heads(profile) == [(3, 2), (0, 7)]


@pytest.mark.parametrize("kept", ["pruned", "whole"])
def test_picture(kept: str, tmp_path: Path) -> None:
    sight = make_sight() if kept == "pruned" else make_sight(by_head={})
    draw_sight(sight, tmp_path / "look.png")
    with Image.open(tmp_path / "look.png") as picture:
        colours = picture.convert("RGB").quantize(256).convert("RGB").getcolors(2**20)
    assert picture.size == (1222, 1040)
    assert len(colours) > 20


def test_terminal() -> None:
    file = io.StringIO()
    print_sight(make_sight(), Console(file=file, width=100))
    text = file.getvalue()
    assert "GREEN $x$" in text
    assert "visual heads 1-3 " in text
    assert "a head keeps 4 to 24, 6 in the median: 3 KV blocks instead of 6" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("GREEN  "))
    assert row.split() == ["GREEN", "75%", "1", "50%"]


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("missing.png", [], "missing.png: No such file"),
        ("text.png", [], "text.png is no picture"),
        ("good.png", ["--out", "look.jpg"], "look.jpg is not a .png file"),
        ("good.png", ["--out", "no/look.png"], "its folder does not exist"),
        ("good.png", ["--budget", "8"], "budget"),
    ],
)
def test_bad_input(
    image: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    result = CliRunner().invoke(app, ["look", "sparsemm-reader", image, *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.engine
def test_the_reader_looks_at_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most looks of a word fall on tokens that show it; the kept sets are the layout's."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    sample: Sample = make_demo_sample(DEMO_SEEDS[3], "read")
    small = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8, "max_model_len": 1024}
    settings = Settings(profile="sparsemm-reader", budget=96, window=16)
    sight = look("sparsemm-reader", sample.image, sample.question, settings, 64, **small)

    true = {word.text: word for word in sample.words}
    right = [word for word in sight.words if word.text in true]
    assert len(right) >= 7
    inside = [word.looks[sight.kept.geometry.covered(true[word.text].box)].sum() for word in right]
    assert sum(inside) > 0.8 * sum(word.looks.sum() + word.elsewhere for word in right)
    assert len(sight.kept.positions) == 196
    counts = [sight.kept.tokens_of(head) for head in sorted(sight.kept.by_head)]
    assert len(counts) == 24
    assert min(counts) < 40 < max(counts) == sight.kept.prompt_tokens == 214
    assert sight.blocks.pruned < sight.blocks.dense == 14


def test_importing_the_command_leaves_triton_alone() -> None:
    import subprocess

    code = "import sys, sparsemm_vllm.commands.look.command; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
