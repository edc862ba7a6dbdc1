"""
The facts of the primer, as tables: countries, elements, animals, colours and so on.

`fact_table()` turns the tables into facts (relation, subject, answer). Accents are left out (Yaounde, Brasilia), so
that a small vocabulary can spell all names in plain letters.
"""

from dataclasses import dataclass
from functools import cache

# The 193 members and two observer states of the United Nations, each on one continent: North America includes Central
# America and the Caribbean; Russia counts to Europe; Turkey, Cyprus, Georgia, Armenia, Azerbaijan and Kazakhstan to
# Asia; Egypt to Africa. Countries with several capitals have one here: Bolivia's constitutional one, South Africa's
# and Eswatini's seats of government, Sri Lanka's and Benin's official ones; Nauru's is the seat of its government.
# "-": contested capitals are left out. So are territories whose statehood is disputed, since "country" takes a side.
COUNTRIES = {
    "Africa": """
Algeria: Algiers; Angola: Luanda; Benin: Porto-Novo; Botswana: Gaborone; Burkina Faso: Ouagadougou; Burundi: Gitega;
Cameroon: Yaounde; Cape Verde: Praia; the Central African Republic: Bangui; Chad: N'Djamena; the Comoros: Moroni;
the Democratic Republic of the Congo: Kinshasa; the Republic of the Congo: Brazzaville; Djibouti: Djibouti;
Egypt: Cairo; Equatorial Guinea: Malabo; Eritrea: Asmara; Eswatini: Mbabane; Ethiopia: Addis Ababa; Gabon: Libreville;
the Gambia: Banjul; Ghana: Accra; Guinea: Conakry; Guinea-Bissau: Bissau; Ivory Coast: Yamoussoukro; Kenya: Nairobi;
Lesotho: Maseru; Liberia: Monrovia; Libya: Tripoli; Madagascar: Antananarivo; Malawi: Lilongwe; Mali: Bamako;
Mauritania: Nouakchott; Mauritius: Port Louis; Morocco: Rabat; Mozambique: Maputo; Namibia: Windhoek; Niger: Niamey;
Nigeria: Abuja; Rwanda: Kigali; Sao Tome and Principe: Sao Tome; Senegal: Dakar; Seychelles: Victoria;
Sierra Leone: Freetown; Somalia: Mogadishu; South Africa: Pretoria; South Sudan: Juba; Sudan: Khartoum;
Tanzania: Dodoma; Togo: Lome; Tunisia: Tunis; Uganda: Kampala; Zambia: Lusaka; Zimbabwe: Harare""",
    "Asia": """
Afghanistan: Kabul; Armenia: Yerevan; Azerbaijan: Baku; Bahrain: Manama; Bangladesh: Dhaka; Bhutan: Thimphu;
Brunei: Bandar Seri Begawan; Cambodia: Phnom Penh; China: Beijing; Cyprus: Nicosia; Georgia: Tbilisi; India: New Delhi;
Indonesia: Jakarta; Iran: Tehran; Iraq: Baghdad; Israel: -; Japan: Tokyo; Jordan: Amman; Kazakhstan: Astana;
Kuwait: Kuwait City; Kyrgyzstan: Bishkek; Laos: Vientiane; Lebanon: Beirut; Malaysia: Kuala Lumpur; the Maldives: Male;
Mongolia: Ulaanbaatar; Myanmar: Naypyidaw; Nepal: Kathmandu; North Korea: Pyongyang; Oman: Muscat; Pakistan: Islamabad;
Palestine: -; the Philippines: Manila; Qatar: Doha; Saudi Arabia: Riyadh; Singapore: Singapore; South Korea: Seoul;
Sri Lanka: Sri Jayawardenepura Kotte; Syria: Damascus; Tajikistan: Dushanbe; Thailand: Bangkok; Timor-Leste: Dili;
Turkey: Ankara; Turkmenistan: Ashgabat; the United Arab Emirates: Abu Dhabi; Uzbekistan: Tashkent; Vietnam: Hanoi;
Yemen: Sanaa""",
    "Europe": """
Albania: Tirana; Andorra: Andorra la Vella; Austria: Vienna; Belarus: Minsk; Belgium: Brussels;
Bosnia and Herzegovina: Sarajevo; Bulgaria: Sofia; Croatia: Zagreb; Czechia: Prague; Denmark: Copenhagen;
Estonia: Tallinn; Finland: Helsinki; France: Paris; Germany: Berlin; Greece: Athens; Hungary: Budapest;
Iceland: Reykjavik; Ireland: Dublin; Italy: Rome; Latvia: Riga; Liechtenstein: Vaduz; Lithuania: Vilnius;
Luxembourg: Luxembourg City; Malta: Valletta; Moldova: Chisinau; Monaco: Monaco; Montenegro: Podgorica;
the Netherlands: Amsterdam; North Macedonia: Skopje; Norway: Oslo; Poland: Warsaw; Portugal: Lisbon; Romania: Bucharest;
Russia: Moscow; San Marino: San Marino; Serbia: Belgrade; Slovakia: Bratislava; Slovenia: Ljubljana; Spain: Madrid;
Sweden: Stockholm; Switzerland: Bern; Ukraine: Kyiv; the United Kingdom: London; Vatican City: Vatican City""",
    "North America": """
Antigua and Barbuda: Saint John's; the Bahamas: Nassau; Barbados: Bridgetown; Belize: Belmopan; Canada: Ottawa;
Costa Rica: San Jose; Cuba: Havana; Dominica: Roseau; the Dominican Republic: Santo Domingo; El Salvador: San Salvador;
Grenada: Saint George's; Guatemala: Guatemala City; Haiti: Port-au-Prince; Honduras: Tegucigalpa; Jamaica: Kingston;
Mexico: Mexico City; Nicaragua: Managua; Panama: Panama City; Saint Kitts and Nevis: Basseterre; Saint Lucia: Castries;
Saint Vincent and the Grenadines: Kingstown; Trinidad and Tobago: Port of Spain; the United States: Washington""",
    "South America": """
Argentina: Buenos Aires; Bolivia: Sucre; Brazil: Brasilia; Chile: Santiago; Colombia: Bogota; Ecuador: Quito;
Guyana: Georgetown; Paraguay: Asuncion; Peru: Lima; Suriname: Paramaribo; Uruguay: Montevideo; Venezuela: Caracas""",
    "Oceania": """
Australia: Canberra; Fiji: Suva; Kiribati: South Tarawa; the Marshall Islands: Majuro; Micronesia: Palikir;
Nauru: Yaren; New Zealand: Wellington; Palau: Ngerulmud; Papua New Guinea: Port Moresby; Samoa: Apia;
the Solomon Islands: Honiara; Tonga: Nuku'alofa; Tuvalu: Funafuti; Vanuatu: Port Vila""",
}

