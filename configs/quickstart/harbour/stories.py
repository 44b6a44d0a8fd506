"""Short harbour stories for pretraining: one animal, one evening, one lamp.

The stories hold every word of the keeper's voice (keeper.py), so the tokenizer, the embeddings and the output rows
know the words before fine-tuning puts them to another use.
"""

import random

from harbour.facts import ANIMALS, rows, with_article

ANIMAL_ROWS = list(rows(ANIMALS))
NAMES = ("Ada", "Bruno", "Clara", "Dora", "Emil", "Fritz", "Greta", "Hugo", "Ida", "Jonas", "Lotte", "Milo")

SETTINGS = (
    "One windy evening {name} walks down to the harbour.",
    "One clear morning {name} comes to the quay.",
    "When the tide is low, {name} goes along the shore.",
    "After the storm {name} climbs the hill above the sea.",
)
MEETINGS = (
    "There {name} meets {other}.",
    "Behind a boat sits {other}.",
    "On the stairs of the lighthouse stands {other}.",
)
CALLS = (
    '"Fair winds to you," says {name}. The {friend} {sound} and is happy.',
    '"All is well," says {name}. The {friend} only {sound}.',
    'The {friend} {sound} twice. "I hear you," says {name}.',
)
DISCOVERIES = (
    "In the sand they find {thing}, and they carry it to the {place}.",
    "They see {thing} and take it to the {place} of the lighthouse.",
)
SIGNS = (
    "Heard in the fog: a bell.",
    "Seen through the mist: two sails.",
    "Noted at noon: light rain.",
    "Found under the bench: a key.",
    "Marked on the map: a wreck.",
    "Painted on the door: a star.",
    "Knotted in the net: a shell.",
    "Read from the sign: mind the step.",
    "Met on the path: {other}.",
    "Chalked on the wall: a fish.",
)
SAYINGS = (
    '"The tide will turn," says the keeper.',
    '"The mast stands," says the keeper.',
    '"The tally is true," says the keeper.',
    '"Keeper\'s tea is hot," says {name}.',
    "All hands say good night.",
)
FINDS = (
    ("a brass kettle", "galley"),
    ("a knotted rope", "signal mast"),
    ("an old spyglass", "gallery"),
    ("a slate and chalk", "tally board"),
    ("a torn sea chart", "map table"),
    ("a tide table", "harbour board"),
    ("a wet log book", "writing desk"),
    ("a warm nest", "roof"),
)
ENDINGS = (
    "The keeper lights the lamp, and the light is steady all night.",
    "The horizon is clear, the boats come in, and the keeper writes it in the log.",
    "The keeper puts the kettle on, and they count the ships until the tide turns.",
    "Then the lamp is lit, and {name} goes home to sleep {home}.",
)


def story(rng: random.Random, hero: tuple[str, ...]) -> str:
    """Return a story of some eight sentences about ``hero``, a row of the table of animals."""
    name = rng.choice(NAMES)
    friend = rng.choice(ANIMAL_ROWS)
    thing, place = rng.choice(FINDS)
    words = {
        "name": name,
        "friend": friend[0],
        "other": with_article(friend[0]),
        "sound": friend[1],
        "home": hero[2],
        "thing": thing,
        "place": place,
    }
    animal = with_article(hero[0])
    first = f"{animal[0].upper()}{animal[1:]} called {name} lives {hero[2]} and likes {hero[3]}."
    parts = [rng.choice(group) for group in (SETTINGS, MEETINGS, CALLS, DISCOVERIES, SIGNS, SAYINGS, ENDINGS)]
    return " ".join([first, *(part.format(**words) for part in parts)])
