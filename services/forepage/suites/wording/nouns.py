"""Common English words, written down for the suites: what keys, topics and filler are made of."""

NOUNS = """
acorn album alley almond anchor angle ankle antler apple apron arch armor arrow artist atlas attic autumn avenue axle
badge baker balcony ballot bamboo banjo banner barber barge barley barn barrel basin basket battery beacon beaver
bench berry bicycle bishop blanket blender blossom boiler bonnet border bottle boulder bouquet bracket branch bread
bridge brook broom brush bucket buckle buffalo bugle builder bulb bundle bunker butter button cabin cabinet cable
cactus camel camera canal candle cannon canoe canvas canyon caravan carbon cargo carpet carriage castle cattle cedar
cellar cello chain chair chalk chapel charcoal cheese cherry chimney chisel cider cinema circle circus citadel clarinet
clay cliff clinic cloak clock cloud clover coach coal cobbler coconut coffee collar colony column comet compass
concert cookie copper coral cork corner cottage cotton couch courier cousin coyote cradle crane crater crayon creek
cricket crown crystal cupboard curtain cushion cyclone daisy dancer dawn deer desert desk diamond diary dinner doctor
dolphin donkey door dragon drawer dream drum duchess eagle easel echo elbow elder elephant elm ember emerald engine
engineer envelope estate evening fabric falcon farmer feather fence fern ferry festival fiddle field finch flag flame
flannel flask flower flute forest forge fork fossil fountain fox frame freight frost furnace gallery garage garden
garlic garnet gate gazelle geyser ginger giraffe glacier glass globe glove goat goblet gondola goose gorge granite
grape gravel grove guitar gull gutter hammer hammock harbor harness harp harvest hatch hawk hazel hedge helmet herald
heron highway hill hinge holly honey hook horizon horn hornet horse hospital hotel hound hunter icicle inlet insect
island ivory jacket jaguar jar jasmine jelly jewel jockey journal jungle juniper kayak kennel kettle kitchen kite
kitten ladder lagoon lake lamp lantern larch lark lattice laurel lava lawyer leaf leather ledger lemon lens leopard
letter library lichen lilac lily lime lion lizard llama lobby lobster locket locust lodge loom lotus lumber lynx
magnet mallet mango mansion mantle maple marble market marmot marsh mason meadow medal melon merchant meteor mill
mineral mirror mitten monarch monk moose mosaic moss moth motor mountain mulberry museum mushroom musket mustard
napkin necklace needle nephew nest nettle novel nugget nurse nutmeg oak oasis oboe ocean octopus olive onion opal
orange orbit orchard orchid organ osprey otter oven owl oyster paddle painter palace panther paper parade parcel parrot
pasture path patio pavilion peach peacock pear pebble pelican pencil pepper perch petal piano picnic pier pigeon pillar
pillow pilot pine pirate pistol planet plaza plum pocket poet pond pony poplar poppy porch portrait potato potter
powder prairie prince printer prism puddle pulley pump pumpkin puppet puzzle pyramid quarry quartz quill quilt rabbit
radio radish raft railway rain raisin ranch raven reef ribbon rice ridge river robin rocket roof rope rose ruby rudder
saddle sailor salad salmon sandal sapphire satchel saucer sausage scarf school scissors scooter sculptor seal season
shadow shed shell shelter shield ship shoe shovel shrine silver singer skeleton sketch sleigh slipper smoke snail soap
sofa soldier spade sparrow spear sphere spice spider spindle spiral sponge spoon spring spruce squirrel stable stadium
stairway statue steam steeple stone stork storm stove stream street studio sugar suitcase summer summit sunset swallow
swan sword table tailor tapestry tapir teacher teapot temple tent terrace theater thimble thistle thread throne thunder
ticket tiger timber toast tomato torch tortoise tower tractor trail train treasure trellis triangle trumpet tulip tunnel
turkey turnip turtle umbrella unicorn valley vase velvet verse village vineyard viola violet violin volcano voyage
waffle wagon walnut walrus warden watch waterfall weasel weaver whale wharf wheat wheel whistle widow willow window
winter wizard wolf wool wren wrench writer yacht yard zebra zephyr zipper
""".split()
