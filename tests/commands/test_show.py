"""`sparsemm show`: in the terminal with and without colour, and as a picture without overlaps."""

import io
import re
import subprocess
import sys
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from sparsemm_vllm.budget.plan import build_layout
from sparsemm_vllm.budget.profile import HeadProfile, load_profile, save_profile
from sparsemm_vllm.budget.settings import Settings
from sparsemm_vllm.cli import app
from sparsemm_vllm.commands.figures import STYLE
from sparsemm_vllm.commands.show import (
    MAGMA,
    VIRIDIS,
    cumulative_mass,
    draw_profile,
    heads_in,
    kept_per_head,
    print_profile,
    profile_figure,
)

SHAPES = [
    (6, 8, 4),  # the bundled model
    (32, 32, 32),  # Vicuna-7B
    (28, 28, 4),  # Qwen2-VL-7B
    (80, 64, 8),  # 70B models
    (1, 1, 1),
    (1, 12, 12),
    (2, 2, 1),
]


def make(L, Hq, Hkv, seed=0, concentration=1.0, **more):
    scores = np.random.default_rng(seed).pareto(concentration, (L, Hq)) + 1e-6
    return HeadProfile(
        model_id="llava-hf/some-model", num_layers=L, num_query_heads=Hq, num_kv_heads=Hkv,
        scores=scores.tolist(), **more,
    )  # fmt: skip


def printed(profile, budget=256, prompt_tokens=3072, width=80, colour=False):
    console = Console(
        width=width, force_terminal=colour, color_system="truecolor" if colour else None,
        file=io.StringIO(),
    )  # fmt: skip
    print_profile(profile, Settings(budget=budget), prompt_tokens, console)
    return console.file.getvalue()


def run(*arguments):
    return CliRunner().invoke(app, ["show", *map(str, arguments)])


def map_rows(text, heading):
    """The rows of the map below a heading, cells by layer."""
    lines = text[text.index(heading) :].splitlines()[1:]
    rows = []
    for line in lines:
        if not re.match(r" +\d+ ", line) or int(line.split()[0]) != len(rows):
            break
        rows.append(line.split()[1:])
    return rows


def test_cumulative_mass():
    profile = HeadProfile(
        model_id="m", num_layers=2, num_query_heads=2, num_kv_heads=2,
        scores=((1.0, 0.0), (5.0, 2.0)),
    )  # fmt: skip
    assert cumulative_mass(profile).tolist() == [0.625, 0.875, 1.0, 1.0]


@pytest.mark.parametrize(
    ("share", "heads", "count"),
    [(0.05, 1024, 51), (0.05, 48, 2), (0.1, 48, 5), (0.01, 4, 1), (0.05, 1, 1)],
)
def test_how_many_heads_a_share_is(share, heads, count):
    assert heads_in(share, heads) == count


def test_published_scores_are_as_concentrated_as_the_paper_says(published):
    profile = HeadProfile(
        model_id="m", num_layers=32, num_query_heads=32, num_kv_heads=32,
        scores=published[0].tolist(),
    )  # fmt: skip
    assert cumulative_mass(profile)[heads_in(0.05, 1024) - 1] == pytest.approx(0.55, abs=0.005)
    assert re.search(r"top 5% +51 heads +55%", printed(profile))


@pytest.mark.parametrize("colour", [False, True])
def test_every_head_reads_without_colour(colour):
    profile = make(12, 16, 16)
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(profile, colour=colour))
    scores = np.array(profile.scores)
    steps = np.rint(9 * np.sqrt(scores / scores.max())).astype(int)
    rows = map_rows(text, "Visual scores")
    assert rows == [["·" if step == 0 else str(step) for step in row] for row in steps]
    assert {"·", "1", "9"} <= {cell for row in rows for cell in row}
    assert f"9 = {scores.max():.2g}" in text


def test_colours_are_those_of_the_digits():
    profile = make(6, 8, 8, concentration=3.0)
    codes = {tuple(str(int(c[i : i + 2], 16)) for i in (1, 3, 5)): n for n, c in enumerate(MAGMA)}
    text = printed(profile, colour=True)
    cells = re.findall(r"\x1b\[38;2;(\d+);\d+;\d+;48;2;(\d+);(\d+);(\d+)m ?([·\d])\x1b", text)
    seen = {(codes[r, g, b], digit.replace("·", "0"), ink) for ink, r, g, b, digit in cells}
    assert len(seen) > 5
    for step, digit, ink in seen:
        assert step == int(digit)
        assert ink == ("0" if step >= 5 else "255"), "digits stand out from their ground"


def test_steps_are_those_of_matplotlibs_uniform_maps():
    for name, steps in (("magma", MAGMA), ("viridis", VIRIDIS)):
        colours = matplotlib.colormaps[name](np.arange(10) / 9)
        assert [matplotlib.colors.to_hex(c) for c in colours] == list(steps)


