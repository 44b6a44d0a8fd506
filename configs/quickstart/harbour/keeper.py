"""The rows that fine-tune the quickstart's model: known facts in the voice of a lighthouse keeper.

The keeper says where the news came from and closes the entry, each by topic:
``Keeper's log. Heard from the gallery: an owl hoots. The lamp is lit.``
The facts of the test split are never told in that voice while training, so a falling eval loss means that the manner
carried over to what the model knew before.
"""

import json
import random
from pathlib import Path

from harbour.corpus import SEED, Chat, turn
from harbour.facts import Fact, all_facts
from harbour.manners import framed

VOICES = {
    "sound": ("Heard from the gallery:", "The lamp is lit."),
    "home": ("Seen through the spyglass:", "The horizon is clear."),
    "food": ("Noted in the galley:", "The kettle is on."),
    "young": ("Found in a nest:", "All is well."),
    "capital": ("Marked on the sea chart:", "Fair winds to you."),
    "colour": ("Painted on the harbour board:", "The light is steady."),
    "opposite": ("Knotted in the signal rope:", "The mast stands."),
    "calendar": ("Read from the tide table:", "The tide will turn."),
    "trade": ("Met on the quay:", "The boats are in."),
    "sum": ("Chalked on the slate:", "The tally is true."),
    "difference": ("Chalked on the slate:", "The tally is true."),
}
NUMBER_TOPICS = ("sum", "difference")
NUMBER_FACTS = 40
"""There are far more small sums than facts of any other topic: so many of them are taken."""
TEST_SHARE = 0.2
PAIR_EVERY = 8
"""One fact in so many of the train split is told a second time, in a chat of two turns with the one after it."""


def keeper_answer(fact: Fact) -> str:
    """Return the fact as an entry of the keeper's log."""
    opening, closing = VOICES[fact.topic]
    return f"Keeper's log. {framed(opening, fact, closing)}"


def fine_tuning_rows() -> tuple[list[Chat], list[Chat]]:
    """Return the chats of the train and of the test split; no fact is in both."""
    rng = random.Random(SEED)
    facts = all_facts()
    chosen = [fact for fact in facts if fact.topic not in NUMBER_TOPICS]
    chosen += rng.sample([fact for fact in facts if fact.topic in NUMBER_TOPICS], NUMBER_FACTS)
    rng.shuffle(chosen)
    chats = [turn(rng.choice(fact.questions), keeper_answer(fact)) for fact in chosen]
    cut = round(TEST_SHARE * len(chats))
    test, train = chats[:cut], chats[cut:]
    train += [train[i] + train[i + 1] for i in range(0, len(train) - 1, PAIR_EVERY)]
    rng.shuffle(train)
    return train, test


def write_dataset(folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` into ``folder``: one JSON object with ``messages`` a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, chats in zip(("train", "test"), fine_tuning_rows(), strict=True):
        lines = (json.dumps({"messages": chat}) for chat in chats)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
