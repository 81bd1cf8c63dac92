"""Figures show what they are given; methods stay apart; widgets fall back to a picture."""

from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import transformers as tf

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text

import keeprate as kr
from keeprate import plot
from keeprate.models import Loaded
from keeprate.plot import widget


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    processor = tf.ViTImageProcessorPil(size={"height": 32, "width": 32})
    return Loaded("tiny", tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=32, patch_size=8)), processor)


class Images:
    """Five noise images."""

    def batches(self, loaded, batch_size):
        pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        truth = torch.arange(16).expand(5, -1) < 3
        yield {"pixel_values": pixels[:batch_size], "labels": torch.zeros(5).long(), "truth": truth[:batch_size]}


@pytest.fixture
def table():
    names = [*plot.look.ORDER["vit"], "Random", "Radial"]
    rows = [(n, k, 0.9 + 0.001 * i * k) for i, n in enumerate(names) for k in (0.25, 0.5, 0.9)]
    df = pd.DataFrame(rows, columns=["method", "keep", "accuracy"])
    return df.assign(low=df["accuracy"] - 0.01, high=df["accuracy"] + 0.02)


@pytest.mark.parametrize("family", plot.look.ORDER)
def test_every_method_has_a_look_of_its_own(family):
    assert len(kr.methods(family)), "the order of a family that exists"
    names = kr.methods(family)["name"]
    assert not set(names) - {*plot.look.ORDER[family], *plot.look.BASELINES}, "a place in plot.look.ORDER is missing"
    looks = {(plot.colour(n), plot.dashes(n)) for n in names}
    assert len(looks) == len(names)
    assert len({(plot.colour(n), plot.marker(n)) for n in names}) == len(names)
    assert plot.colour("TopK(keep=0.5)") == plot.colour("TopK") != plot.colour("Random") == plot.look.GREY


def texts(ax):
    return {t.get_text(): t for t in ax.texts}


def test_curve_labels_do_not_overlap(table):
    ax = plot.curve(
        table, "keep", "accuracy", low="low", high="high", dense=0.95, paper=0.94, ylabel="accuracy (share)"
    )
    labels = texts(ax)
    assert set(labels) == {*table["method"], "dense", "paper"} and ax.get_ylabel() == "accuracy (share)"
    ax.figure.canvas.draw()
    # the text's own box, without the connecting line
    boxes = sorted((matplotlib.text.Text.get_window_extent(t) for t in labels.values()), key=lambda b: b.y0)
    assert all(low.y1 <= high.y0 + 2 for low, high in pairwise(boxes))
    assert labels["TopK"].get_color() == plot.colour("TopK")


def test_curve_draws_the_interval_and_the_reference_lines(table):
    few = table[table["method"].isin(["TopK", "ToMe"])]
    ax = plot.curve(few, "keep", "accuracy", low="low", high="high", dense=0.95, paper=0.94)
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.89, abs=0.002) and band.max() == pytest.approx(0.92, abs=0.003)
    flat = {line.get_ydata()[0]: line.get_linestyle() for line in ax.lines if len(set(line.get_ydata())) == 1}
    assert flat[0.95] == "--" and flat[0.94] == ":"
    with pytest.raises(ValueError, match="no column 'lo'; it has method, keep"):
        plot.curve(few, "keep", "accuracy", low="lo")


def test_bars_are_sorted_with_intervals(table):
    last = table[table["keep"] == 0.9]
    ax = plot.bars(last, "accuracy", low="low", high="high", reference=0.5, xlabel="AUROC")
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == sorted(last["accuracy"]) and ax.get_xlabel() == "AUROC"
    assert ax.get_yticklabels()[-1].get_text() == "Radial"
    segments = ax.collections[0].get_segments()
    assert segments[0][1][0] - segments[0][0][0] == pytest.approx(0.03)


