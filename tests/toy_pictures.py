"""Small copies of the published data sets of pictures, in the same files and fields."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def paint(path: Path, number: int, size: tuple[int, int] = (40, 20), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.new("RGB", size, (number * 5 % 256, number * 11 % 256, 90)).convert(mode).save(path)


def toy_detail(home: Path) -> None:
    rows = []
    for number in range(6):
        things = [("dog", "cat"), ("bus", "skis"), ("knife", "sheep")][number % 3]
        marked = [{"category": things[0], "iscrowd": 0}] * 2 + [{"category": things[1], "iscrowd": 0}]
        rows.append(
            {"file_name": f"{number}.png", "captions": [f"photo {number} .", "a longer one"], "objects": marked}
        )
        paint(home / "coco_mini" / "images" / f"{number}.png", number)
    write(home / "coco_mini" / "records.jsonl.gz", rows)


def toy_medical(home: Path) -> None:
    rows = []
    for number in range(6):
        shared = {"image_name": f"{number}.png", "answer_type": "OPEN "}
        rows.append({**shared, "question": "Is it large?", "answer": "No ", "question_type": "PRES"})
        rows.append({**shared, "question": "is it  large", "answer": "Yes", "question_type": "PRES"})
        rows.append({**shared, "question": "How many?", "answer": 3 + number, "question_type": "COUNT, PRES"})
        where = "Right lobe" if number % 2 else "left kidney"
        rows.append({**shared, "question": "Where?", "answer": where, "question_type": "POS"})
        paint(home / "vqa_rad" / "images" / f"{number}.png", number, mode="L")
    write(home / "vqa_rad" / "vqa_rad.jsonl.gz", rows)


def problem(number: int, **words: Any) -> dict[str, Any]:
    return {
        "image": f"{number}.png", "question": "Look at the table. Then answer the question. How many?", "choices": None,
        "answer": "20", "unit": None, "solution": "Add.\n\n0 + 20 = 20\n\n20 people went on day 20.5, not 120.",
        "ques_type": "free_text", "ans_type": "integer_number",
    } | words  # fmt: skip


def toy_tables(home: Path) -> None:
    rows = [
        problem(0),
        problem(1, answer="1/10", solution="\\frac{1}{10} of all students passed."),
        problem(2, answer="6.50", unit="$", solution="Mr. Park paid $6.50."),
        problem(3, answer="yes", choices=["yes", "no"], solution="$5 is more than $4."),
        problem(4, answer="Rome", choices=["Rome", "Oslo"], solution="So Rome has more rain. It was 5 mm."),
        problem(5, answer="3", unit="$, per year", solution="The rate was $3 per year."),
    ]
    for number in range(len(rows)):
        paint(home / "tabmwp" / "images" / f"{number}.png", number)
    write(home / "tabmwp" / "problems.jsonl.gz", rows)


def toy_charts(home: Path) -> None:
    rows = []
    for number in range(6):
        x = {"field": "day", "type": "nominal", "title": "Day of rain"}
        y = {"field": "mm", "aggregate": "average"} | ({"axis": None} if number == 1 else {})
        encoding: dict[str, Any] = {"x": {"field": "day"}, "y": {"field": "mm", "aggregate": "average"}}
        spec = {"encoding": {"x": x, "y": y}}
        if number % 2:
            encoding["color"] = {"field": "town"}
        mark = None if number == 5 else "point"
        name = f"{number}.png"
        rows.append({"name": name, "image": name, "mark": mark, "encoding": encoding, "spec": spec})
        paint(home / "vega_lite_charts" / "images" / name, number, mode="P" if number else "RGB")
    write(home / "vega_lite_charts" / "records.jsonl.gz", rows)


def toy_shapes(home: Path) -> None:
    rows = []
    for number in range(8):
        verdicts = {"r0": "true", "r1": "false" if number == 0 else "true"}
        rows.append({"sentence": "there is a  box .", "label": "true", "image": f"{number}.png", "evals": verdicts})
        paint(home / "nlvr" / "images" / f"{number}.png", number)
    write(home / "nlvr" / "dev.jsonl.gz", rows)
    queries = [
        "is a square right of above a red shape",
        "is a green shape red",
        "is a circle a circle",
        "is a red shape a square",
    ]
    asked = [{"split": "train.small", "index": n, "query": query, "answer": "true"} for n, query in enumerate(queries)]
    (home / "shapes").mkdir()
    write(home / "shapes" / "queries.jsonl.gz", asked)
    pictures = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 30, 30, 3), np.uint8)
    np.savez(home / "shapes" / "images.npz", train_small=pictures)


TOYS: dict[str, Callable[[Path], None]] = {
    "detail": toy_detail, "medical": toy_medical, "tables": toy_tables, "charts": toy_charts, "shapes": toy_shapes,
}  # fmt: skip