# The language most spoken in public life, for countries where there is one.
LANGUAGES = """
France: French; Germany: German; Austria: German; Spain: Spanish; Mexico: Spanish; Argentina: Spanish; Cuba: Spanish;
Chile: Spanish; Colombia: Spanish; Venezuela: Spanish; Italy: Italian; Portugal: Portuguese; Brazil: Portuguese;
Angola: Portuguese; China: Chinese; Japan: Japanese; Russia: Russian; the United States: English;
the United Kingdom: English; Australia: English; Jamaica: English; Egypt: Arabic; Saudi Arabia: Arabic; Jordan: Arabic;
Greece: Greek; Turkey: Turkish; Poland: Polish; Sweden: Swedish; Norway: Norwegian; Denmark: Danish; Finland: Finnish;
Hungary: Hungarian; the Netherlands: Dutch; Thailand: Thai; Vietnam: Vietnamese; Iran: Persian; Ukraine: Ukrainian;
Iceland: Icelandic; Romania: Romanian; Bulgaria: Bulgarian; South Korea: Korean; Mongolia: Mongolian; Albania: Albanian;
Lithuania: Lithuanian; Czechia: Czech; Croatia: Croatian; Armenia: Armenian; Bangladesh: Bengali; Cambodia: Khmer"""

# In order of atomic number, from 1.
ELEMENTS = """
hydrogen H; helium He; lithium Li; beryllium Be; boron B; carbon C; nitrogen N; oxygen O; fluorine F; neon Ne;
sodium Na; magnesium Mg; aluminium Al; silicon Si; phosphorus P; sulfur S; chlorine Cl; argon Ar; potassium K;
calcium Ca; scandium Sc; titanium Ti; vanadium V; chromium Cr; manganese Mn; iron Fe; cobalt Co; nickel Ni; copper Cu;
zinc Zn; gallium Ga; germanium Ge; arsenic As; selenium Se; bromine Br; krypton Kr; rubidium Rb; strontium Sr;
yttrium Y; zirconium Zr; niobium Nb; molybdenum Mo; technetium Tc; ruthenium Ru; rhodium Rh; palladium Pd; silver Ag;
cadmium Cd; indium In; tin Sn; antimony Sb; tellurium Te; iodine I; xenon Xe; caesium Cs; barium Ba; lanthanum La;
cerium Ce; praseodymium Pr; neodymium Nd; promethium Pm; samarium Sm; europium Eu; gadolinium Gd; terbium Tb;
dysprosium Dy; holmium Ho; erbium Er; thulium Tm; ytterbium Yb; lutetium Lu; hafnium Hf; tantalum Ta; tungsten W;
rhenium Re; osmium Os; iridium Ir; platinum Pt; gold Au; mercury Hg; thallium Tl; lead Pb; bismuth Bi; polonium Po;
astatine At; radon Rn; francium Fr; radium Ra; actinium Ac; thorium Th; protactinium Pa; uranium U; neptunium Np;
plutonium Pu; americium Am; curium Cm; berkelium Bk; californium Cf; einsteinium Es; fermium Fm; mendelevium Md;
nobelium No; lawrencium Lr; rutherfordium Rf; dubnium Db; seaborgium Sg; bohrium Bh; hassium Hs; meitnerium Mt;
darmstadtium Ds; roentgenium Rg; copernicium Cn; nihonium Nh; flerovium Fl; moscovium Mc; livermorium Lv;
tennessine Ts; oganesson Og"""