def test_numbers_of_bars_stand_outside_and_no_interval_is_drawn_without_width():
    df = pd.DataFrame({"method": ["a", "b"], "gain": [-0.3, 0.2], "low": [-0.4, 0.2], "high": [-0.1, 0.2]})
    ax = plot.bars(df, "gain", low="low", high="high")
    assert [(text.xy[0], text.get_ha()) for text in ax.texts] == [(-0.4, "right"), (0.2, "left")]
    assert len(ax.collections[0].get_segments()) == 1


def test_names_of_a_scatter_cover_each_other_nowhere():
    rng = np.random.default_rng(0)
    names = [f"Method{i}" for i in range(14)]
    df = pd.DataFrame({"method": names, "ms": 10 + rng.random(14), "accuracy": rng.random(14) / 20})
    df.loc[3, "ms"] = 30  # the rest crowd at the left
    ax = plot.scatter(
        pd.concat([df, pd.DataFrame({"method": ["none"], "ms": [np.nan], "accuracy": [0.5]})]), "ms", "accuracy"
    )
    assert [text.get_text() for text in sorted(ax.texts, key=lambda t: names.index(t.get_text()))] == names
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the lines to the dots
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert ax.get_xlabel() == "ms" and len(ax.collections[0].get_offsets()) == 14
    with pytest.raises(ValueError, match="seconds"):
        plot.scatter(df, "seconds", "accuracy")


def test_matrix():
    df = pd.DataFrame([[1, 0.25], [0.25, 1]], index=["a", "b"], columns=["a", "b"])
    assert [t.get_text() for t in plot.matrix(df).texts] == ["1.00", "0.25", "0.25", "1.00"]


def shown(ax):
    return np.asarray(ax.get_images()[0].get_array())


def test_overlay_fades_dropped_and_averages_merged():
    image = np.zeros((8, 8, 3))
    image[:4, :4], image[:4, 4:], image[4:, :4] = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    kept = shown(plot.overlay(image, torch.tensor([True, False, True, False]), (2, 2)))
    assert (kept[:4, :4] == image[:4, :4]).all() and (kept[4:, :4] == image[4:, :4]).all()
    assert kept[:4, 4:].min() >= 0.85 and kept[4:, 4:].min() >= 0.85
    ax = plot.overlay(image, torch.tensor([0, 0, 1, -1]), (2, 2))
    merged = shown(ax)
    assert np.allclose(merged[:4], (0.5, 0.5, 0)) and (merged[4:, :4] == (0, 0, 1)).all()
    assert (merged[4:, 4:] == 0.85).all()
    assert len(ax.collections[0].get_segments()) == 3  # no line inside the cluster


def test_overlay_of_an_image_that_the_grid_does_not_divide():
    image = torch.rand(3, 10, 7)
    ax = plot.overlay(image, torch.arange(6).flip(0) < 3, (3, 2))
    assert shown(ax).shape == (10, 7, 3)
    with pytest.raises(ValueError, match="3 x 2 has 6 patches; got 5"):
        plot.overlay(image, torch.ones(5, dtype=torch.bool), (3, 2))
    with pytest.raises(ValueError, match=r"\(10, 7\)"):
        plot.overlay(image[0], torch.ones(6, dtype=torch.bool), (3, 2))


def test_pictures_undo_the_processor(vit):
    image = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    pixels = vit.processor(image, return_tensors="pt")["pixel_values"]
    assert np.allclose(plot.pictures(vit.processor, pixels)[0], image / 255, atol=1e-6)


def test_overlays_rows_are_methods_or_layers(vit):
    batch = next(Images().batches(vit, 3))
    traces = {}
    for method in (kr.vit.TopK(keep=0.5), kr.vit.EViT(keep=0.5), kr.vit.ToMe(r=3)):
        with method(vit.model) as traces[method.name], torch.no_grad():
            vit.model(batch["pixel_values"])
    images = plot.pictures(vit.processor, batch["pixel_values"])
    figure = plot.overlays(images, traces, truth=batch["truth"])
    assert [ax.get_ylabel().split("\n")[0] for ax in figure.axes[::3]] == ["image", "truth", "TopK", "EViT", "ToMe"]
    rows = plot.overlays(images, traces["TopK"]).axes[::3]
    assert [ax.get_ylabel() for ax in rows] == ["image", "block 2\n8 tokens", "block 3\n4 tokens", "block 4\n2 tokens"]
    # patches in EViT's fused tokens show as dropped
    assert torch.equal(plot.clusters(traces["EViT"]) >= 0, traces["EViT"].mask())
    assert (plot.clusters(traces["ToMe"]) >= 0).all()
    with pytest.raises(ValueError, match="nothing to show"):
        plot.overlays(images, {})


