"""Questions about images: scenes with their truth, public benchmarks from local copies, prompts, metrics."""

import importlib.util
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from keeprate.tasks import scenes, vqa, words

TEMPLATE = (
    "<s>{% for m in messages %}[{{ m['role'] }}] {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} [assistant]{% endif %}"
)


def processor(template: str | None = None, bos: bool = False) -> LlavaProcessor:
    """LLaVA's processor with one token per byte and four visual tokens of 8x8 pixels."""
    special = ["<pad>", "<s>", "<image>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def picture(i: int) -> Image.Image:
    return Image.fromarray(np.full((20, 30, 3), 10 * i, np.uint8))


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> dict[str, str]:
    """POPE written by save_to_disk, GQA and TextVQA as folders of parquet files, with the columns of the hub's."""
    folder = tmp_path_factory.mktemp("benchmarks")
    image, strings = datasets.Image(), datasets.List(datasets.Value("string"))
    columns = {
        "question_id": [str(i) for i in range(6)],
        "question": [f"Is there a {i} in the image?" for i in range(6)],
        "answer": ["yes", "no"] * 3,
        "image_source": ["COCO"] * 6,
        "image": [picture(i) for i in range(6)],
        "category": ["adversarial", "adversarial", "popular", "popular", "random", "random"],
    }
    pope = datasets.Dataset.from_dict(columns).cast_column("image", image)
    datasets.DatasetDict({"test": pope}).save_to_disk(str(folder / "pope"))

    asked = {
        "id": [f"q{i}" for i in range(5)],
        "imageId": ["n2", "n0", "n2", "n1", "n0"],
        "question": [f"What is {i}?" for i in range(5)],
        "answer": ["table", "red", "left", "yes", "chair"],
        "types": [{"semantic": "obj", "structural": k} for k in ("query", "query", "choose", "verify", "query")],
    }
    seen = {"id": ["n0", "n1", "n2"], "image": [picture(i) for i in range(3)]}
    parts = {"instructions": datasets.Dataset.from_dict(asked)}
    parts["images"] = datasets.Dataset.from_dict(seen).cast_column("image", image)
    for name, data in parts.items():
        path = folder / "gqa" / f"testdev_balanced_{name}" / "testdev-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        data.to_parquet(str(path))

    read = {
        "question_id": list(range(3)),
        "question": [" what is written? "] * 3,
        "image": [picture(i) for i in range(3)],
        "answers": [["stop"] * 4 + ["stop sign"] * 6, ["exit"] * 10, ["7"] * 10],
        "ocr_tokens": [["STOP", "ALL"], ["EXIT"], []],
    }
    text = datasets.Dataset.from_dict(read).cast_column("image", image).cast_column("answers", strings)
    (folder / "textvqa" / "data").mkdir(parents=True)
    text.to_parquet(str(folder / "textvqa" / "data" / "validation-00000-of-00001.parquet"))
    hidden = text.remove_columns("answers").add_column("answers", [[""] * 10] * 3)
    hidden.to_parquet(str(folder / "textvqa" / "data" / "test-00000-of-00001.parquet"))
    return {name: str(folder / name) for name in ("pope", "gqa", "textvqa")}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Nothing is written into the user's own cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def local(benchmarks, monkeypatch):
    """The benchmarks under their own names, taken from here instead of the hub."""
    for name, known in vqa.PUBLIC.items():
        monkeypatch.setitem(
            vqa.PUBLIC, name, vqa.Public(benchmarks[name], known.config, known.split, known.metric, known.files)
        )


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_scenes_come_with_their_truth():
    task = vqa.vqa("llava-digits", n=12, seed=3, kinds=("place", "gist", "read"))
    drawn = scenes.sample(12, 3, "test", ("place", "gist", "read"))
    assert task.questions == drawn.questions and task.answers == [(a,) for a in drawn.answers]
    assert task.kinds == ["place", "gist", "read"] * 4 and task.metric == "exact" and len(task) == 12
    assert torch.equal(task.truth, drawn.truth) and torch.equal(task.local, drawn.local)
    (image,) = task.images[5]
    assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), drawn.pixels[5])
    assert task.score(drawn.answers).all()
    assert not task.score(["banana"] * 12).any()
    assert vqa.vqa("scenes", n=3).questions == vqa.vqa("llava-digits", n=3).questions
    assert vqa.vqa(n=3).split == "test" and vqa.vqa(n=3, split="train").questions != vqa.vqa(n=3).questions