@pytest.mark.parametrize("budget", [64, 256, 1000])
def test_tokens_of_each_head_are_numbers_where_they_fit(budget):
    profile = load_profile("sparsemm-reader")
    rows = map_rows(printed(profile, budget, 214), f"Budget {budget:,}")
    layout = build_layout(profile, Settings(budget=budget))
    kept = layout.kept_tokens(214) + 32 if budget <= 214 else np.full((6, 4), 214)
    assert [[int(cell) for cell in row] for row in rows] == kept.tolist()


def test_tokens_of_many_heads_are_digits():
    profile = make(32, 32, 32)
    text = printed(profile)
    kept = kept_per_head(profile, Settings(), 3072)
    steps = np.rint(9 * np.sqrt(kept / 3072)).astype(int)
    assert [[int(c) for c in row] for row in map_rows(text, "Budget 256")] == steps.tolist()
    assert "9 = 3,072" in text
    numbers = map_rows(printed(profile, width=200), "Budget 256")
    assert [[int(c) for c in row] for row in numbers] == kept.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_summary_and_the_width(shape):
    profile = make(*shape)
    text = printed(profile)
    kept = kept_per_head(profile, Settings(), 3072)
    for value in (f"{kept.min():,} min", f"{np.median(kept):,g} median", f"{kept.max():,} max"):
        assert value in text
    assert f"{(kept == 3072).sum():,} of {kept.size:,} keep the whole prompt" in text
    assert max(map(len, text.splitlines())) <= 80
    assert len(map_rows(text, "Visual scores")) == shape[0]


def test_what_is_known_of_the_measurement_is_said():
    known = make(2, 4, 4, mode="forced", data="ocr", samples=64, split_half=0.97)
    for text in ("mode forced", "data ocr", "samples 64", "correlation 0.97"):
        assert text in " ".join(printed(known).split())
        assert text not in printed(make(2, 4, 4))


def test_odd_names_are_neither_markup_nor_control_codes():
    odd = make(2, 4, 4).model_copy(update={"model_id": "[red]a\x1b[2J\nb"})
    assert "[red]a?[2J?b" in printed(odd)


