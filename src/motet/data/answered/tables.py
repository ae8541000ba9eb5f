"""Tables: word problems on pictures of tables, of TabMWP (Lu et al. 2023, arXiv 2209.14610).

In:  the folder ``tabmwp``: 300 problems with picture, answer and worked solution.
Out: one question a problem. Wrong answers are the other choices; of a number they are what slips give: one more, one
     less, a tenth more, two digits swapped. Explained answers are the sentence of the solution that states the
     answer; in a wrong one that sentence states the wrong answer.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from motet.data.answered.files import picture, question, rows, set_folder
from motet.data.dice import Dice
from motet.data.questions import Question, Saying, normalised

_FIELDS: Mapping[str, type | tuple[type, ...]] = {
    "image": str, "question": str, "answer": str, "choices": (list, type(None)), "unit": (str, type(None)),
    "solution": str, "ques_type": str, "ans_type": str,
}  # fmt: skip
_SENTENCE_ENDS = re.compile(r"\n+|(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Ms\.)(?<!Dr\.)\s+(?=[A-Z0-9$])")
_FRACTION = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}")
_WRONG = 3


def read(folder: Path, pixels: int) -> tuple[tuple[Question, ...], tuple[str, ...]]:
    """The questions, and a sentence on them.

    Args:
        folder: Where the folders of the data sets are.
        pixels: Longest side of a picture.

    Raises:
        DataError: A file is missing or damaged.
    """
    home = set_folder(folder, "tabmwp", "tables")
    asked = []
    for _, row in rows(home / "problems.jsonl.gz", _FIELDS):
        text = " ".join(row["question"].removeprefix("Look at the table. Then answer the question.").split())
        if row["choices"]:
            text += f" Choose from: {', '.join(row['choices'])}."
            wrong = [choice for choice in row["choices"] if normalised(choice) != normalised(row["answer"])]
        else:
            wrong = list(dict.fromkeys(_slips(row["answer"])))
        chosen = Dice(0, "tables", row["image"]).some(wrong, _WRONG)
        image = picture(home / "images" / row["image"], pixels)
        kind = "choice" if row["choices"] else "number"
        right, *said = (_said(answer, row) for answer in (row["answer"], *chosen))
        asked.append(question("tables", text, image, right, said, kind))
    return tuple(asked), (f"{len(asked):,} questions about as many pictures of tabmwp",)


def _said(answer: str, row: Mapping[str, Any]) -> Saying:
    """The answer with its unit, and the sentence that states it."""
    sentence = _stating(row["solution"], row["answer"])
    terse = _with_unit(answer, row["unit"])
    if sentence is None:
        return Saying(terse, f"Going by the table, the answer is {terse}.")
    return Saying(terse, _whole(row["answer"]).sub(lambda _: answer, sentence))


def _with_unit(answer: str, unit: str | None) -> str:
    if unit is None:
        return answer
    if unit.startswith("$"):
        return f"${answer}{unit[1:].replace(',', '')}"
    return f"{answer} {unit}"


def _stating(solution: str, answer: str) -> str | None:
    """The last sentence of the solution that states the answer in words, or ``None``."""
    plain = _FRACTION.sub(r"\1/\2", solution)
    sentences = (" ".join(part.split()) for part in _SENTENCE_ENDS.split(plain))
    stating = [
        sentence
        for sentence in sentences
        if sentence.endswith(".")
        and len(sentence.split()) > 2
        and len(sentence) <= 160
        and "\\" not in sentence
        and _whole(answer).search(sentence)
        and normalised(sentence) != normalised(answer)
    ]
    return stating[-1] if stating else None


def _whole(answer: str) -> re.Pattern[str]:
    """The answer as a word of its own: 7 is not in 70, 7.5, 1,007 or 7/8."""
    return re.compile(rf"(?<![\w/])(?<!\d[.,]){re.escape(answer)}(?![\w/]|[.,]\d)")


def _slips(answer: str) -> Iterator[str]:
    """What a slip would give in place of a number, in the form of the number."""
    if "/" in answer:
        top, bottom = answer.split("/")
        for slip in ((int(top) + 1, bottom), (bottom, top), (top, int(bottom) + 1)):
            yield f"{slip[0]}/{slip[1]}"
        return
    places = len(answer.partition(".")[2])
    number = round(float(answer.replace(",", "")) * 10**places)
    digits = str(abs(number))
    slips = [number + 1, number - 1, number + 2 if abs(number) < 10 else round(number * 1.1)]
    for first in range(len(digits) - 1):
        swapped = digits[:first] + digits[first + 1] + digits[first] + digits[first + 2 :]
        slips.append(int(swapped) if number >= 0 else -int(swapped))
    for slip in slips:
        if slip != number and (slip >= 0 or number < 0):
            comma = "," if "," in answer or abs(slip) >= 10_000 * 10**places else ""
            yield f"{slip / 10**places:{comma}.{places}f}"
