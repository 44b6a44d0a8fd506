"""What the quickstart model knows: small tables, and the questions and answers they make.

A fact is one statement with several wordings of the question that it answers. Pretraining teaches the facts in plain
sentences (corpus.py); the fine-tuning data answers with the same facts in another voice (keeper.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One thing to know.

    Attributes:
        topic: the key of the tables `QUESTIONS` here and `VOICES` in keeper.py.
        statement: the answer without its first capital and its full stop, such as ``an owl hoots``.
        questions: the wordings that ask for it.
    """

    topic: str
    statement: str
    questions: tuple[str, ...]


# name | sound | home | food | young
ANIMALS = """
owl | hoots | in a hollow tree | mice | owlet
cow | moos | in a pasture | grass | calf
dog | barks | in a kennel | bones | puppy
cat | meows | in a house | fish | kitten
horse | neighs | in a stable | hay | foal
pig | oinks | in a sty | turnips | piglet
sheep | bleats | in a meadow | clover | lamb
goat | bleats | on a mountain | leaves | kid
hen | clucks | in a coop | corn | chick
duck | quacks | on a pond | pond weed | duckling
goose | honks | in a marsh | reeds | gosling
frog | croaks | in a bog | flies | tadpole
bee | buzzes | in a hive | nectar | larva
lion | roars | on a savannah | zebras | cub
wolf | howls | in a forest | deer | pup
bear | growls | in a cave | honey | cub
mouse | squeaks | in a wall | crumbs | pup
snake | hisses | under a rock | eggs | snakelet
donkey | brays | in a shed | thistles | foal
crow | caws | in an elm | seeds | chick
dove | coos | in a dovecote | grain | squab
seal | barks | on a rocky shore | herring | pup
gull | screeches | on a cliff | crabs | chick
whale | sings | in an ocean | krill | calf
dolphin | clicks | in a warm sea | squid | calf
elephant | trumpets | on a plain | bark | calf
monkey | chatters | in a jungle | bananas | infant
turkey | gobbles | in a farmyard | grain | poult
fox | yelps | in a den | voles | kit
deer | bellows | in a wood | shoots | fawn
eagle | screams | in an eyrie | hares | eaglet
otter | whistles | on a riverbank | trout | pup
parrot | squawks | in a rainforest | nuts | chick
camel | grunts | in a desert | thorns | calf
sparrow | chirps | in a hedge | seeds | fledgling
hedgehog | snuffles | under a hedge | slugs | hoglet
"""

# country | capital
CAPITALS = """
France | Paris
Italy | Rome
Spain | Madrid
Portugal | Lisbon
Germany | Berlin
Austria | Vienna
Poland | Warsaw
Greece | Athens
Norway | Oslo
Sweden | Stockholm
Finland | Helsinki
Denmark | Copenhagen
Iceland | Reykjavik
Ireland | Dublin
Scotland | Edinburgh
Wales | Cardiff
England | London
Belgium | Brussels
Hungary | Budapest
Croatia | Zagreb
Bulgaria | Sofia
Romania | Bucharest
Egypt | Cairo
Kenya | Nairobi
Ghana | Accra
Morocco | Rabat
Peru | Lima
Chile | Santiago
Cuba | Havana
Canada | Ottawa
Japan | Tokyo
China | Beijing
India | New Delhi
Thailand | Bangkok
Vietnam | Hanoi
Malta | Valletta
"""

# thing | colour
COLOURS = """
a lemon | yellow
a banana | yellow
a sunflower | yellow
a canary | yellow
a tomato | red
a cherry | red
a strawberry | red
a poppy | red
a fire engine | red
a carrot | orange
a pumpkin | orange
a mandarin | orange
a leaf | green
a cucumber | green
a pea | green
a fern | green
a lime | green
a plum | purple
an aubergine | purple
a violet | purple
a flamingo | pink
a salmon | pink
a swan | white
a snowflake | white
a pearl | white
a daisy | white
a raven | black
a lump of coal | black
a liquorice stick | black
a chestnut | brown
a potato | brown
a walnut | brown
a badger | grey
a rain cloud | grey
a pebble | grey
a sapphire | blue
a cornflower | blue
a bluebell | blue
"""

# word | its opposite (both directions are asked)
OPPOSITES = """
hot | cold
big | small
fast | slow
up | down
light | dark
wet | dry
loud | quiet
early | late
open | shut
full | empty
hard | soft
old | new
rich | poor
thick | thin
high | low
near | far
strong | weak
happy | sad
left | right
clean | dirty
"""

