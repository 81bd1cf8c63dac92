"""Scenes: questions are answered by what was drawn, the truth is where it was drawn, and the splits share nothing."""

import re

import numpy as np
import pytest
import torch

from keeprate.tasks import digits, scenes
from keeprate.tasks.scenes import BACKGROUNDS, CLASSES, COLOURS, DIGITS, KINDS, MOST_DIGITS, PLACES


@pytest.fixture(scope="module")
def drawn():
    return scenes.draw(np.random.default_rng(5), 96)


@pytest.fixture(scope="module")
def sample():
    return scenes.sample(160, seed=3)


def items(drawn, i):
    """What is in scene i: (class, place, colour or None, patches), slot by slot."""
    columns = zip(drawn.classes[i], drawn.cells[i], drawn.colours[i], drawn.patches[i], strict=True)
    return [
        (CLASSES[c], PLACES[p], None if x < 0 else tuple(COLOURS)[x], patches) for c, p, x, patches in columns if c >= 0
    ]


def test_shapes_and_contents(drawn):
    n = len(drawn)
    assert drawn.pixels.shape == (n, 3, 96, 96) and drawn.pixels.dtype == torch.uint8
    filled = drawn.classes >= 0
    assert torch.equal(filled, drawn.cells >= 0)
    assert torch.equal(drawn.colours >= 0, filled & (torch.arange(7) < MOST_DIGITS))
    assert (drawn.classes[:, :MOST_DIGITS] < len(DIGITS)).all()
    photos = drawn.classes[:, MOST_DIGITS:]
    assert ((photos >= len(DIGITS)) | (photos == -1)).all()
    assert torch.equal(drawn.patches.any(-1), filled)
    for column in (drawn.classes, drawn.cells):  # nothing twice
        assert all(len(row[row >= 0].unique()) == (row >= 0).sum() for row in column)
    assert set(drawn.classes[filled].tolist()) == set(range(len(CLASSES)))
    assert set(drawn.cells[filled].tolist()) == set(range(len(PLACES)))
    assert set(drawn.background.tolist()) == set(range(len(BACKGROUNDS)))


def test_truth_is_where_the_picture_changes():
    """Scenes from one state of chance, with and without background: what differs from black is what was drawn."""
    dark = scenes.draw(np.random.default_rng(1), 40, clutter=0.0)
    ink = dark.pixels.amax(1).float().unfold(1, 8, 8).unfold(2, 8, 8)  # n 12 12 8 8
    lit = (ink > 60).float().mean((-1, -2)).flatten(1)
    truth = dark.patches.any(1)
    assert (lit[dark.patches[:, :MOST_DIGITS].any(1)] > 0.1).all()
    assert (lit[~truth] < 0.3).all()
    assert (ink.amax((-1, -2)).flatten(1)[truth] > 8).all()  # photographs have dark corners
    light = scenes.draw(np.random.default_rng(1), 40)
    assert torch.equal(light.patches, dark.patches)
    assert light.pixels.float().mean() > dark.pixels.float().mean()