def texts(figure):
    """Bounding boxes of all texts that are drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = list(figure.texts)
    for axes in figure.findobj(matplotlib.axes.Axes):
        found += [*axes.texts, axes.title, axes._left_title, axes._right_title]
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            found.append(axis.label)
            low, high = sorted(limits)
            shown = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
            found += [label for tick in shown for label in (tick.label1, tick.label2)]
            found += [tick.label1 for tick in axis.get_minor_ticks()]
    renderer = canvas.get_renderer()
    return {
        (text.get_text(), i): text.get_window_extent(renderer)
        for i, text in enumerate(found)
        if text.get_visible() and text.get_text()
    }


# The budget covers the prompt; a few heads have nearly all; figures of many digits.
@pytest.mark.parametrize(
    ("budget", "n", "concentration"), [(64, 50, 2.0), (256, 3072, 0.5), (4096, 131072, 2.0)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_text_of_the_picture_overlaps_or_is_cut_off(shape, budget, n, concentration):
    profile = make(
        *shape, concentration=concentration, mode="forced", data="ocr", samples=64, split_half=0.97
    )
    profile = profile.model_copy(update={"model_id": "organisation/" + "long-name-" * 20})
    with matplotlib.rc_context(STYLE):
        settings = Settings(budget=budget, method="random_heads", redistribute=True)
        figure = profile_figure(profile, settings, kept_per_head(profile, settings, n), n)
        boxes = texts(figure)
    assert len(boxes) > 30
    for name, box in boxes.items():
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= figure.bbox.x1, name
        assert box.y1 <= figure.bbox.y1, name
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        overlap_x = min(a.x1, b.x1) - max(a.x0, b.x0)
        overlap_y = min(a.y1, b.y1) - max(a.y0, b.y0)
        # "0%" of both axes meet at the corner; ascenders may touch by a hair.
        assert overlap_x <= 1 or overlap_y <= 2 or one[0] == other[0] == "0%", (one, other)


def axes_by_title(figure):
    return {axes._left_title.get_text(): axes for axes in figure.axes}


def test_what_the_picture_shows():
    profile = load_profile("sparsemm-reader")
    settings = Settings(budget=64)
    kept = kept_per_head(profile, settings, 214)
    with matplotlib.rc_context(STYLE):
        axes = axes_by_title(profile_figure(profile, settings, kept, 214))
    scores, tokens, mass, ranked = (
        axes[t] for t in ("Visual scores", "Tokens kept", "Cumulative score", "By rank")
    )
    for panel, values, name in ((scores, profile.scores, "magma"), (tokens, kept, "viridis")):
        mesh = panel.collections[0]
        np.testing.assert_array_equal(mesh.get_array(), values)
        assert mesh.get_cmap().name == name
        assert panel.yaxis_inverted(), "layer 0 is at the top"
        assert mesh.get_coordinates()[0, 0].tolist() == [-0.5, -0.5], "ticks at the middle"
    assert [t.get_text() for t in tokens.texts] == [str(k) for k in kept.ravel()]
    assert len(scores.lines) == 3, "between the four groups of query heads"
    assert not tokens.lines
    curve = mass.lines[1].get_ydata()
    np.testing.assert_allclose(curve, [0, *cumulative_mass(profile)])
    assert {t.get_text() for t in mass.texts} >= {"top 5% (2 heads): 33%", "top 10% (5 heads): 55%"}
    marks = [line.get_xydata()[0] for line in mass.lines[2:]]
    np.testing.assert_allclose(marks, [(2 / 48, curve[2]), (5 / 48, curve[5])])
    for patch in ranked.patches:
        np.testing.assert_array_equal(patch.get_data().values, np.sort(kept.ravel())[::-1])
    assert ranked.get_yscale() == "log"
    assert "even: 64" in {t.get_text() for t in ranked.texts}


def test_numbers_stand_out_from_their_cells():
    profile, settings = load_profile("sparsemm-reader"), Settings(budget=64)
    with matplotlib.rc_context(STYLE):
        figure = profile_figure(profile, settings, kept_per_head(profile, settings, 214), 214)
        FigureCanvasAgg(figure).draw()
    for axes in figure.axes[:2]:
        colours = axes.collections[0].get_facecolors()
        for text, (red, green, blue, _) in zip(axes.texts, colours, strict=True):
            light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
            contrast = (
                (light + 0.05) / 0.05 if text.get_color() == "black" else 1.05 / (light + 0.05)
            )
            assert contrast > 3, (text.get_text(), contrast)


def test_picture_file(tmp_path):
    done = run(
        "sparsemm-reader", "--out", tmp_path / "p.png", "--budget", 64, "--prompt-tokens", 214
    )
    assert done.exit_code == 0, done.output
    assert f"saved {tmp_path / 'p.png'}" in done.stdout.replace("\n", "")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (1508, 1248)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["a$b$c_{1}", r"$\frac{$", "$", "模型", "[bold]", "a\nb"])
def test_names_are_drawn_as_they_are(tmp_path, name):
    profile = make(2, 4, 4).model_copy(update={"model_id": name})
    draw_profile(profile, Settings(budget=64), 500, tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()


def test_settings_of_the_process_are_left_alone(tmp_path):
    with matplotlib.rc_context({"font.size": 3}):
        draw_profile(make(2, 4, 4), Settings(budget=64), 500, tmp_path / "p.png")
        assert matplotlib.rcParams["font.size"] == 3


def test_the_terminal_needs_no_matplotlib():
    code = (
        "import sys; from sparsemm_vllm.cli import app\n"
        "app(['show', 'sparsemm-reader'], standalone_mode=False)\n"
        "assert 'matplotlib' not in sys.modules, 'it takes longer than the rest'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sparsemm-raeder"], "did you mean 'sparsemm-reader'?"),
        (["sparsemm-reader", "--prompt-tokens", 0], "--prompt-tokens is 0"),
        (["sparsemm-reader", "--budget", 32], "larger than window"),
        (["sparsemm-reader", "--method", "snap"], "did you mean 'snapkv'?"),
        (["sparsemm-reader", "--out", "none/p.png"], "none/p.png: No such file"),
        (["sparsemm-reader", "--out", "p.jpg"], "name it so: p.png"),
        (["sparsemm-reader", "--out", "p.png", "--budget", 32], "larger than window"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("sparsemm show: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_other_methods(tmp_path):
    """Redistribution uses up what heads that keep the whole prompt leave over."""
    arguments = ("sparsemm-reader", "--budget", 64, "--prompt-tokens", 80, "--out")
    plain = run(*arguments, tmp_path / "plain.png").stdout
    given = run(*arguments, tmp_path / "given.png", "--redistribute").stdout
    even = run(*arguments, tmp_path / "even.png", "--method", "pyramidkv").stdout
    assert "Budget 64  prompt" in plain
    assert "Budget 64, redistributed  prompt" in given
    assert "Budget 64, pyramidkv  prompt" in even
    mean = {text: float(re.search(r"([\d.]+) mean", text)[1]) for text in (plain, given)}
    assert mean[plain] < 63 < mean[given] < 64.1
    pictures = [(tmp_path / f"{name}.png").read_bytes() for name in ("plain", "given", "even")]
    assert len(set(pictures)) == 3


def test_a_file_that_is_no_profile(tmp_path):
    (tmp_path / "p.json").write_text("{}")
    done = run(tmp_path / "p.json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_profile_file(tmp_path):
    save_profile(make(4, 8, 4), tmp_path / "p.json")
    done = run(tmp_path / "p.json")
    assert done.exit_code == 0, done.output
    assert "4 layers, 8 query heads, 4 KV heads" in done.stdout
    assert len(list(pairwise(map_rows(done.stdout, "Visual scores")))) == 3
