"""Fine-tuning tasks: what is drawn is what the groups say, and the scorer measures what greedy decoding does."""

import copy
import json
import re

import pytest
import torch

from keeprate import load
from keeprate.tasks import docs, finetune


@pytest.fixture(scope="module")
def loaded():
    return load("llama-docs-draft")


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded.processor


@pytest.mark.parametrize("kind", finetune.KINDS)
@pytest.mark.parametrize("split", finetune.SPLITS)
def test_columns_agree(tokenizer, kind, split):
    drawn = finetune.sample(tokenizer, kind, n=40, seed=3, split=split)
    n, _ = drawn.input_ids.shape
    assert n == len(drawn) == 40
    there = drawn.attention_mask == 1
    assert (there.long().diff(dim=1) <= 0).all() and there.any(0).all()  # on the right, and no more than needed
    assert (drawn.input_ids[~there] == tokenizer.pad_token_id).all()
    assert (drawn.input_ids[:, 0] == tokenizer.bos_token_id).all() and (drawn.group[:, 0] == -1).all()
    target = drawn.group >= 0
    assert torch.equal(drawn.labels, drawn.input_ids.where(target, finetune.IGNORED))
    assert not (target & ~there).any() and drawn.group.max() < len(finetune.GROUPS[kind])
    assert drawn.truth.any() and drawn.truth.equal(drawn.group == 1)
    assert (drawn.answer[~target] == -1).all()
    if kind in finetune.NOISE and split != "train":
        assert drawn.share == 1.0
    else:
        assert 0.0 < drawn.share < 1.0