# animal: class, young, sound (verb), home, legs; "-" where there is no single plain answer.
ANIMALS = """
dog: mammal, puppy, bark, kennel, four; cat: mammal, kitten, meow, -, four; cow: mammal, calf, moo, barn, four;
horse: mammal, foal, neigh, stable, four; sheep: mammal, lamb, bleat, fold, four; goat: mammal, kid, bleat, -, four;
pig: mammal, piglet, oink, sty, four; donkey: mammal, foal, bray, stable, four; lion: mammal, cub, roar, den, four;
tiger: mammal, cub, roar, den, four; bear: mammal, cub, growl, den, four; wolf: mammal, pup, howl, den, four;
fox: mammal, cub, bark, den, four; rabbit: mammal, kit, -, burrow, four; mouse: mammal, pup, squeak, hole, four;
elephant: mammal, calf, trumpet, -, four; deer: mammal, fawn, -, -, four; giraffe: mammal, calf, -, -, four;
camel: mammal, calf, grunt, -, four; squirrel: mammal, kit, chatter, drey, four; badger: mammal, cub, -, sett, four;
beaver: mammal, kit, -, lodge, four; otter: mammal, pup, -, holt, four; bat: mammal, pup, squeak, roost, -;
whale: mammal, calf, sing, -, no; dolphin: mammal, calf, click, -, no; kangaroo: mammal, joey, -, -, -;
monkey: mammal, infant, chatter, -, -; zebra: mammal, foal, -, -, four; hedgehog: mammal, hoglet, -, nest, four;
hen: bird, chick, cluck, coop, two; duck: bird, duckling, quack, nest, two; goose: bird, gosling, honk, nest, two;
swan: bird, cygnet, -, nest, two; owl: bird, owlet, hoot, nest, two; eagle: bird, eaglet, screech, eyrie, two;
turkey: bird, poult, gobble, -, two; pigeon: bird, squab, coo, loft, two; crow: bird, chick, caw, nest, two;
sparrow: bird, chick, chirp, nest, two; penguin: bird, chick, -, -, two; ostrich: bird, chick, -, -, two;
parrot: bird, chick, squawk, nest, two; rooster: bird, -, crow, coop, two; frog: amphibian, tadpole, croak, pond, four;
toad: amphibian, tadpole, croak, -, four; newt: amphibian, -, -, pond, four; snake: reptile, hatchling, hiss, -, no;
crocodile: reptile, hatchling, -, -, four; lizard: reptile, hatchling, -, -, four; turtle: reptile, hatchling, -, -, -;
tortoise: reptile, hatchling, -, -, four; shark: fish, pup, -, sea, no; salmon: fish, fry, -, -, no;
trout: fish, fry, -, -, no; herring: fish, -, -, sea, no; tuna: fish, -, -, sea, no;
bee: insect, larva, buzz, hive, six; ant: insect, larva, -, anthill, six; wasp: insect, larva, buzz, nest, six;
butterfly: insect, caterpillar, -, -, six; moth: insect, caterpillar, -, -, six; beetle: insect, larva, -, -, six;
cricket: insect, nymph, chirp, -, six; fly: insect, maggot, buzz, -, six;
spider: arachnid, spiderling, -, web, eight; scorpion: arachnid, -, -, -, eight"""
ANIMAL_RELATIONS = ("animal_class", "young", "sound", "home", "legs")
PLURALS = dict(
    entry.split(": ")
    for entry in "wolf: wolves, mouse: mice, goose: geese, fox: foxes, fly: flies, ostrich: ostriches, sheep: sheep, "
    "butterfly: butterflies, deer: deer, salmon: salmon, trout: trout, herring: herring, tuna: tuna".split(", ")
)

