"""What a user and an assistant tell each other over many sessions, and how they are asked about it.

A kind of fact is a block of five lines: name, sort of object and what the user asks for; what is said; what is
said in the test; the question; the question in the test; the answer. `{s}` is the unique thing it is about.
"""

from dataclasses import dataclass

from forepage.suites.pattern import Pattern, patterns


@dataclass(frozen=True, eq=False)
class Topic:
    """One kind of fact and its wordings for both splits; `request` is what a user says before the assistant's."""

    name: str
    object: str
    said: dict[str, Pattern]
    asked: dict[str, Pattern]
    answer: str
    request: Pattern | None = None


def _topics(table: str) -> tuple[Topic, ...]:
    return tuple(_topic(block.splitlines()) for block in table.strip().split("\n\n"))


def _topic(lines: list[str]) -> Topic:
    head, said, said_test, asked, asked_test, answer = lines
    name, thing, request = (head + "||").split("|", 2)
    return Topic(
        name,
        thing,
        {"train": Pattern(said), "test": Pattern(said_test)},
        {"train": Pattern(asked), "test": Pattern(asked_test)},
        answer,
        Pattern(request.rstrip("|").replace("/", "|")) if request.strip("|") else None,
    )


USER_FACTS = _topics("""
bought|shop
[I|We] [bought|got|picked up] the {s} [at|from] {o}.
The {s} comes from {o}, that is where I paid for it.
[Where|In which shop|From where] did I [buy|get|pick up] the {s}?
[Which shop sold me|From which store do I have] the {s}?
You bought the {s} at {o}.

cost|price
[I|We] paid {o} dollars for the {s}.
The {s} set me back {o} dollars.
[How much|How many dollars] did I [pay|spend] [for|on] the {s}?
[By how many dollars did|What amount did] the {s} set me back?
You paid {o} dollars for the {s}.

gift|name
[My|The] {s} [was a gift|is a present|came as a present] from {o}.
{o} [gave me|surprised me with] the {s}.
[Who gave me|From whom did I get|Who was it that gave me] the {s}?
[To whom do I owe|Whose present is] the {s}?
{o} gave you the {s}.

called|madeup
I [named|called] [my|the] {s} {o}.
[Since we got it|From day one], the {s} has gone by the name of {o}.
[What did I name|How did I call|What name did I give] [my|the] {s}?
[By what name does|Under what name goes] my {s}[ go|]?
You named the {s} {o}.

kept|place
I [keep|store|left] [my|the] {s} [at my cabin|in a shed|with friends] in {o}.
[My|The] {s} is waiting in {o} until I need it.
[In which town|Where] do I [keep|store] [my|the] {s}?
[To which town must I go for|Where is] the {s}[ now|]?
You keep the {s} in {o}.
""")

ASSISTANT_FACTS = _topics("""
recommended|madeup|[Can/Could] you [recommend/suggest] [a brand/a shop/someone] for [a/my] {s}?
[I would|I can] [recommend|suggest] {o} for [a|the|your] {s}.
For the {s}, [have a look at|go with] {o}.
[What|Which one] did you [recommend|suggest] for [the|my] {s}?
[Whom|What] did you [name|bring up] when I wanted help with the {s}?
I recommended {o} for the {s}.

heated|degrees|[How/At what heat] should [I/we] [dry/warm/treat] [a/my/the] {s}?
[Keep|Warm|Treat] the {s} at {o} degrees[.| for an hour.|, not more.]
[Set the dial to|Stay at] {o} degrees with the {s}.
[At how many degrees|At what temperature] did you [tell me|say] to [keep|treat] the {s}?
[What should the dial show|Which temperature was your advice] for the {s}?
I said {o} degrees for the {s}.

steps|small|[How many/What number of] [rows/turns/parts] does [a/my/the] {s} need?
[A|The] {s} needs {o} [of them|in all|to be safe].
[Count on|Plan with] {o} for the {s}.
[How many|What number] did you say [a|the] {s} needs?
[With how many|What count] should I plan for the {s}, as you told me?
I said that the {s} needs {o}.
""")

PREFERENCES = _topics("""
likes|madeup
[When it comes to|As for|With] {s}, I [much prefer|always choose|really like] {o}.
For {s} nothing beats {o}, if you ask me.
[Can|Could] you [suggest|recommend|propose] [something|a brand|what to get] for {s} that [I would like|fits my taste]?
[Choose for me, knowing my taste:|Order on my behalf:] what should it be for {s}?
You prefer {o} for {s}, so I suggest {o}.
""")

