"""How right an answer in words is: the metrics of GQA, POPE and TextVQA."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from keeprate import check

METRICS = ("exact", "yesno", "vqa")

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(i) for i, word in enumerate(_COUNTING)} | {"none": "0"}
_ENDINGS = {  # of contractions that lose their apostrophe: the ending with it, and what it stands behind
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could i might must not should they we what when where who why would you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what who why you",
    "'ll": "how it somebody someone something they what who you",
}
_CONTRACTIONS = {
    stem + ending.replace("'", ""): stem + ending for ending, stems in _ENDINGS.items() for stem in stems.split()
} | {"im": "i'm", "maam": "ma'am", "oclock": "o'clock", "yall": "y'all", "twas": "'twas"}


def score(metric: str, said: Sequence[str], answers: Sequence[Sequence[str]]) -> Tensor:
    """How right answers are.

    Args:
        metric: "exact": equal to one of the answers, apart from case, outer space and a full stop behind it. "yesno":
            see `says_yes`. "vqa": for the answers of ten people, the mean over leaving each one out of
            min(1, matches / 3), after `clean`.
        said: what a model answered.
        answers: for each, the right ones.

    Returns:
        bool [n]; for "vqa" float [n].

    Raises:
        ValueError: unknown metric; not as many answers given as wanted.

    Source: LLaVA-1.5's evaluation of GQA and POPE; VQA accuracy as the evaluation server of TextVQA has it.
    """
    check.choice("metric", metric, METRICS)
    if len(said) != len(answers):
        raise ValueError(f"{len(said)} answers to {len(answers)} questions; allowed: one each")
    pairs = list(zip(said, answers, strict=True))
    if metric == "vqa":
        return torch.tensor([_agreement(one, given) for one, given in pairs])
    if metric == "yesno":
        right = [says_yes(one) == (given[0].strip().lower() == "yes") for one, given in pairs]
    else:
        right = [_bare(one) in map(_bare, given) for one, given in pairs]
    return torch.tensor(right, dtype=torch.bool)


def says_yes(text: str) -> bool:
    """Whether an answer means yes to POPE: no "no" and no "not" in its first sentence; so an empty one means yes."""
    words = text.strip().split(".")[0].replace(",", "").split()
    return not {"no", "No", "not"} & set(words)


def metric_of(answers: Sequence[Sequence[str]]) -> str:
    """The metric that suits answers: ten or more a question "vqa", yes and no "yesno", others "exact"."""
    if all(len(given) >= 10 for given in answers):
        return "vqa"
    return "yesno" if {_bare(one) for given in answers for one in given} <= {"yes", "no"} else "exact"


def _bare(text: str) -> str:
    return " ".join(text.strip().rstrip(".").lower().split())


def _agreement(said: str, answers: Sequence[str]) -> float:
    """Mean over the people left out of min(1, matches among the others / 3)."""
    said, answers = clean(said), [clean(one) for one in answers]
    matches = sum(one == said for one in answers)
    return sum(min(1.0, (matches - (one == said)) / 3) for one in answers) / len(answers)


def clean(text: str) -> str:
    """An answer as VQA accuracy compares it: lower case, digits for numbers, no articles, hardly any punctuation.

    Source: the answer processing of the VQA and TextVQA evaluation servers.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.replace("\n", " ").replace("\t", " ").strip()
    for sign in _SIGNS:  # next to a space it vanishes, between letters it separates them
        text = text.replace(sign, "" if f"{sign} " in text or f" {sign}" in text else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))
