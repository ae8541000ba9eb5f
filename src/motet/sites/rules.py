"""Rules: what an honest answer to each kind of question looks like, for the gate.

In:  what was asked.
Out: the words and tensors that an answer has, all of them and no others, with their types, shapes and ranges.
"""

import torch

from motet.sites.judging import CONTROLS
from motet.trust.gate import Rule, TensorRule, WordRule

HELLO_STEP, SETUP_STEP, FIT_STEP, FIRST_SCORE = 0, 1, 2, 16
"""Steps of the questions that come before rounds, and of the first batch of scores."""
MOST_PAIRS = 1_000_000
MOST_REWARD = 1e6
PAIRS = WordRule(int, least=0, most=MOST_PAIRS)
NAME = WordRule(str, longest=80)


def hello_rule() -> Rule:
    """Who is there."""
    return Rule(
        {
            "version": NAME, "fingerprint": NAME, "kind_of_reward": NAME, "pairs": PAIRS, "held_out": PAIRS,
            "pictured": PAIRS, "answers": WordRule(str, longest=32, row=16),
        }
    )  # fmt: skip


def setup_rule() -> Rule:
    """How many pairs there are to train on, and to judge by."""
    return Rule({"pairs": PAIRS, "held_out": PAIRS})


def judge_rule(contexts: int, inferences: int) -> Rule:
    """Counts of right answers: none above the number of pairs."""
    words = {"pairs": WordRule(int, least=1, most=MOST_PAIRS), "prompts": WordRule(float, least=0, most=MOST_PAIRS)}
    shapes = {"right": (contexts, inferences), "controls": (len(CONTROLS),)}
    return Rule(words, {n: TensorRule(torch.float64, s, least=0, most=1, each_pair=True) for n, s in shapes.items()})


def fit_rule() -> Rule:
    """What a site trained, and how right it is on its own held-out pairs."""
    count = WordRule(float, least=0, most=MOST_PAIRS)
    return Rule(
        {
            "pairs": PAIRS, "held_out": WordRule(int, least=1, most=MOST_PAIRS),
            "prompts": WordRule(int, least=1, most=MOST_PAIRS), "right": count, "longer": count,
            "kind_of_reward": NAME, "sees": WordRule(bool), "parameters": WordRule(int, least=0, most=10**12),
            "largest_frame": WordRule(int, least=4096, most=10**12),
        }
    )  # fmt: skip


def score_rule(answers: int) -> Rule:
    """One number an answer."""
    return Rule({}, {"rewards": TensorRule(torch.float32, (answers,), least=-MOST_REWARD, most=MOST_REWARD)})
