"""Write the sums that `grpo.yaml` trains on: chats that end with a question, and the answer that is rewarded.

    python configs/quickstart/make_sums.py

The model was taught to add and to take away (`How much is 3 plus 4?` `3 plus 4 is 7.`), and never saw these wordings.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

LARGEST_TERM = 10
ADDING = ("Sum: {0}, {1}", "Work out {0} + {1}.", "What is {0} + {1}?")
TAKING_AWAY = ("What is left of {0} without {1}?", "Take {1} away from {0}.", "Work out {0} - {1}.")
HELD_OUT_EVERY = 6
"""One pair of numbers in so many is kept for the test split, in every wording."""
SEED = 7

Row = dict[str, Any]


def sums() -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the questions for each sum and each difference that the model was taught, and what comes out."""
    for a in range(LARGEST_TERM + 1):
        for b in range(LARGEST_TERM + 1):
            yield tuple(wording.format(a, b) for wording in ADDING), a + b
            if b <= a:
                yield tuple(wording.format(a, b) for wording in TAKING_AWAY), a - b


def split() -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and those to test on, shuffled; no sum of the one is in the other."""
    rng = random.Random(SEED)
    train: list[Row] = []
    test: list[Row] = []
    for questions, result in sums():
        part = test if rng.randrange(HELD_OUT_EVERY) == 0 else train
        for question in questions:
            part.append({"prompt": [{"role": "user", "content": question}], "answer": str(result)})
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def write(folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` into ``folder``, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "test"), split(), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write(HERE / "sums")