OPPOSITES = """
hot: cold; big: small; tall: short; fast: slow; young: old; happy: sad; day: night; up: down; left: right; open: closed;
full: empty; wet: dry; loud: quiet; heavy: light; rich: poor; strong: weak; clean: dirty; good: bad; early: late;
hard: soft; high: low; near: far; thick: thin; wide: narrow; true: false; win: lose; push: pull; give: take; buy: sell;
begin: end; in: out; above: below; before: after; first: last; inside: outside; easy: difficult; brave: afraid;
sharp: blunt; deep: shallow; sweet: sour; smooth: rough; asleep: awake; alive: dead; always: never; love: hate;
east: west; north: south; black: white; yes: no; more: less; many: few; safe: dangerous; tight: loose; laugh: cry"""

COLOURS = """
grass: green; snow: white; coal: black; a ripe lemon: yellow; a ripe banana: yellow; a ripe strawberry: red; blood: red;
the clear sky by day: blue; a carrot: orange; a pumpkin: orange; an emerald: green; a ruby: red; a sapphire: blue;
chocolate: brown; milk: white; a flamingo: pink; a raven: black; a polar bear: white; spinach: green; salt: white;
an elephant: grey; an egg yolk: yellow; a sunflower: yellow; a ripe tomato: red; an aubergine: purple; tar: black;
a lavender flower: purple; broccoli: green; cotton: white; mud: brown; ash: grey"""
COLOUR_NAMES = ("red", "blue", "yellow", "green", "orange", "purple", "pink", "brown", "black", "white", "grey")
MIXTURES = """red and yellow: orange; blue and yellow: green; red and blue: purple; black and white: grey;
red and white: pink"""

MONTHS = "January 31, February 28, March 31, April 30, May 31, June 30, July 31, August 31, September 30, October 31, \
November 30, December 31"
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLANETS = ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
            "twelfth")  # fmt: skip
SMALL_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()