COLLECTIONS = _topics("""
project|things
For the {s} [project|plan], I [bought|ordered|borrowed] the {o} [today|this week|just now].
The {s} project [moved on|grew]: I now have the {o}.
[What|Which things] did I [buy|order|get] for the {s} project?
[Sum up|Collect] what I have for the {s} project.
For the {s} project you got the {o}.

visits|place
[On|During] my {s} tour, I [visited|stopped in|saw] {o}.
[The {s} tour took me|My {s} tour led] to {o}.
[Which towns|What places] did I [visit|see] on my {s} tour?
[Where has the {s} tour taken me|Through which towns did the {s} tour lead]?
On your {s} tour you visited {o}.

guests|name
{o} [will come|said yes|is coming] to the {s} party.
[Put down|Count in] {o} for the {s} party.
[Who|Which people] [will come|is coming] to the {s} party?
[Who is on the list|Whom did I count in] for the {s} party?
{o} will come to the {s} party.
""")

COUNT_QUESTIONS = {
    "project": (
        "How many things did I [buy|get] for the {s} project?",
        "[What is the count of|To how many come] the things for the {s} project?",
    ),
    "visits": (
        "How many towns did I [visit|see] on my {s} tour?",
        "[To how many towns|Through how many towns] did my {s} tour lead?",
    ),
    "guests": (
        "How many people [will come|are coming] to the {s} party?",
        "[What is the head count|For how many do I cook] at the {s} party?",
    ),
}

UPDATES = _topics("""
code|digits
The [code|number] of my {s} is [now |]{o}.
[They changed|I had them change] the number of my {s}: {o}.
[What is|Which is|Tell me] the [current|latest] [code|number] of my {s}?
[As of today|By now], what is the number of my {s}?
The number of your {s} is {o}.

place|place
[I|We] [keep|have] the {s} in {o} [now|these days|from today].
The {s} [moved|was moved] to {o}.
[Where|In which town] [do I keep|is] the {s} [now|at present|currently]?
[As of today|By now], in which town is the {s}?
The {s} is in {o} now.

owner|name
{o} [takes care of|looks after|is in charge of] the {s} [now|from today].
The {s} [is|lies] in the hands of {o} [now|these days].
Who [takes care of|looks after|is in charge of] the {s} [now|at present|currently]?
[As of today|By now], in whose hands is the {s}?
{o} takes care of the {s} now.
""")

EVENTS = _topics("""
fixed|none
[Today|This morning|An hour ago] I [finally |]fixed the {s}.
The {s} [is fixed at last|works again], I did it today.
[When|On which date] did I fix the {s}?
[Which day saw me fix|Under what date did I fix] the {s}?
You fixed the {s} on {o}.

sold|none
[Today|This morning|An hour ago] I [finally |]sold the {s}.
The {s} [is gone|has a new owner], I sold it today.
[When|On which date] did I sell the {s}?
[Which day saw me sell|Under what date did I sell] the {s}?
You sold the {s} on {o}.

painted|none
[Today|This morning|An hour ago] I [finally |]painted the {s}.
The {s} [has fresh color|looks new], I painted it today.
[When|On which date] did I paint the {s}?
[Which day saw me paint|Under what date did I paint] the {s}?
You painted the {s} on {o}.
""")

FIRST_QUESTIONS = {
    "train": patterns("""
[Which|What] did I [do|get done|finish] first, the {a} or the {b}?
[Which came|What was] [first|earlier], the {a} or the {b}?
"""),
    "test": patterns("""
[Of the {a} and the {b}|Between the {a} and the {b}], which was I done with first?
"""),
}
DAYS_QUESTIONS = {
    "train": patterns("""
How many days [passed|were there|went by] between the {a} and the {b}?
[Count the days|How many days are] between the {a} and the {b}[?|.]
"""),
    "test": patterns("""
[What is the gap, in days,|How long in days is it] between the {a} and the {b}?
"""),
}
ABSTAINING = "You did not mention that."

INTROS = {
    "train": (
        "I will give you several history chats between you and a user. "
        "Please answer the question based on the relevant chat history.\n\n\nHistory Chats:\n",
        "Here are our earlier chats.\n",
        "These are past conversations. Answer the question that follows them.\n",
    ),
    "test": (
        "I will give you several history chats between you and a user. "
        "Please answer the question based on the relevant chat history.\n\n\nHistory Chats:\n",
        "What we talked about so far, exported from the app:\n",
    ),
}

REPLIES = {
    "train": Pattern(
        "[Noted|Good to know|Thanks for telling me|I see|Understood|Great|Sounds good][.|!|, thank you.|, I will remember that.]"
    ),
    "test": Pattern("[All right|Fine|Okay then|Got it][.|, I have that.]"),
}
