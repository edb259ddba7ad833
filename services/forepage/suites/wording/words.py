"""Describing and acting words of the suites, first names, syllables, and what they are put to."""

ADJECTIVES = """
able absent amber ample ancient angry arctic ashen awake bald bare bashful bitter blank bleak blind blond blue blunt bold
bony brash brave brief bright brisk broad broken bronze brown bumpy busy calm careful cautious cheap cheerful chilly
civil clean clear clever cloudy clumsy coarse cold comic common cool cosmic costly cozy crazy crimson crisp crooked
crude cruel curious curly damp daring dark dear decent deep dense dizzy double dreary drowsy dry dull dusty eager early
earnest easy elegant empty exact faded faint fair fancy fast feeble fierce final fine firm flat fluffy foggy fond formal
fragile frank free frequent fresh frozen frugal full funny fuzzy gentle giant glad gloomy glossy golden graceful grand
grave gray greasy great green grim gritty grumpy handsome handy happy hard harsh hasty heavy hidden hollow holy honest
huge humble hungry icy ideal idle indigo jolly joyful juicy keen kind large late lavish lazy lean level light likely
limp lively local lonely long loose loud lovely loyal lucky lunar magic major mellow merry mighty mild minor misty modern
modest moist moral muddy murky mute narrow nasty neat nervous nice nimble noble noisy normal novel numb odd old open
orange oval pale past patient perfect pink plain pleasant polite poor prime proud prudent pure purple quick quiet rapid
rare raw ready real red remote rich rigid ripe rough round royal rude rural rusty sacred sad safe salty scarlet secret
serene severe shabby shallow sharp shiny short shy silent silky silly simple sincere slick slim slow small smart smooth
snowy sober soft solar solemn solid sour spare spicy square stable stale stark steady steep stern stiff stormy strange
strict strong sturdy subtle sudden sunny sweet swift tall tame tan tart tender tense thick thin thirsty tidy tiny tired
tough tranquil tricky true upbeat urban useful vague vain vast vital vivid warm wary weak wealthy weary wet white wicked
wide wild windy wise witty wooden worried yellow young zealous
""".split()

VERBS = """
admired answered approached arranged assembled avoided balanced borrowed brushed built buried called carried carved
changed charged chased cleaned collected compared copied counted covered crossed damaged decorated delivered described
designed discovered displayed divided dragged drained dropped emptied entered examined exchanged explored failed
fastened followed folded gathered greeted guarded guided hauled helped hid ignored imagined improved inspected invented
invited joined kicked knocked labeled launched lifted loaded locked lowered marked measured mended missed mixed moved
noticed observed offered opened ordered packed painted passed patched planned planted polished praised preferred
prepared printed protected pulled pushed raised reached received recorded remembered removed repaired replaced rescued
restored returned rolled rubbed saved scattered searched shared shipped signed sketched sold sorted started stirred
stopped stored studied supplied tested tied touched traced trusted turned unlocked visited waited washed watched
weighed welcomed wrapped
""".split()

FIRST_NAMES = """
Aaron Abigail Adam Adele Agnes Alan Albert Alice Alma Amber Amos Andrea Anita Anton Arthur Astrid August Barbara Basil
Beatrice Benjamin Bernard Bertha Bianca Boris Brenda Bruno Calvin Camilla Carl Carmen Caroline Cecil Celia Charles Chloe
Clara Clement Colin Conrad Cora Cyril Daisy Damian Daphne David Deborah Dennis Diana Dominic Dora Duncan Edgar Edith
Edwin Elaine Eleanor Elias Eliza Elsa Emil Emma Eric Ernest Esther Eugene Eva Felix Fiona Flora Florence Francis Frank
Freda Gabriel Gemma George Gerald Gilbert Gloria Grace Greta Gustav Hannah Harold Harriet Hazel Hector Helen Henry
Herbert Hilda Howard Hubert Hugo Ida Igor Ingrid Irene Iris Isaac Ivan Jacob Janet Jasper Jean Jerome Joan Jonas Joseph
Judith Julia Julius Karen Karl Kate Keith Kevin Lara Laura Laurence Lena Leo Leonard Lewis Lily Linda Lionel Lisa Lola
Louis Lucas Lucy Luther Lydia Mabel Malcolm Marcus Margaret Maria Marion Martha Martin Matilda Maurice Max Mia Michael
Milo Miriam Molly Monica Morris Muriel Nadia Nancy Naomi Nathan Nicholas Nina Noah Nora Norman Olga Oliver Olivia Oscar
Otto Owen Pamela Patrick Paul Pauline Pearl Peter Petra Philip Phoebe Quentin Rachel Ralph Raymond Rebecca Regina Robert
Roland Rosa Rupert Ruth Sabina Samuel Sandra Sarah Sebastian Selma Simon Sofia Stella Stephen Susan Sylvia Teresa Thelma
Theodore Thomas Tobias Ursula Valerie Vera Victor Vincent Viola Virgil Vivian Walter Wanda Wendy Wilfred Xenia Yvonne Zoe
""".split()

ONSETS = (
    "b c d f g h j k l m n p r s t v w b c d f g h k l m n p r s t v z "
    "bl br ch cl cr dr fl fr gr pl pr qu sh sl st th tr y"
).split()
VOWELS = "a e i o u a e i o u a e i o u a e i o u ai ea ee ie oa ou".split()
CODAS = ["", "", "", "", "", "d", "l", "m", "n", "n", "r", "s", "t", "nd", "ck", "rn", "st", "th", "x"]

OCCUPATIONS = """
accountant actor archer architect astronomer baker barber beekeeper biologist blacksmith botanist brewer butcher captain
carpenter cartographer chemist clerk cobbler composer conductor cook dentist diplomat diver economist editor engineer
explorer farmer fisherman florist gardener geologist glassblower goldsmith harbormaster historian inventor jeweler
journalist judge juggler lawyer librarian linguist locksmith mathematician mechanic merchant midwife miner musician
navigator nurse optician organist painter pharmacist photographer physician pianist pilot playwright plumber poet potter
printer sailor sculptor shepherd surgeon surveyor tailor teacher translator violinist watchmaker weaver zoologist
""".split()