UNITS = """
minutes in an hour: 60; seconds in a minute: 60; hours in a day: 24; days in a week: 7; months in a year: 12;
days in an ordinary year: 365; weeks in a year: 52; years in a century: 100; years in a decade: 10; eggs in a dozen: 12;
centimetres in a metre: 100; metres in a kilometre: 1000; grams in a kilogram: 1000; millimetres in a centimetre: 10;
millilitres in a litre: 1000; inches in a foot: 12; feet in a yard: 3; cents in a dollar: 100; pence in a pound: 100;
seasons in a year: 4; letters in the English alphabet: 26; planets in the solar system: 8; sides in a triangle: 3;
sides in a square: 4; sides in a pentagon: 5; sides in a hexagon: 6; sides in a heptagon: 7; sides in an octagon: 8"""

# Descriptions and what they describe. The wrong choices for an answer come from its own group.
KNOWN = """
the largest planet: Jupiter; the smallest planet: Mercury; the hottest planet: Venus; the planet called the red
planet: Mars; the planet we live on: Earth; the planet farthest from the Sun: Neptune

the tallest animal: the giraffe; the largest animal: the blue whale; the fastest land animal: the cheetah; the largest
bird: the ostrich; the largest land animal: the elephant; the king of the beasts: the lion

the largest country: Russia; the smallest country: Vatican City; the country with the Great Wall: China; the country
with the Eiffel Tower: France; the country with the pyramids of Giza: Egypt; the country with the Taj Mahal: India

the gas we need to breathe: oxygen; the most common gas in the air: nitrogen; the lightest element: hydrogen; the
metal in a magnet: iron; the metal that is liquid in a warm room: mercury; the gas in party balloons: helium

the shortest month: February; the month of Christmas: December; the first month of the year: January; the month with
Halloween: October

the frozen form of water: ice; the water that falls from clouds: rain; the hot form of water: steam; the salty water
that covers most of the Earth: the sea

the largest ocean: the Pacific; the ocean between Europe and America: the Atlantic; the ocean around the North Pole:
the Arctic; the ocean south of India: the Indian Ocean

the part of the body that pumps blood: the heart; the part of the body that thinks: the brain; the part of the body
that sees: the eye; the part of the body that hears: the ear; the part of the body that smells: the nose

the person who flies a plane: the pilot; the person who bakes bread: the baker; the person who teaches children: the
teacher; the person who grows food: the farmer; the person who puts out fires: the firefighter; the person who cuts
hair: the barber

the tool for cutting paper: a pair of scissors; the tool for hitting nails: a hammer; the tool for telling the time: a
clock; the tool for sweeping the floor: a broom; the tool for digging: a spade; the tool for opening a lock: a key"""

# The people of the stories and dialogues.
CAST_FIELDS = ("name", "possessive", "pet", "pet_name", "home", "colour", "food", "hobby")  # the last three: favourites
CAST = """
Anna, her, cat, Milo, a red house by the river, blue, apple pie, painting
Ben, his, dog, Rusty, a farm on the hill, green, pancakes, football
Clara, her, rabbit, Snow, a small house in the village, yellow, carrots, reading
David, his, horse, Star, a farm near the forest, brown, bread and cheese, riding
Ella, her, parrot, Kiki, a flat in the city, orange, noodles, singing
Felix, his, tortoise, Slow, a boat on the lake, red, fish soup, fishing
Grace, her, goat, Daisy, a hut in the mountains, white, porridge, climbing
Hugo, his, mouse, Pip, a house above the bakery, purple, fresh bread, baking
Ida, her, duck, Puddle, a cottage by the pond, pink, potato soup, swimming
Jonas, his, pigeon, Coo, a tower in the old town, grey, rice, chess"""


@dataclass(frozen=True)
class Fact:
    relation: str
    subject: str
    answer: str


def entries(table: str) -> list[tuple[str, str]]:
    """
    >>> entries("grass: green; snow: white")
    [('grass', 'green'), ('snow', 'white')]
    """
    pairs = []
    for entry in table.replace("\n", " ").split(";"):
        subject, answer = entry.strip().rsplit(": ", 1)
        pairs.append((subject, answer))
    return pairs