# worker | what the worker does
TRADES = """
a baker | bakes bread
a farmer | ploughs fields
a tailor | sews coats
a cobbler | mends shoes
a doctor | heals the sick
a teacher | teaches children
a pilot | flies planes
a sailor | sails ships
a fisher | catches fish
a painter | paints walls
a potter | shapes clay
a smith | forges iron
a miller | grinds wheat
a weaver | weaves cloth
a gardener | grows flowers
a mason | lays bricks
a carpenter | builds tables
a plumber | repairs pipes
a librarian | lends books
a judge | decides cases
a barber | cuts hair
a cook | makes soup
a nurse | cares for patients
a postman | brings letters
a shepherd | guards sheep
a beekeeper | keeps bees
a miner | digs coal
a clockmaker | repairs clocks
a jeweller | sets gems
a keeper | tends the lamp
"""

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)

LARGEST_TERM = 10

QUESTIONS = {
    "sound": ("What sound does {0} make?", "What noise does {0} make?", "How does {0} sound?"),
    "home": ("Where does {0} live?", "Where can I find {0}?", "Where is the home of {0}?"),
    "food": ("What does {0} eat?", "Which food does {0} like?", "What is the food of {0}?"),
    "young": ("What is the young of {0} called?", "What do you call the young of {0}?", "Name the young of {0}."),
    "capital": ("What is the capital of {0}?", "Which city is the capital of {0}?", "Name the capital of {0}."),
    "colour": ("What colour is {0}?", "Which colour does {0} have?", "Name the colour of {0}."),
    "opposite": ("What is the opposite of {0}?", "Which word is the opposite of {0}?", "Name the opposite of {0}."),
    "calendar": ("What comes {1} {0}?", "Name what comes {1} {0}.", "Can you tell me what comes {1} {0}?"),
    "trade": ("Who {0}?", "Which worker {0}?", "Can you tell me who {0}?"),
    "sum": ("What is {0} plus {1}?", "How much is {0} plus {1}?", "Please add {0} and {1}."),
    "difference": ("What is {0} minus {1}?", "How much is {0} minus {1}?", "Please take {1} from {0}."),
}


def all_facts() -> list[Fact]:
    """Return every fact, in a fixed order."""
    return [*_animal_facts(), *_pair_facts(), *_calendar_facts(), *_number_facts()]


def rows(table: str) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each line of one of the tables above."""
    for line in table.strip().splitlines():
        yield tuple(cell.strip() for cell in line.split("|"))


def with_article(noun: str) -> str:
    """Return ``noun`` after ``a`` or ``an``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _fact(topic: str, statement: str, *slots: object) -> Fact:
    return Fact(topic, statement, tuple(question.format(*slots) for question in QUESTIONS[topic]))


def _animal_facts() -> Iterator[Fact]:
    for name, sound, home, food, young in rows(ANIMALS):
        animal = with_article(name)
        yield _fact("sound", f"{animal} {sound}", animal)
        yield _fact("home", f"{animal} lives {home}", animal)
        yield _fact("food", f"{animal} eats {food}", animal)
        yield _fact("young", f"a young {name} is called {with_article(young)}", animal)


def _pair_facts() -> Iterator[Fact]:
    for country, city in rows(CAPITALS):
        yield _fact("capital", f"the capital of {country} is {city}", country)
    for thing, colour in rows(COLOURS):
        yield _fact("colour", f"{thing} is {colour}", thing)
    for first, second in rows(OPPOSITES):
        yield _fact("opposite", f"the opposite of {first} is {second}", first)
        yield _fact("opposite", f"the opposite of {second} is {first}", second)
    for worker, work in rows(TRADES):
        yield _fact("trade", f"{worker} {work}", work)


def _calendar_facts() -> Iterator[Fact]:
    for names in (DAYS, MONTHS):
        for i, name in enumerate(names):
            yield _fact("calendar", f"{names[(i + 1) % len(names)]} comes after {name}", name, "after")
            yield _fact("calendar", f"{names[i - 1]} comes before {name}", name, "before")


def _number_facts() -> Iterator[Fact]:
    terms = range(LARGEST_TERM + 1)
    for a in terms:
        for b in terms:
            yield _fact("sum", f"{a} plus {b} is {a + b}", a, b)
            if b <= a:
                yield _fact("difference", f"{a} minus {b} is {a - b}", a, b)