@pytest.mark.parametrize("kind", finetune.KINDS)
def test_the_seed_decides(tokenizer, kind):
    def ids(**options):
        return finetune.sample(tokenizer, kind, n=16, **options).input_ids

    assert torch.equal(ids(seed=1), ids(seed=1))
    assert not torch.equal(ids(seed=1), ids(seed=2))
    assert not torch.equal(ids(seed=1, split="reference"), ids(seed=1, split="test"))


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_a_wrong_sum_is_noisy_and_a_right_one_clean(tokenizer, noise):
    drawn = finetune.sample(tokenizer, "arithmetic", n=400, seed=5, noise=noise)
    number = {word: i for i, word in enumerate(finetune.records.WORDS)}
    clean = []
    for ids, group, answer in zip(drawn.input_ids, drawn.group, drawn.answer, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        found = re.findall(r" (\w+) plus (\w+) is (\w+)\.", text)
        assert "".join(f" {a} plus {b} is {c}." for a, b, c in found) == text and len(found) == 3
        for i, (a, b, c) in enumerate(found):
            part = answer == i
            assert tokenizer.decode(ids[part]) == f" {c}."
            right = number[a] + number[b] == number[c]
            assert (group[part] == int(right)).all()
            clean.append(right)
    share = torch.tensor(clean).float().mean()
    assert abs(share - (1 - noise)) < 4 * (noise * (1 - noise) / 1200) ** 0.5 + 1e-6


def test_a_call_holds_what_was_asked_for(tokenizer):
    drawn = finetune.sample(tokenizer, "tools", n=60, seed=2)
    names = set()
    for ids, group in zip(drawn.input_ids, drawn.group, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        asked, other, item, phrase, name, said, day = re.fullmatch(
            r"User: not (\w+), but (\w+): (.*)\nThought: (.*)\nAction: (\w+)\nInput: item = (\w+), day = (\d)\n", text
        ).group(3, 1, 2, 4, 5, 6, 7)
        forms = [form.format(item=item, day=day) for form in finetune.records.REQUESTS[name]]
        assert asked in forms and said == item != other and phrase in finetune.records.PHRASES
        assert tokenizer.decode(ids[group == 1]) == f" {name} {item} {day}"
        names.add(name)
    assert names == set(finetune.records.REQUESTS)


def test_totals_are_sums_and_notes_are_text_of_the_split(tokenizer):
    drawn = finetune.sample(tokenizer, "numbers", n=30, seed=4)
    value = finetune.digits(tokenizer)
    for ids, group, answer in zip(drawn.input_ids, drawn.group, drawn.answer, strict=True):
        cut = (group == -1).nonzero().flatten()
        prompt = tokenizer.decode(ids[cut], skip_special_tokens=True)
        terms = re.findall(r" (\d\d) and (\d\d), note: total\.", prompt)
        assert len(terms) == 2
        for i, (a, b) in enumerate(terms):
            tens, ones = value[ids[answer == i]].tolist()
            assert 10 * tens + ones == int(a) + int(b)
        notes = ids[group == 0].view(2, -1)
        blocks = finetune.records._text(tokenizer, "train")
        for note in notes:
            assert (blocks.unfold(1, len(note), 1) == note).all(-1).any()


def test_documents_are_text_of_the_split_where_they_are_clean(tokenizer):
    drawn = finetune.sample(tokenizer, "documents", n=200, seed=6)
    assert abs(drawn.share - 0.6) < 0.03
    whole = finetune.sample(tokenizer, "documents", n=200, seed=6, noise=0.0)
    changed = drawn.input_ids != whole.input_ids
    assert not (changed & drawn.truth).any()
    noisy = drawn.group == 0
    assert changed[noisy].float().mean() > 0.95  # a token drawn from anywhere may be the same by chance
    # the same tokens are as frequent in noise as in text
    common = whole.input_ids[:, 1:].flatten().mode().values
    rates = [(drawn.input_ids[part] == common).float().mean() for part in (noisy, drawn.truth)]
    assert abs(rates[0] - rates[1]) < 0.03


def test_splits_share_no_text(tokenizer):
    blocks = {split: finetune.records._text(tokenizer, split) for split in finetune.SPLITS}
    stream = docs.tokens(tokenizer, "test")
    assert sum(len(part) for part in blocks.values()) == len(stream) // finetune.records.BLOCK
    rows = {split: set(map(tuple, part.tolist())) for split, part in blocks.items()}
    assert not rows["train"] & rows["test"] and not rows["train"] & rows["reference"]
    assert not rows["test"] & rows["reference"]


class Scripted(torch.nn.Module):
    """A model that says what it is told, wherever it stands: `said` [n, length] is what it finds likeliest."""

    def __init__(self, said, size, strength=30.0):
        super().__init__()
        self.weight, self.said, self.size, self.strength = torch.nn.Parameter(torch.zeros(1)), said, size, strength

    def forward(self, ids, attention_mask, use_cache):
        following = torch.cat([self.said[:, 1:], self.said[:, :1]], dim=1)
        logits = torch.nn.functional.one_hot(following, self.size) * self.strength
        return type("Output", (), {"logits": logits.float()})


@pytest.mark.parametrize("kind", ["arithmetic", "tools"])
def test_one_wrong_token_costs_its_answer_and_no_other(tokenizer, kind):
    drawn = finetune.sample(tokenizer, kind, n=5, seed=1, split="test")
    said, size = drawn.input_ids.clone(), len(tokenizer)
    perfect = finetune.evaluate(Scripted(said, size), tokenizer, drawn)
    answers = len(perfect.values)
    assert perfect.value == 1.0 and perfect.nll < 1e-6 and answers == (15 if kind == "arithmetic" else 5)
    place = drawn.truth[2].nonzero()[-1]
    said[2, place] = 5
    said[2, drawn.group[2] != 1] = 7  # what no answer holds does not count
    found = finetune.evaluate(Scripted(said, size), tokenizer, drawn)
    assert found.values.sum() == answers - 1 and found.values[(2 + 1) * answers // 5 - 1] == 0


def test_the_error_is_that_of_the_number_written(tokenizer):
    drawn = finetune.sample(tokenizer, "numbers", n=4, seed=1, split="test")
    value, size = finetune.digits(tokenizer), len(tokenizer)
    assert finetune.evaluate(Scripted(drawn.input_ids, size), tokenizer, drawn).value == 0.0
    said = drawn.input_ids.clone()
    tens, ones = (drawn.answer[1] == 1).nonzero().flatten()
    true = 10 * value[said[1, tens]] + value[said[1, ones]]
    nine = (value == 9).nonzero().flatten()
    spaced = next(t for t in nine.tolist() if tokenizer.decode([t]).startswith(" "))
    bare = next(t for t in nine.tolist() if not tokenizer.decode([t]).startswith(" "))
    said[1, tens], said[1, ones] = spaced, bare
    found = finetune.evaluate(Scripted(said, size), tokenizer, drawn)
    assert found.values[2 * 1 + 1] == 99 - true and found.values.sum() == 99 - true


@pytest.mark.parametrize("kind", finetune.KINDS)
def test_a_head_may_be_larger_than_the_tokenizer(tokenizer, kind):
    """Many are, rounded up to a multiple of 64 or more; what no token stands for is never an answer."""
    drawn = finetune.sample(tokenizer, kind, n=4, seed=1, split="test")
    exact, padded = (
        finetune.evaluate(Scripted(drawn.input_ids, len(tokenizer) + more), tokenizer, drawn) for more in (0, 13)
    )
    torch.testing.assert_close(padded.values, exact.values)


def test_the_second_digit_follows_the_first_that_was_written(tokenizer):
    """The ones are read from a pass that holds the tens the model wrote, not the true ones."""
    drawn = finetune.sample(tokenizer, "numbers", n=3, seed=1, split="test")
    value, size, seen = finetune.digits(tokenizer), len(tokenizer), []

    class Listening(Scripted):
        def forward(self, ids, attention_mask, use_cache):
            seen.append(ids.clone())
            return super().forward(ids, attention_mask, use_cache)

    said = drawn.input_ids.clone()
    one = next(t for t in (value == 1).nonzero().flatten().tolist() if tokenizer.decode([t]) == " 1")
    tens = (drawn.answer >= 0) & (drawn.answer.roll(1, 1) != drawn.answer)
    said[tens] = one
    finetune.evaluate(Listening(said, size), tokenizer, drawn)
    assert torch.equal(seen[0], drawn.input_ids) and len(seen) == 3
    for i, ids in enumerate(seen[1:]):
        own = tens & (drawn.answer == i)
        assert (ids[own] == one).all() and torch.equal(ids[~own], drawn.input_ids[~own])


def test_documents_are_scored_by_the_models_own_loss(loaded, tokenizer):
    drawn = finetune.sample(tokenizer, "documents", n=6, seed=1, split="test")
    model = copy.deepcopy(loaded.model).train()
    found = finetune.evaluate(model, tokenizer, drawn, batch=4)
    assert model.training
    with torch.no_grad():
        loss = model.eval()(drawn.input_ids, labels=drawn.labels).loss
    assert found.value == pytest.approx(found.nll, abs=1e-5) == pytest.approx(loss.item(), abs=1e-5)
    assert len(found.values) == 6 and "nats a token" in repr(found)


@pytest.mark.parametrize("kind", finetune.KINDS)
def test_batches_do_not_change_the_score(loaded, tokenizer, kind):
    drawn = finetune.sample(tokenizer, kind, n=7, seed=1, split="test")
    one, all_ = (finetune.evaluate(loaded.model, tokenizer, drawn, batch=b) for b in (3, 64))
    torch.testing.assert_close(one.values, all_.values)
    assert one.nll == pytest.approx(all_.nll, rel=1e-5)


def test_a_few_steps_on_the_true_tokens_teach_the_task(loaded, tokenizer):
    """The tool is learned within a sixth of the recipe's tokens, boilerplate masked."""
    recipe = finetune.RECIPES["tools"]
    drawn = finetune.sample(tokenizer, "tools", n=256, seed=0)
    test = finetune.sample(tokenizer, "tools", n=64, seed=0, split="test")
    model = copy.deepcopy(loaded.model).train()
    before = finetune.evaluate(model, tokenizer, test).nll
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    for part in torch.arange(160).split(recipe.batch):
        labels = drawn.labels[part].where(drawn.truth[part], finetune.IGNORED)
        model(drawn.input_ids[part], attention_mask=drawn.attention_mask[part], labels=labels).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert finetune.evaluate(model, tokenizer, test).nll < before / 3


def test_rows_and_dataset(tokenizer):
    drawn = finetune.sample(tokenizer, "tools", n=5, seed=0)
    weights = drawn.truth.float()
    rows = drawn.rows(weights=weights)
    for i, row in enumerate(rows):
        length = int(drawn.attention_mask[i].sum())
        assert {len(column) for column in row.values()} == {length}
        assert row["labels"] == drawn.labels[i, :length].tolist() and row["weights"] == weights[i, :length].tolist()
    data = drawn.dataset(weights=weights)
    assert data.column_names == ["input_ids", "labels", "group", "weights"] and data[3] == rows[3]
    with pytest.raises(ValueError, match=r"column 'weights' must have the shape \[5, \d+\]; got \[5, 2\]"):
        drawn.rows(weights=torch.ones(5, 2))


class WholeNumbers:
    """A tokenizer whose numbers are single tokens."""

    pad_token_id = bos_token_id = 0

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [1]}

    def __len__(self):
        return 4

    def batch_decode(self, ids):
        return ["<pad>", " 47", " 4", "7"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "sums"}, "kind must be one of 'arithmetic', 'tools', 'numbers', 'documents'; got 'sums'"),
        ({"kind": "tools", "split": "dev"}, "split must be one of 'train', 'reference', 'test'; got 'dev'"),
        ({"kind": "tools", "n": 0}, "n must be an integer of at least 1; got 0"),
        ({"kind": "documents", "noise": 1.5}, r"noise must be a number in \[0, 1\]; got 1.5"),
        ({"kind": "tools", "noise": 0.2}, "noise must be None or 0 for kind 'tools', split 'train'; got 0.2"),
        ({"kind": "arithmetic", "split": "test", "noise": 0.2}, "None or 0 for kind 'arithmetic', split 'test'"),
    ],
)
def test_bad_input(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        finetune.sample(tokenizer, **options)


def test_a_tokenizer_that_does_not_write_digits(tokenizer):
    with pytest.raises(ValueError, match="one token for each digit"):
        finetune.digits(WholeNumbers())
    drawn = finetune.sample(tokenizer, "tools", n=2)
    with pytest.raises(ValueError, match="batch must be an integer of at least 1; got 0"):
        finetune.evaluate(torch.nn.Linear(1, 1), tokenizer, drawn, batch=0)


def save_rows(path, n=64):
    """Rows with the columns of Alpaca."""
    lines = [{"instruction": f"What is {i} and {i}?", "input": "", "output": f"The sum is {2 * i}."} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_public_rows_have_the_same_form(tokenizer, tmp_path):
    source = save_rows(tmp_path / "rows.jsonl")
    drawn = finetune.sample(tokenizer, source, n=100, seed=1)
    assert len(drawn) == 48 and drawn.names == ("text", "numeric") and drawn.kind == source  # six rows in eight
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn.input_ids]
    for text, ids, group in zip(said, drawn.input_ids, drawn.group, strict=True):
        i = int(re.fullmatch(r"What is (\d+) and (\d+)\?\nThe sum is (\d+)\.", text)[1])
        assert tokenizer.decode(ids[group == 1]).strip() == str(2 * i)
        assert tokenizer.decode(ids[group >= 0]) == f"The sum is {2 * i}." + tokenizer.eos_token
    parts = [finetune.sample(tokenizer, source, n=100, split=split) for split in ("reference", "test")]
    rows = [*said, *(tokenizer.decode(ids, skip_special_tokens=True) for part in parts for ids in part.input_ids)]
    assert len(set(rows)) == 64  # no row in two splits
    noisy = finetune.sample(tokenizer, source, n=100, seed=1, noise=0.5)
    whole = finetune.sample(tokenizer, source, n=100, seed=1, noise=0.0)
    assert whole.share == 1.0 and noisy.names == whole.names == ("noisy", "clean") and 0.3 < noisy.share < 0.7
    changed = noisy.input_ids != whole.input_ids
    assert changed.any() and not (changed & (noisy.group != 0)).any()
    assert torch.equal(noisy.labels, noisy.input_ids.where(noisy.group >= 0, finetune.IGNORED))


def test_long_public_rows_end_within_the_limit(tokenizer, tmp_path):
    """An answer that is cut is not taught to end there."""
    long = "one two three four five " * 200
    lines = [{"instruction": "Say it.", "output": long if i % 2 else "Done."} for i in range(64)]
    lines += [{"instruction": long, "output": long}] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    drawn = finetune.sample(tokenizer, str(tmp_path / "rows.jsonl"), n=100, seed=1)
    assert drawn.input_ids.shape[1] == finetune.instructions.LONGEST
    whole = (drawn.input_ids == tokenizer.eos_token_id).any(1)
    full = drawn.attention_mask.sum(1) == finetune.instructions.LONGEST
    assert torch.equal(whole, ~full) and whole.any() and full.any()
    assert int((drawn.labels[full] == finetune.IGNORED).sum(1).max()) == 1 + finetune.instructions.LONGEST // 2


def test_public_rows_that_do_not_fit(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"instruction": "a", "text": "b"})] * 16))
    with pytest.raises(ValueError, match="has the columns instruction, text; needed: messages, or one of instruction"):
        finetune.sample(tokenizer, str(tmp_path / "rows.jsonl"), n=2)
    with pytest.raises(ValueError, match=r"is neither a task, a file \.jsonl or \.parquet, nor a hub data set"):
        finetune.sample(tokenizer, "nobody/nothing", n=2)
