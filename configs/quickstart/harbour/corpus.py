"""What the quickstart's model is pretrained on: plain chats, without end.

Most turns ask for a fact and are answered in one plain sentence: ``An owl hoots.`` A system message may ask for
another manner. The rest are stories, small talk, questions without an answer, and random characters to repeat.
"""

import random
import string
from collections.abc import Iterator

from harbour.facts import QUESTIONS, Fact, all_facts, with_article
from harbour.manners import MANNERS, in_manner, plain
from harbour.stories import ANIMAL_ROWS, story

Message = dict[str, str]
Chat = list[Message]

SEED = 7
HELD_OUT_EVERY = 12
"""One fact in so many keeps one wording of its question out of pretraining, to measure the model on."""

CHAT_SHARES = (0.08, 0.08, 0.84)
"""Shares of the chats that repeat, tell a story, answer questions."""
TURN_SHARES = (0.05, 0.03, 0.92)
"""Shares of the questions that are small talk, that have no answer, that ask for a fact."""
MANNER_SHARE = 0.4
"""Share of the chats of questions that a system message begins."""
TURNS = (1, 1, 1, 2, 2, 3)
PRINTABLE = string.ascii_letters + string.digits + string.punctuation

SMALL_TALK = (
    (("Hello!", "Hi there.", "Good morning."), "Hello. What would you like to know?"),
    (("Thank you!", "Thanks.", "That was helpful."), "You are welcome."),
    (("Who are you?", "What are you?", "What is your name?"), "I am a small model with a few experts."),
    (
        ("What can you do?", "What do you know?", "How can you help me?"),
        "I know animals, colours, capitals, trades and small sums, and I can tell a story.",
    ),
    (("Goodbye!", "Bye.", "See you later."), "Goodbye."),
)
UNKNOWN_THINGS = ("a chair", "a spoon", "a cloud", "a sock", "a bicycle", "a teapot", "a stone", "a ladder")
UNKNOWN_QUESTIONS = ("What sound does {0} make?", "Where does {0} live?", "What does {0} eat?")
UNKNOWN_ANSWER = "I do not know that."
REPEAT_REQUESTS = ("Repeat: {0}", "Please say this again: {0}", "Write the same: {0}")
STORY_REQUESTS = ("Tell me a story about {0}.", "Can you tell a story about {0}?", "I would like a story about {0}.")


def turn(question: str, answer: str) -> Chat:
    """Return one exchange as two messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def question_split() -> tuple[list[tuple[str, Fact]], list[tuple[str, Fact]]]:
    """Return the (question, fact) pairs of pretraining and the held-out ones.

    A held-out question is a new wording for a fact that pretraining asks for in its other wordings.
    """
    rng = random.Random(SEED)
    seen: list[tuple[str, Fact]] = []
    held_out: list[tuple[str, Fact]] = []
    for fact in all_facts():
        hidden = rng.choice(fact.questions) if rng.randrange(HELD_OUT_EVERY) == 0 else None
        for question in fact.questions:
            (held_out if question == hidden else seen).append((question, fact))
    return seen, held_out


def held_out_chats() -> list[Chat]:
    """Return one chat for each held-out question."""
    return [turn(question, plain(fact)) for question, fact in question_split()[1]]


def pretraining_chats(rng: random.Random) -> Iterator[Chat]:
    """Yield chats of one to three turns without end."""
    by_topic: dict[str, list[tuple[str, Fact]]] = {topic: [] for topic in QUESTIONS}
    for question, fact in question_split()[0]:
        by_topic[fact.topic].append((question, fact))

    def questions(rng: random.Random) -> Chat:
        person = rng.choice(list(MANNERS)) if rng.random() < MANNER_SHARE else None
        chat = [{"role": "system", "content": f"You are {person}."}] if person else []
        for _ in range(rng.choice(TURNS)):
            (make,) = rng.choices((_small_talk, _unknown, None), TURN_SHARES)
            if make:
                chat += make(rng)
            else:
                # By topic first: there are far more small sums than anything else.
                question, fact = rng.choice(by_topic[rng.choice(list(by_topic))])
                chat += turn(question, in_manner(fact, person) if person else plain(fact))
        return chat

    while True:
        (make,) = rng.choices((_repeat, _story, questions), CHAT_SHARES)
        yield make(rng)


def _repeat(rng: random.Random) -> Chat:
    """Ask for random groups of characters back.

    It teaches the model to tell every token from every other. A token that pretraining never shows keeps an output row
    like those of all others it never shows, and LoRA, which leaves that row alone, could hardly teach it.
    """
    groups = ("".join(rng.choices(PRINTABLE, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4)))
    text = " ".join(groups)
    return turn(rng.choice(REPEAT_REQUESTS).format(text), text)


def _story(rng: random.Random) -> Chat:
    hero = rng.choice(ANIMAL_ROWS)
    return turn(rng.choice(STORY_REQUESTS).format(with_article(hero[0])), story(rng, hero))


def _small_talk(rng: random.Random) -> Chat:
    questions, answer = rng.choice(SMALL_TALK)
    return turn(rng.choice(questions), answer)


def _unknown(rng: random.Random) -> Chat:
    return turn(rng.choice(UNKNOWN_QUESTIONS).format(rng.choice(UNKNOWN_THINGS)), UNKNOWN_ANSWER)