def test_an_item_lies_on_its_place_and_apart_from_the_others(drawn):
    """Its patches' middle is within a patch of its place, and no patch belongs to two items but at a shared edge."""
    centre = (torch.stack([torch.arange(144) // 12, torch.arange(144) % 12], -1) + 0.5) / 3
    for i in range(len(drawn)):
        for _, place, _, patches in items(drawn, i):
            y, x = centre[patches].mean(0).tolist()
            column, row = "abcd".index(place[0]), int(place[1]) - 1
            assert -0.34 <= y - row <= 1.34 and -0.34 <= x - column <= 1.34
    shared = drawn.patches.sum(1) > 1
    assert shared.float().mean() < 0.01


def test_half_of_the_scenes_are_off_the_grid():
    drawn = scenes.draw(np.random.default_rng(2), 400)
    filled = drawn.cells >= 0
    middle = torch.stack([drawn.cells // 4, drawn.cells % 4], -1) * 3 + 1
    inside = drawn.patches[filled].gather(1, (middle[..., 0] * 12 + middle[..., 1])[filled][:, None])[:, 0]
    assert inside.float().mean() > 0.8  # the patch in the middle of the place nearly always holds some of it
    y = (drawn.patches.view(400, 7, 12, 12).any(3).int().argmax(2) - (middle[..., 0] - 1))[filled]
    assert set(y.unique().tolist()) >= {-1, 0, 1}  # begins above, with or below its place


def check(question, answer, truth, local, drawn, i):
    """Answer a question from the list of what was drawn."""
    there = items(drawn, i)
    word = question.split()[-1]
    none = torch.zeros(144, dtype=torch.bool)

    def union(some):
        return torch.stack([none, *(patches for *_, patches in some)]).any(0)

    if question.startswith("is there a"):
        hit = [item for item in there if item[0] == word]
        assert answer == ("yes" if hit else "no") and local == bool(hit)
        needed = union(hit)
    elif question.startswith("what is at"):
        (hit,) = [item for item in there if item[1] == word]
        assert answer == hit[0]
        needed = hit[3]
    elif question.startswith("where is the"):
        (hit,) = [item for item in there if item[0] == word]
        assert answer == hit[1]
        needed = hit[3]
    elif question.startswith("what colour"):
        (hit,) = [item for item in there if item[0] == word]
        assert answer == hit[2]
        needed = hit[3]
    elif question.startswith("how many"):
        hits = [item for item in there if (item[0] in DIGITS) == (word == "digits")]
        assert answer == str(len(hits))
        needed = union(hits)
    elif question == "which digit is largest":
        hits = [item for item in there if item[0] in DIGITS]
        assert answer == max(item[0] for item in hits)
        needed = union(hits)
    elif question.startswith("read row"):
        hits = sorted((item for item in there if item[0] in DIGITS and item[1][1] == word), key=lambda item: item[1])
        assert len(hits) > 1 and answer == " ".join(item[0] for item in hits)
        needed = union(hits)
    else:
        assert question == "what is the background" and answer == BACKGROUNDS[drawn.background[i]]
        assert not local
        needed = none
    assert torch.equal(truth, needed)
    assert local == bool(truth.any())


def test_every_answer_and_truth_follows_from_the_scene(sample):
    assert sample.kinds == [KINDS[i % 8] for i in range(160)]
    for i in range(len(sample)):
        check(sample.questions[i], sample.answers[i], sample.truth[i], sample.local[i].item(), sample.drawn, i)


def test_questions_about_one_scene(drawn):
    rows = torch.arange(8).repeat_interleave(6)
    kinds = ["where", "count", "colour"] * 16
    asked = scenes.ask_each(np.random.default_rng(0), drawn, kinds, rows)
    assert len({asked.questions[i] for i in range(6)}) > 2
    for i, row in enumerate(rows.tolist()):
        check(asked.questions[i], asked.answers[i], asked.truth[i], asked.local[i].item(), drawn, row)


def test_captions_name_everything_and_nothing_else(drawn):
    for i, caption in enumerate(scenes.captions(drawn)):
        body, ground = caption.split(" on ")
        assert ground == BACKGROUNDS[drawn.background[i]]
        said = sorted(body.split(" and "))
        meant = sorted(f"a {c + ' ' if c else ''}{name} at {place}" for name, place, c, _ in items(drawn, i))
        assert said == meant


def test_presence_cannot_be_told_from_the_question():
    sample = scenes.sample(1500, seed=1, kinds=("presence",))
    yes = np.array([answer == "yes" for answer in sample.answers])
    digit = np.array([question[-1] in "0123456789" for question in sample.questions])
    assert abs(yes.mean() - 0.5) < 0.05
    assert abs(yes[digit].mean() - yes[~digit].mean()) < 0.09


def test_counts_cover_one_to_four_digits_and_one_to_three_photographs():
    sample = scenes.sample(800, seed=2, kinds=("count",))
    found = {
        word: {a for q, a in zip(sample.questions, sample.answers, strict=True) if q.endswith(word)}
        for word in ("digits", "photos")
    }
    assert found == {"digits": set("1234"), "photos": set("123")}


def test_splits_show_other_people_coins_and_grounds():
    for split, other in (("train", "test"), ("test", "train")):
        bank, which = scenes.thumbnails(split)
        foreign, _ = scenes.thumbnails(other)
        for name in ("face", "coin", "page"):
            kind = scenes.PHOTOS.index(name)
            far = torch.cdist(bank[which == kind].flatten(1), foreign[which == kind].flatten(1))
            assert far.min() > 1.0
    train, test = (scenes._grounds(split) for split in digits.SPLITS)
    assert (train.height * train.width > test.height * test.width).all()


def test_backgrounds_are_dim_and_differ_in_kind():
    which = torch.arange(8).repeat(30)
    made = scenes.backgrounds(np.random.default_rng(0), which, "test")
    luma = torch.einsum("nchw,c->n", made, scenes.LUMA) / 96**2
    assert luma.max() < scenes.BRIGHTNESS[1] + 0.01
    assert made.std((2, 3)).min() > 0.001
    assert not torch.equal(made[0], made[8])


def test_same_seed_same_sample_and_splits_differ():
    one, again = (scenes.sample(10, seed=4) for _ in range(2))
    assert torch.equal(one.pixels, again.pixels) and one.questions == again.questions
    assert not torch.equal(one.pixels, scenes.sample(10, seed=5).pixels)
    assert not torch.equal(one.pixels, scenes.sample(10, seed=4, split="train").pixels)


def test_vocabulary_is_closed(sample):
    words = {word for line in sample.questions + sample.answers + sample.captions for word in line.split()}
    assert all(re.fullmatch(r"[a-z0-9]+", word) for word in words)
    assert len(words) <= 80


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n must be an integer of at least 1; got 0"),
        ({"n": 4, "split": "dev"}, "split must be one of 'train', 'test'; got 'dev'"),
        ({"n": 4, "kinds": ("wher",)}, "kind must be one of 'presence'.*got 'wher'"),
        ({"n": 4, "kinds": ()}, r"kinds=\(\); allowed: a sequence of presence"),
        ({"n": 4, "kinds": "where"}, "kinds='where'; allowed: a sequence of presence"),
    ],
)
def test_bad_sample(given, message):
    with pytest.raises(ValueError, match=message):
        scenes.sample(**given)


def test_bad_scenes_and_questions(drawn):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"clutter must .* got 1.5"):
        scenes.draw(rng, 4, clutter=1.5)
    with pytest.raises(ValueError, match=r"row must be bool \[4\]; got torch.bool \(3,\)"):
        scenes.draw(rng, 4, row=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 kinds for 96 questions; allowed: one each"):
        scenes.ask_each(rng, drawn, ["where", "where"])
    unreadable = (~drawn.rows.any(1)).nonzero()[:, 0]
    with pytest.raises(ValueError, match=f"no row with two digits in {len(unreadable)} of {len(unreadable)} scenes"):
        scenes.ask(rng, drawn, "read", unreadable)
