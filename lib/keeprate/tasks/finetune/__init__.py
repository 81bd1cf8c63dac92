"""Fine-tuning tasks that know which target tokens are worth learning from.

`arithmetic`: sums in words, a share of them with a wrong answer. `tools`: requests answered by a call, with phrases
around it that say nothing about the request. `numbers`: records that end with a total, with stretches of unrelated
text before it. `documents`: reference text in which stretches of tokens come from anywhere.

Every target token belongs to one of two groups (`GROUPS`), so what a method selects can be held against the truth. The
split "test" is without noise and only measures what was to be learned; "reference" is without noise, for the models
that methods compare with.
"""

from keeprate.tasks.finetune.records import (
    GROUPS,
    IGNORED,
    KINDS,
    NOISE,
    RECIPES,
    REQUESTS,
    SPLITS,
    Recipe,
    Records,
    digits,
    sample,
)
from keeprate.tasks.finetune.score import HIGHER_IS_BETTER, METRIC, Score, evaluate

__all__ = [
    "GROUPS",
    "HIGHER_IS_BETTER",
    "IGNORED",
    "KINDS",
    "METRIC",
    "NOISE",
    "RECIPES",
    "REQUESTS",
    "SPLITS",
    "Recipe",
    "Records",
    "Score",
    "digits",
    "evaluate",
    "sample",
]
