"""The words the checkable prompts are made of."""

from __future__ import annotations

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS: Final = _words(
    """
    acorn actor album almond amber anchor ankle antler apple apricot apron archer arrow artist
    aspen atlas attic autumn avocado axle badge badger bagel baker balcony balloon bamboo banana
    banjo barley barn barrel basil basket beach bean bear beaver beetle bell bench berry bicycle
    birch biscuit blanket blossom boat bottle boulder bracelet branch bread brick bridge bronze
    brook broom brush bucket buffalo butter button cabbage cabin cactus camel camera candle canoe
    canyon captain caravan carpet carrot castle cedar cello cement cereal chair chalk cherry chess
    chimney cinnamon circus clay cliff clock cloud clover coast cobalt coconut coffee comet compass
    copper coral corn cotton cousin crab cradle crane crayon cricket crow crown crystal cube
    cucumber curtain cushion daisy dancer dawn deer desert desk diamond diary doctor dolphin donkey
    door dragon drawer drum duck dune dust eagle earth easel echo elbow elephant elk elm ember
    emerald engine envelope evening fabric falcon farmer feather fence fern ferry field fig finger
    flag flame flower flute fog forest fork fossil fountain fox frog frost fruit funnel galaxy
    garden garlic gate gecko ginger giraffe glacier glass globe glove goat gold goose grain granite
    grape grass guitar hammer hamster harbor harp hat hawk hazel hedge helmet heron hill honey hood
    horizon horse hotel house ice igloo iguana ink insect iris iron island ivory ivy jacket jaguar
    jam jar jasmine jelly jewel journal judge juice jungle kayak kettle key kitchen kite kitten
    kiwi knee knife knot koala ladder lagoon lake lamb lamp lantern lark lava lawn leaf leather
    lemon leopard library lily lime linen lion lizard lobster locket lotus lynx magnet mango map
    maple marble market meadow melon metal meteor milk mint mirror mitten monkey moon moose morning
    moss moth motor mountain mouse museum mushroom music napkin nectar needle nest night noodle
    north nurse nut oak oasis oat ocean octopus olive onion opal orange orbit orchard orchid otter
    oven owl oyster paddle paint palace palm panda panther paper parrot pasta peach peacock pear
    pebble pelican pencil penguin pepper piano picnic pigeon pillow pilot pine planet plaza plum
    pocket poem pond pony poplar potato prairie puddle pumpkin puppet puzzle quail quarry quartz
    queen quilt quiver rabbit raccoon radio raft rain raisin raven ribbon rice river robin rocket
    roof rope rose ruby rug saddle saffron sail salad salmon salt sand sandal sapphire satin saucer
    scarf school scooter seal season seed shadow shark sheep shell shovel silk silver singer sketch
    sleet snail snow soap sofa soup spark sparrow spice spider spoon spring squirrel stable star
    station stone storm stove straw stream sugar summer sun swan sweater sword tailor tea teacher
    temple tent theater thistle thread thunder tiger timber toast tomato torch towel tower tractor
    train tree trout trumpet tulip tunnel turkey turtle umbrella uncle unicorn uniform urchin urn
    valley vanilla vase vault velvet vessel village vine violet violin volcano voyage wagon wallet
    walnut walrus water wave weaver whale wheat wheel whistle willow window winter wizard wolf wool
    yacht yak yarn yeast yogurt zebra zenith zinc zipper
    """
)

NAMES: Final = _words(
    """
    Adam Agnes Alice Amir Anna Anton Bella Boris Carl Carmen Chloe Clara Daniel David Diana Elena
    Emil Emma Felix Fiona Frank George Grace Hana Hector Helen Hugo Ines Irene Ivan Jack Jane Jonas
    Julia Kara Karim Kevin Laura Leo Lina Lucas Maria Marta Max Mina Nadia Nina Noah Nora Oliver
    Olga Omar Oscar Paula Peter Priya Quentin Rachel Ravi Rosa Ruth Samir Sara Simon Sofia Stella
    Tara Theo Thomas Tina Ursula Vera Victor Viola Walter Wanda Xenia Yara Yusuf Zara
    """
)

TOWNS: Final = _words(
    """
    Aachen Basel Bergen Bilbao Bologna Boston Bremen Bristol Calgary Chicago Cordoba Dallas Denver
    Dresden Dundee Florence Geneva Genoa Ghent Granada Graz Hamburg Houston Kyoto Lagos Leeds Lille
    Lyon Malaga Malmo Miami Milan Montreal Mumbai Munich Naples Nice Osaka Oxford Palermo Perth
    Porto Quebec Reno Salzburg Seattle Seville Shanghai Sydney Tampa Toledo Toronto Turin Utrecht
    Valencia Venice Verona York Zurich
    """
)

CAPITALS: Final[dict[str, str]] = {
    "Argentina": "Buenos Aires",
    "Australia": "Canberra",
    "Austria": "Vienna",
    "Bangladesh": "Dhaka",
    "Belgium": "Brussels",
    "Brazil": "Brasilia",
    "Bulgaria": "Sofia",
    "Cambodia": "Phnom Penh",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Colombia": "Bogota",
    "Croatia": "Zagreb",
    "Cuba": "Havana",
    "Cyprus": "Nicosia",
    "Denmark": "Copenhagen",
    "Ecuador": "Quito",
    "Egypt": "Cairo",
    "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Ghana": "Accra",
    "Greece": "Athens",
    "Hungary": "Budapest",
    "Iceland": "Reykjavik",
    "India": "New Delhi",
    "Indonesia": "Jakarta",
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Jamaica": "Kingston",
    "Japan": "Tokyo",
    "Jordan": "Amman",
    "Kenya": "Nairobi",
    "Latvia": "Riga",
    "Lebanon": "Beirut",
    "Lithuania": "Vilnius",
    "Madagascar": "Antananarivo",
    "Malaysia": "Kuala Lumpur",
    "Mexico": "Mexico City",
    "Mongolia": "Ulaanbaatar",
    "Morocco": "Rabat",
    "Nepal": "Kathmandu",
    "Norway": "Oslo",
    "Pakistan": "Islamabad",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Romania": "Bucharest",
    "Russia": "Moscow",
    "Senegal": "Dakar",
    "Serbia": "Belgrade",
    "Slovakia": "Bratislava",
    "Slovenia": "Ljubljana",
    "South Korea": "Seoul",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
    "Tunisia": "Tunis",
    "Turkey": "Ankara",
    "Uganda": "Kampala",
    "Ukraine": "Kyiv",
    "Uruguay": "Montevideo",
    "Venezuela": "Caracas",
    "Vietnam": "Hanoi",
    "Zambia": "Lusaka",
    "Zimbabwe": "Harare",
}