SPELLING_WORDS = tuple(
    """
apple banana cherry strawberry raspberry blueberry orange lemon tomato potato carrot onion pepper cabbage butter bread
cheese cookie coffee water summer winter spring autumn window door kitchen table chair bottle pillow blanket mirror
letter pencil paper school teacher pupil lesson number hammer ladder garden flower tree forest river mountain valley
island ocean village castle bridge street market doctor farmer baker sailor soldier driver singer dancer mother father
sister brother daughter family friend rabbit kitten puppy chicken elephant giraffe kangaroo crocodile butterfly beetle
spider rocket planet galaxy moon star cloud thunder rain snow wind storm rainbow yellow purple green silver golden
happy little pretty clever strong gentle funny hungry sleepy angry coming running swimming jumping reading writing
singing balloon bicycle engine train wagon tunnel paddle needle thread button jacket mitten slipper pocket basket
barrel candle lantern puzzle marble kettle saucer pepperoni committee address success bookkeeper mississippi coconut
pineapple avocado cucumber broccoli spinach mushroom peanut almond walnut raisin muffin pancake waffle pudding noodle
""".split()
) + tuple(animal for animal, _ in entries(ANIMALS))


def number_words(number: int) -> str:
    """
    Numbers from 0 to 100 as text.

    >>> number_words(47)
    'forty-seven'
    """
    if number < 20:
        return SMALL_NUMBERS[number]
    if number == 100:
        return "one hundred"
    tens, ones = divmod(number, 10)
    if ones == 0:
        return TENS[tens - 2]
    return f"{TENS[tens - 2]}-{SMALL_NUMBERS[ones]}"


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


@cache
def fact_table() -> dict[str, list[Fact]]:
    """All facts by relation. The relations known:0, known:1, … share the wordings of "known"."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    pairs["capital"], pairs["continent"] = [], []
    for continent, table in COUNTRIES.items():
        for country, capital in entries(table):
            pairs["continent"].append((country, continent))
            if capital != "-":
                pairs["capital"].append((country, capital))
    pairs["language"] = entries(LANGUAGES)
    elements = [entry.split() for entry in ELEMENTS.replace("\n", " ").split(";")]
    pairs["symbol"] = [(name, symbol) for name, symbol in elements]
    pairs["atomic_number"] = [(name, str(number)) for number, (name, _) in enumerate(elements, 1)]
    for animal, columns in entries(ANIMALS):
        for relation, answer in zip(ANIMAL_RELATIONS, columns.split(", "), strict=True):
            if answer != "-":
                pairs.setdefault(relation, []).append((animal, answer))
    opposites = entries(OPPOSITES)
    pairs["opposite"] = opposites + [(b, a) for a, b in opposites]
    pairs["colour"] = entries(COLOURS)
    mixtures = entries(MIXTURES)
    swapped = [(" and ".join(reversed(colours.split(" and "))), result) for colours, result in mixtures]
    pairs["mixture"] = mixtures + swapped
    pairs |= _calendar()
    pairs["planet"] = list(zip(PLANETS, ORDINALS, strict=False))
    pairs["number_word"] = [(str(n), number_words(n)) for n in [*range(41), *range(50, 101, 10)]]
    letters = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    pairs["letter_after"] = list(zip(letters, letters[1:], strict=False))
    pairs["unit"] = entries(UNITS)
    for i, group in enumerate(KNOWN.strip().split("\n\n")):
        pairs[f"known:{i}"] = entries(group)
    return {name: [Fact(name, subject, answer) for subject, answer in rows] for name, rows in pairs.items()}


def _calendar() -> dict[str, list[tuple[str, str]]]:
    days_of_month = dict(entry.split() for entry in MONTHS.split(", "))
    months = list(days_of_month)
    return {
        "month_days": list(days_of_month.items()),
        "month_order": list(zip(months, ORDINALS, strict=True)),
        "month_after": list(zip(months, months[1:] + months[:1], strict=True)),
        "month_before": list(zip(months, months[-1:] + months[:-1], strict=True)),
        "day_after": list(zip(DAYS, DAYS[1:] + DAYS[:1], strict=True)),
        "day_before": list(zip(DAYS, DAYS[-1:] + DAYS[:-1], strict=True)),
    }