def test_heat_leaves_absent_patches_grey():
    ax = plot.heat(torch.tensor([0.1, float("nan"), 0.3, 0.2]), np.ones((8, 8, 3)), (2, 2))
    over = ax.get_images()[1].get_array()
    assert over.mask[:4, 4:].all() and over.mask.sum() == 16 and over[0, 0] == pytest.approx(0.1)


def test_explore_is_a_picture_in_a_batch_run(vit, monkeypatch):
    monkeypatch.setenv("KEEPRATE_RUN_DIR", "somewhere")
    figure = plot.explore(vit, Images(), {"A": lambda keep: kr.vit.TopK(keep=keep)}, samples=4)
    assert isinstance(figure, plt.Figure) and len(figure.axes) == 3 * 4


def test_explore_sliders_move(vit, monkeypatch):
    monkeypatch.setattr(widget, "_live", lambda: True)
    drawn = []
    monkeypatch.setattr("IPython.display.display", drawn.append)
    methods = {"TopK": lambda keep: kr.vit.TopK(keep=keep), "ToMe": lambda keep: kr.vit.ToMe(keep=keep)}
    box = plot.explore(vit, Images(), methods, samples=4)
    name, keep, reduction, sample = box.children[0].children
    assert name.options == ("TopK", "ToMe") and (reduction.options[-1], sample.options[-1]) == (3, 3)
    assert keep.value == 0.5 and keep.options == widget.KEEPS and reduction.value == 3
    titles = lambda: drawn[-1].axes[1].get_title()  # noqa: E731
    reduction.value = 1
    assert titles() == "TopK, block 2: 8 tokens"
    keep.value, name.value, sample.value = 0.25, "ToMe", 2
    assert titles() == "ToMe, block 2: 4 tokens"


def test_explore_questions_about_images(monkeypatch):
    vlm, asked = kr.load("llava-digits"), kr.vqa("scenes", n=3, seed=1)
    methods = {
        "grid": lambda keep: kr.mllm.UniformGrid(keep=keep),
        "FastV": lambda keep: kr.mllm.FastV(keep=keep, layer=2),
    }
    figure = plot.explore(vlm, asked, methods, keep=0.25, samples=2)
    assert isinstance(figure, plt.Figure) and len(figure.axes) == 4 * 2  # image, truth, two methods
    assert [ax.get_title() for ax in figure.axes[:2]] == [question[:26] for question in asked.questions[:2]]
    monkeypatch.setattr(widget, "_live", lambda: True)
    drawn = []
    monkeypatch.setattr("IPython.display.display", drawn.append)
    box = plot.explore(vlm, asked, methods, keep=0.25, samples=2)
    name, keep, _, sample = box.children[0].children
    assert drawn[-1].axes[1].get_title() == "grid, block 0: 36 tokens"
    assert asked.questions[0][:34] in drawn[-1].axes[0].get_title()
    name.value, sample.value = "FastV", 1
    assert drawn[-1].axes[1].get_title() == "FastV, block 2: 36 tokens"
    assert f"right: {asked.answers[1][0]}" in drawn[-1].axes[0].get_title()
    keep.value = 1.0 if 1.0 in keep.options else keep.options[-1]
    assert "136 tokens" in drawn[-1].axes[1].get_title()


