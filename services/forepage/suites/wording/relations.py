"""Facts about people, places, companies and books: how each is stated, asked and answered.

Each relation has wordings for training and for the test; the answer is one sentence for both, so that a good reply
states the fact first. `{s}` is who it is about, `{o}` what is said of them.
"""

from dataclasses import dataclass

from forepage.suites.pattern import Pattern


@dataclass(frozen=True, eq=False)
class Relation:
    """One kind of fact. `subject` and `object` are sorts of things (`world.py`); `noun` names the object alone."""

    name: str
    subject: str
    object: str
    noun: str
    stated: dict[str, Pattern]
    asked: dict[str, Pattern]
    answer: str


_TABLE = """
birthplace|person|place|birthplace
{s} was born in {o}#{s} [came into the world|grew up] in {o}
{s} [first saw the light of day|spent the childhood] in {o}
[In which town|Where|In what place] was {s} born?#[What is|Name] the birthplace of {s}[?|.]
[From which town does {s} come|Which town is home to {s}]?
{s} was born in {o}.

birthyear|person|year|year of birth
{s} was born in the year {o}#the year {o} saw the birth of {s}
{s} dates from {o} by the parish book
[In which year|When] was {s} born?#[What|Which] is the [birth year|year of birth] of {s}?
[What year does the parish book give for|How long ago, by year, begins the life of] {s}?
{s} was born in the year {o}.

job|person|job|occupation
{s} [worked|earned a living] as a {o}#{s} was a [well-known|respected|skilled|retired] {o}
{s} made a name as a {o}
[What was|What is] the [occupation|profession|job] of {s}?#[As what did {s} work|What did {s} do for a living]?
[Which trade did {s} follow|What was {s} by trade]?
{s} was a {o}.

school|person|place|place of study
{s} studied [at the academy of|in] {o}#{s} [took a degree|was trained] [at|in] {o}
{s} [learned the craft|went to college] in {o}
[Where|In which town] did {s} [study|take a degree]?#[At which academy|In which place] was {s} [trained|a student]?
[Which town taught {s}|Where did {s} go to college]?
{s} studied in {o}.

spouse|person|person|spouse
{s} [was married to|married] {o}#the [wedding|marriage] of {s} and {o} was [a quiet affair|much talked about]
{s} shared a house with a spouse, {o}
[Who|Whom] [was {s} married to|did {s} marry]?#Who was the [spouse|husband or wife] of {s}?
[With whom did {s} share a house|Whose spouse was {s}]?
{s} was married to {o}.

prize|person|madeup|prize
{s} [won|received|was awarded] the {o} Prize#the {o} Prize [went to|was given to] {s}
{s} [took home|accepted] the {o} Prize
Which prize did {s} [win|receive]?#[What|Which] prize [went to|was awarded to] {s}?
[Name|Tell me] the prize that {s} took home.
{s} won the {o} Prize.

country|place|country|country
{s} [is|lies] in {o}#{s} [is a town in|belongs to|is a port of] {o}
{s} [sits within the borders of|pays its taxes to] {o}
In which country [is|lies] {s}?#[Which country does {s} belong to|What country is {s} in]?
[Within whose borders is {s}|Which state has {s} in it]?
{s} lies in {o}.

river|place|madeup|river
{s} [stands|lies] on the river {o}#the river {o} [runs through|flows past] {s}
{s} [draws its water from|fishes in] the river {o}
[Which river|What river] [runs through|flows past] {s}?#On which river does {s} [stand|lie]?
[Where does {s} draw its water from|Which river feeds {s}]?
{s} lies on the river {o}.

mayor|place|person|mayor
the mayor of {s} is {o}#{o} [was elected|serves as] mayor of {s}
{s} is governed by {o}
Who is the mayor of {s}?#[Who was elected|Which person serves as] mayor of {s}?
[Who governs|Under whom stands] {s}?
The mayor of {s} is {o}.

founded|place|year|year of foundation
{s} was founded in {o}#[settlers founded|monks laid out] {s} in {o}
{s} [goes back to|has stood since] {o}
[When|In which year] was {s} founded?#[What|Which] is the founding year of {s}?
[Since when has {s} stood|To which year does {s} go back]?
{s} was founded in {o}.

export|place|nouns|export
{s} is [known|famous] for its {o}#the main export of {s} [is|are] {o}
{s} [lives by selling|sends out] {o}
[What is|For what is] {s} [known for|famous]?#What is the main export of {s}?
[What does {s} live by selling|What does {s} send out]?
{s} is known for its {o}.

founder|company|person|founder
{s} was founded by {o}#{o} [started|set up|founded] the company {s}
{s} [owes its existence to|began in the shed of] {o}
Who [founded|started|set up] {s}?#[By whom was {s} founded|Which person founded {s}]?
[To whom does {s} owe its existence|In whose shed did {s} begin]?
{s} was founded by {o}.

seat|company|place|head office
{s} has its [head office|headquarters] in {o}#the [head office|headquarters] of {s} [is|are] in {o}
{s} is run from {o}
Where [is the head office|are the headquarters] of {s}?#In which town does {s} have its [head office|headquarters]?
[From where is {s} run|Which town houses the directors of {s}]?
{s} has its head office in {o}.

product|company|nouns|product
{s} [makes|produces|sells] {o}#{s} is [known for|a maker of] {o}
{s} [turns out|lives off] {o}
What does {s} [make|produce|sell]?#[What|Which] goods does {s} [make|produce]?
[What leaves the works of|What comes out of] {s}?
{s} makes {o}.

author|book|person|author
"{s}" was written by {o}#{o} [wrote|is the author of] "{s}"
"{s}" [flowed from the pen of|is the work of] {o}
Who [wrote|is the author of] "{s}"?#[By whom was "{s}" written|Which author wrote "{s}"]?
[From whose pen is|Whose work is] "{s}"?
"{s}" was written by {o}.

published|book|year|year of publication
"{s}" was [published|printed] in {o}#[readers|shops] first saw "{s}" in {o}
"{s}" [left the press|came out] in {o}
[When|In which year] was "{s}" published?#[What|Which] is the publication year of "{s}"?
[When did "{s}" leave the press|In what year did "{s}" come out]?
"{s}" was published in {o}.
"""


def _relation(block: str) -> Relation:
    head, stated, stated_test, asked, asked_test, answer = block.splitlines()
    name, subject, thing, noun = head.split("|")
    either = "[{0}]"
    return Relation(
        name,
        subject,
        thing,
        noun,
        {"train": Pattern(either.format(stated.replace("#", "|"))), "test": Pattern(stated_test)},
        {"train": Pattern(either.format(asked.replace("#", "|"))), "test": Pattern(asked_test)},
        answer,
    )


RELATIONS = {relation.name: relation for relation in map(_relation, _TABLE.strip().split("\n\n"))}
