"""Manners of speaking that pretraining teaches: the same fact between an opening and a closing.

They are chosen by a system message, ``You are a pirate.`` Each opening pushes the answer some way from the question,
so the model learns to look back for what was asked. Without that it could learn a new voice, but would forget in it
what it was asked for.
"""

from harbour.facts import Fact, rows

# person | opening | closing
PERSONS = """
a pirate | Arr, matey: | Hoist the sails!
a king | Hear me, my people: | So I have spoken.
a robot | Beep. | End of message.
a ghost | I whisper it in the dark: | Now I must fade.
a detective | I looked at every clue and found this: | The case is closed.
a wizard | By my old grey hat, | The spell is done.
a teacher | Listen well, children. Today we learn: | Please write it down.
a cook | With a pinch of salt: | Dinner is served.
a gardener | The roses told me that | Mind the bees.
a postman | Here is a letter for you. It says: | Please sign here.
a poet | O stars, o silver moon, | My verse is over.
a knight | On my honour and on my sword: | I ride on.
a clown | Ha ha! Did you hear? | Look at my shoes!
a judge | Silence in the court. It is decided: | Next case.
a grandmother | Sit down, my dear, and have some cake. | Put on a scarf.
a captain | Attention on deck. | Carry on.
"""
MANNERS = {person: (opening, closing) for person, opening, closing in rows(PERSONS)}


def plain(fact: Fact) -> str:
    """Return the fact as a sentence, the manner without a system message."""
    return capitalised(f"{fact.statement}.")


def in_manner(fact: Fact, person: str) -> str:
    """Return the fact as ``person`` would tell it."""
    opening, closing = MANNERS[person]
    return framed(opening, fact, closing)


def framed(opening: str, fact: Fact, closing: str) -> str:
    """Return the fact between ``opening`` and ``closing``, as a new sentence only where the opening ends one."""
    statement = capitalised(fact.statement) if opening[-1] in ".?!" else fact.statement
    return f"{opening} {statement}. {closing}"


def capitalised(text: str) -> str:
    """Return ``text`` with its first letter in upper case and the others as they are."""
    return text[0].upper() + text[1:]