def test_the_truth_follows_the_models_grid():
    task = vqa.vqa(n=8)
    assert task.truth_on(144) is task.truth
    fine, coarse = task.truth_on(576).view(8, 24, 24), task.truth_on(36).view(8, 6, 6)
    square = task.truth.view(8, 12, 12)
    for y, x in ((3, 8), (11, 0), (6, 5)):
        assert torch.equal(fine[:, 2 * y, 2 * x + 1], square[:, y, x])
        block = square[:, y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2]
        assert torch.equal(coarse[:, y // 2, x // 2], block.flatten(1).any(1))
    for odd in (100, 143):
        with pytest.raises(ValueError, match=f"12x12 patches; {odd} visual tokens"):
            task.truth_on(odd)


# --- public data ------------------------------------------------------------------------------------------------------


def test_pope(local):
    task = vqa.vqa("pope", n=6)
    assert task.metric == "yesno" and task.split == "test" and task.truth is None and task.truth_on(576) is None
    assert sorted(task.questions) == [f"Is there a {i} in the image?" for i in range(6)]
    for i, question in enumerate(task.questions):
        number = int(question.split()[3])
        assert task.answers[i] == (("yes", "no")[number % 2],)
        assert task.kinds[i] == ("adversarial", "popular", "random")[number // 2]
        assert np.array(task.images[i][0].convert("RGB"))[0, 0, 0] == 10 * number
    said = ["Yes, there is." if answer == ("yes",) else "No" for answer in task.answers]
    assert task.score(said).all() and not task.score(list(reversed(said)), [0, 1, 2, 3, 4, 5]).all()
    some = vqa.vqa("pope", n=2, kinds=("popular",))
    assert some.kinds == ["popular"] * 2
    assert vqa.vqa("pope", n=3, seed=1).questions == vqa.vqa("pope", n=3, seed=1).questions
    assert len({tuple(vqa.vqa("pope", n=6, seed=seed).questions) for seed in range(4)}) > 1


def test_gqa_finds_its_images(local):
    task = vqa.vqa("gqa", n=5)
    order = [int(q[8]) for q in task.questions]
    assert sorted(order) == list(range(5)) and task.metric == "exact"
    shown = [np.array(images[0].convert("RGB"))[0, 0, 0] // 10 for images in task.images]
    assert shown == [(2, 0, 2, 1, 0)[i] for i in order]
    assert task.kinds == [("query", "query", "choose", "verify", "query")[i] for i in order]
    assert task.score([a[0].title() + "." for a in task.answers]).all()


def test_textvqa_and_its_ocr(local):
    task = vqa.vqa("textvqa", n=3)
    assert task.metric == "vqa" and set(task.questions) == {"what is written?"} and task.split == "validation"
    at = task.answers.index(tuple(["stop"] * 4 + ["stop sign"] * 6))
    said = ["nothing"] * 3
    said[at] = "Stop"
    assert task.score(said)[at] == 1.0 and task.score(said).sum() == 1.0
    with_words = vqa.vqa("textvqa", n=3, ocr=True)
    assert "what is written?\nReference OCR token: STOP, ALL" in with_words.questions
    with pytest.raises(ValueError, match="ocr_tokens"):
        vqa.vqa("pope", n=1, ocr=True)
    with pytest.raises(ValueError, match=r"split='test' .* without an answer"):
        vqa.vqa("textvqa", split="test", n=1)


def test_other_data_of_the_same_columns(benchmarks, tmp_path):
    assert vqa.vqa(benchmarks["pope"], n=2).metric == "yesno"
    assert vqa.vqa(benchmarks["textvqa"], split="validation", n=2).metric == "vqa"
    both = vqa.vqa(f"{benchmarks['gqa']}:testdev_balanced_instructions", split="testdev", n=5)
    assert both.metric == "exact" and both.suffix == vqa.SHORT
    pairs = [[picture(i), picture(i + 1)] for i in range(2)]
    columns = {"images": pairs, "question": ["Same?", "Other?"], "answer": ["same", "other"]}
    data = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    data.save_to_disk(str(tmp_path / "pairs"))
    task = vqa.vqa(str(tmp_path / "pairs"), n=2)
    assert [len(images) for images in task.images] == [2, 2] and task.kinds == ["all"] * 2
    batch = next(task.batches(SimpleNamespace(processor=processor()), 2))
    assert batch.inputs["pixel_values"].shape == (4, 3, 16, 16)
    assert (batch.inputs["input_ids"] == 2).sum(1).tolist() == [8, 8]


def test_what_does_not_fit_is_refused(local, tmp_path):
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*'scenes', 'pope'"):
        vqa.vqa("nobody/nothing", n=1)
    with pytest.raises(ValueError, match=r"'dev'.*splits: test"):
        vqa.vqa("pope", split="dev", n=1)
    with pytest.raises(ValueError, match="allowed: 1 to 6"):
        vqa.vqa("pope", n=7)
    with pytest.raises(ValueError, match="allowed: 1 to 2"):
        vqa.vqa("pope", n=3, kinds=("random",))
    with pytest.raises(ValueError, match="'adversarial', 'popular', 'random'; got 'rare'"):
        vqa.vqa("pope", n=1, kinds=("rare",))
    with pytest.raises(ValueError, match="metric must be one of"):
        vqa.vqa("pope", n=1, metric="bleu")
    for wrong in ({"n": 0}, {"split": "dev"}, {"kinds": ["rare"]}, {"metric": "vqa"}, {"ocr": True}):
        with pytest.raises(ValueError, match=str(*wrong.values()).strip("[]")):
            vqa.vqa("llava-digits", **({"n": 2} | wrong))
    datasets.Dataset.from_dict({"question": ["?"], "answer": ["!"]}).save_to_disk(str(tmp_path / "blind"))
    with pytest.raises(ValueError, match="columns question, answer; needed"):
        vqa.vqa(str(tmp_path / "blind"), n=1)
    columns = {"image": ["a"], "question": ["?"], "answer": ["!"]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "words"))
    with pytest.raises(ValueError, match=r"column 'image'.*needed: images"):
        vqa.vqa(str(tmp_path / "words"), n=1)
    with pytest.raises(ValueError, match="1 answers to 2 questions"):
        vqa.vqa(n=2).score(["yes"])


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left():
    task, loaded = vqa.vqa(n=5), SimpleNamespace(processor=processor())
    batches = list(task.batches(loaded, 3))
    assert [list(b.rows) for b in batches] == [[0, 1, 2], [3, 4]] and [len(b) for b in batches] == [3, 2]
    for batch in batches:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert (ids == 2).sum(1).tolist() == [4] * len(batch)
        assert torch.equal(mask == 0, ids == 0) and bool(mask[:, -1].all())
        for row, line, there in zip(batch.rows, ids, mask, strict=True):
            read = loaded.processor.tokenizer.decode(line[there.bool()]).replace("<image>", "")
            assert read == f"USER: \n{task.questions[row]} ASSISTANT:"
    assert loaded.processor.tokenizer.padding_side == "right", "the user's processor stays as it was"


def test_chat_template_goes_around(local):
    task = vqa.vqa("pope", n=2)
    for bos in (False, True):  # whether the tokenizer would write a first token of its own
        made = processor(TEMPLATE, bos)
        ids = next(task.batches(SimpleNamespace(processor=made), 2)).inputs["input_ids"][0]
        read = made.tokenizer.decode(ids[ids != 0]).replace("<image>", "")
        assert read == f"<s>[user] {task.questions[0]}\n{vqa.SHORT} [assistant]"
    ids = next(task.batches(SimpleNamespace(processor=processor(bos=True)), 1)).inputs["input_ids"][0]
    assert ids[0] == 1 and (ids == 1).sum() == 1


def test_batches_need_a_processor_for_both():
    with pytest.raises(ValueError, match=r"PreTrainedTokenizerFast|TokenizersBackend"):
        next(vqa.vqa(n=2).batches(SimpleNamespace(processor=processor().tokenizer)))
    with pytest.raises(ValueError, match="batch_size"):
        next(vqa.vqa(n=2).batches(SimpleNamespace(processor=processor()), 0))


def test_inputs_take_the_models_precision():
    batch = next(vqa.vqa(n=2).batches(SimpleNamespace(processor=processor()), 2))
    moved = batch.to(torch.nn.Linear(1, 1, dtype=torch.bfloat16))
    assert moved["pixel_values"].dtype == torch.bfloat16 and moved["input_ids"].dtype == torch.int64


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True), ("yes, there is no doubt", False), ("No", False), ("no.", False), ("Yes. No cat though.", True),
        ("There is not a cat", False), ("", True), ("nothing", True), ("not, really", False),
    ],
)  # fmt: skip
def test_popes_reading(text, yes):
    assert words.says_yes(text) == yes