def test_sliders_are_a_picture_in_a_batch_run():
    def draw(**values):
        seen.append(values)
        return plt.figure()

    seen = []
    plt.close("all")
    assert isinstance(plot.sliders(draw, method=["b", "a"], keep=(0.5, 0.25)), plt.Figure)
    assert seen == [{"method": "b", "keep": 0.5}]
    assert not plt.get_fignums()  # an open one would be shown a second time
    with pytest.raises(ValueError, match="keep has none"):
        plot.sliders(draw, method=["b"], keep=[])


def test_same_figure_same_file(table, tmp_path):
    plot.style()
    for name in ("a", "b"):
        figure = plot.curve(table, "keep", "accuracy").figure
        figure.savefig(tmp_path / f"{name}.svg", metadata={"Date": None})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    matplotlib.rcdefaults()


# --- text ------------------------------------------------------------------------------------------------------------

WORDS = ["The", " code", " of", " kiwi", " is", " 4", "7", "1", ".", "\n", "<b>"]
SHARES = np.linspace(0, 1, len(WORDS))
TRUTH = np.arange(len(WORDS)) % 4 == 3


def test_token_text_shades_every_character_and_outlines_the_answer():
    width = 12  # cuts words in two
    ax = plot.token_text(WORDS, SHARES, TRUTH, "kept", width=width)
    plain, outlined = ax.collections
    boxes = [path.get_extents() for part in (plain, outlined) for path in part.get_paths()]
    assert sum(box.width * box.height for box in boxes) == pytest.approx(len("".join(WORDS)))
    assert all(box.x0 >= 0 and box.x1 <= width for box in boxes)
    cells = sorted((round(box.y0), round(box.x0)) for box in boxes)
    assert len(set(cells)) == len(cells)
    assert sum(p.get_extents().width for p in outlined.get_paths()) == sum(len(w) for w, t in zip(WORDS, TRUTH) if t)  # noqa: B905
    assert plain.get_facecolor()[:, 3].min() == 0 and outlined.get_facecolor()[:, 3].max() > 0.5
    written = "".join(t.get_text() for t in ax.texts)
    assert "↵" in written and written.replace(" ", "") == "".join(WORDS).replace(" ", "").replace("\n", "↵")
    assert ax.get_title(loc="left") == "kept"


def test_token_text_takes_numbers_that_fit():
    with pytest.raises(ValueError, match=r"11 tokens, shares \(3,\)"):
        plot.token_text(WORDS, torch.zeros(3))
    with pytest.raises(ValueError, match=r"\[0, 1\]; got 0 to 2"):
        plot.token_html(WORDS, SHARES * 2)
    with pytest.raises(ValueError, match="nothing to show"):
        plot.token_strips({})
    with pytest.raises(ValueError, match="nothing to show"):
        plot.token_texts(WORDS, {})


def test_token_html_is_escaped_and_tells_the_share():
    page = plot.token_html(WORDS, torch.tensor(SHARES), torch.tensor(TRUTH), "a < b")
    assert page.count("<span") == len(WORDS) and page.count("outline") == TRUTH.sum()
    assert "&lt;b&gt;" in page and "<b>a &lt; b</b>" in page and "token 10: kept by 100%" in page and "↵<br>" in page


def test_token_strips_and_texts_have_a_row_per_method():
    shares = {"SnapKV": SHARES, "H2O": 1 - SHARES}
    ax = plot.token_strips(shares, TRUTH)
    np.testing.assert_allclose(ax.images[0].get_array(), [SHARES, 1 - SHARES])
    assert [t.get_text() for t in ax.get_yticklabels()] == list(shares)
    assert ax.lines[0].get_xdata().tolist() == np.flatnonzero(TRUTH).tolist()
    figure = plot.token_texts(WORDS, shares, TRUTH, width=20)
    assert [ax.get_title(loc="left") for ax in figure.axes] == list(shares)
    figure.canvas.draw()
    top, bottom = (ax.get_window_extent() for ax in figure.axes)
    assert top.y0 >= bottom.y1, "one below the other"


def test_pieces_are_the_text():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert plot.pieces(tokenizer, torch.tensor([0, 1, 0])) == ["a", "b", "a"] == plot.pieces(tokenizer, [0, 1, 0])