def test_vqa_accuracy_leaves_each_person_out():
    def told(matching: int) -> float:
        return float(words.score("vqa", ["red"], [["red"] * matching + ["blue"] * (10 - matching)])[0])

    # k of ten agree: k times min(1, (k - 1) / 3) and 10 - k times min(1, k / 3), over ten
    expected = [0.0, 0.3, 0.6, 0.9, *[1.0] * 7]
    assert np.allclose([told(k) for k in range(11)], expected)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("The Dog", "dog"), ("two", "2"), ("None", "0"), ("dont", "don't"), ("3.5 m", "3.5 m"), ("St. Paul", "st paul"),
        ("1,000", "1000"), ("black-white", "black white"), ("black - white", "black white"), ("it's\n", "it 's"),
        ("what?", "what"), ("an apple", "apple"),
    ],
)  # fmt: skip
def test_answers_are_cleaned_as_the_server_does(text, cleaned):
    assert words.clean(text).split() == cleaned.split()


def test_exact_answers():
    right = words.score("exact", ["Red.", "red ", "reddish", "4  2"], [["red"], ["blue", "red"], ["red"], ["4 2"]])
    assert right.tolist() == [True, True, False, True] and right.dtype == torch.bool
    with pytest.raises(ValueError, match="'exact', 'yesno', 'vqa'"):
        words.score("bleu", [], [])
    with pytest.raises(ValueError, match="1 answers to 0"):
        words.score("exact", ["a"], [])


def test_scenes_do_without_the_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails now
    spec = importlib.util.spec_from_file_location("vqa_elsewhere", vqa.__file__)
    elsewhere = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, elsewhere)
    spec.loader.exec_module(elsewhere)
    assert len(elsewhere.vqa(n=2).images[0]) == 1
    with pytest.raises(ImportError, match="datasets"):
        elsewhere.vqa("pope", n=2)
