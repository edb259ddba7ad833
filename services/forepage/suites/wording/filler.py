"""What filler says: sentence patterns of essays, notes, records and small talk, cut in two for training and test."""

from forepage.suites.pattern import Pattern, patterns

_ESSAY = patterns("""
[The|A|Every] <adj> <noun> [that|which] we <verb> [last|that] [week|year|winter|summer] [taught|showed|reminded] us [something|a little|very little] about <nouns>.
[It|This] is [often|seldom|sometimes|usually] said that [a|the] <noun> [needs|wants|deserves] [nothing|little] but a <adj> <noun> and [some|enough] [time|patience|luck].
[People|Most people|Some people|Few people] who [work|live|grow up] [with|among|near] <nouns> [learn|come] to [distrust|love|ignore|value] the <adj> ones.
[When|Whenever|After|Before] <name> <verb> the <noun>, [nobody|everyone|no one|half the town] [noticed|talked about|asked about] the <adj> <noun>.
[In|Around|By] <year> the <noun> [had become|was still|was no longer] [a matter of|a question of] [taste|money|pride|habit], and the <noun> [along|together] with it.
[If|Unless] you [look|think|listen] [carefully|closely|long enough], [a|the] <adj> <noun> is [hardly|not much|never quite] [different from|like|better than] a <adj> one.
[One|A] reason [why|that] <nouns> are so <adj> is that [someone|nobody|the owner|the guild] <verb> them [before|after|during] the [war|flood|strike|fair].
[I|We] [once|never|always|twice] <verb> a <noun> [for|because of|instead of] a <noun>, and [I|we] [would|would not] [do it again|recommend it|call it wise].
[There|Here] [is|was] [more|less] to [say|learn|doubt] about the <adj> <noun> than [about|in] [all|most] the <nouns> of <place>.
[The trouble|The good thing|What surprises me|The lesson] [with|about] <adj> <nouns> is that [they|those] [rarely|always|only] [last|fail|matter] when the <noun> is <adj>.
[Ask|Suppose you ask] [any|an old|a young] <job> [about|for] the <noun>, and you [will|may|might] hear [a story|a complaint|a theory] about <nouns>.
[Good|Bad|Most] <nouns> [begin|end|start out] as [a|some] <adj> <noun> in [somebody's|a stranger's|a neighbor's] [kitchen|garden|notebook|head].
[So|Thus|And so|Still], [the|our|their] <noun> [stayed|remained|turned|grew] <adj>, [while|although|because] the <noun> was [nearly|almost|already] <adj>.
[What|All that] [remained|mattered|was left] [in|of] <place> was a <adj> <noun>, [two|three|four|five] <nouns> and the [smell|memory|sound] of <nouns>.
[You|One] [cannot|can|should|should not] [judge|measure|choose] a <noun> by its <noun>, [as|though|but] <name> <surname> [liked|used|loved] to say.
[It took|They needed|We spent] <small> [days|weeks|hours|years] to [find|build|repair|forget] the <adj> <noun>, and [nobody|everybody] [thanked|blamed|paid] the <job>.
[A|The] <job> from <place> [wrote|argued|believed|claimed] that [no|every|each] <noun> is [as <adj> as|more <adj> than] its <noun>.
[Perhaps|Maybe|Of course|Certainly] the <nouns> were [too|not|quite] <adj>, [or|and] [perhaps|maybe] we [simply|just] <verb> them too [early|late|often].
[Not far from|Close to|On the road to] <place>, [someone|a <job>|my uncle] <verb> <small> <nouns> and a [very|rather] <adj> <noun>.
[Nothing|Little|Much] [has changed|is known|was written] [since|about that since] the <adj> <noun> of <place> was <verb> in <year>.
[The more|The less] [we|they|you] [talk|worry|argue] about <nouns>, [the more|the less] <adj> the <noun> [seems|looks|becomes].
[To|In order to] [understand|explain|enjoy] the <noun>, [start|begin] with [its|the] <noun>: it is <adj>, [small|plain|cheap], and [easy|hard] to [lose|move|forget].
[Children|Travelers|Visitors|Students] [prefer|like|choose] the <adj> <noun>; [their parents|the locals|the guards] [prefer|want|point at] the <noun>.
[Long ago|Years later|That evening|In the end], <name> [sold|hid|found|painted] the <noun>, and [the|a] <adj> <noun> [took its place|was forgotten|was <verb>].
""")

_NOTES = patterns("""
[Note|Memo|Entry|Item] <small>: <noun> <verb>, [status|condition|state] <adj>[.|, see below.|, no action.]
[09|10|11|14|16]:<small> [INFO|WARN|DEBUG|ERROR] [service|worker|module] <noun>-<madeup> [started|stopped|retried|finished] after <small> [ms|seconds|attempts].
- <adj> <noun> ([page|row|shelf|box] <small>), <verb> by <name>.
[def|function] <madeup>_<noun>(<noun>, <madeup>): [return|yield] <noun> + <small>
<noun>;<adj>;<small>;<year>;<noun>-<small>
[To do|Agenda|Reminder]: [ask|call|email] <name> about the <noun>; [buy|order|fix] <small> <nouns>.
[Step|Rule|Section] <small>. [Open|Close|Lift|Turn] the <adj> <noun>, then [wait|count|check] until the <noun> is <adj>.
"[Did you see|Have you got|Who took|Where is] the <noun>?" [asked|said|shouted] <name>. "[It is|They say it is|I think it is] [in|behind|under] the <adj> <noun>."
[Stock|Inventory|Delivery] of <year>: <small> <nouns>, <small> <nouns>, [one|no] <adj> <noun>.
{"<noun>": "<adj>", "<madeup>": <small>, "<noun>": [true|false|null]}
[The|A] <madeup> of <madeup> <madeup> is <adj> and <madeup>, but the <madeup> [is|was] not.
<madeup> <madeup> <adj> <madeup> <noun> <madeup> <madeup>.
""")

_TALK = patterns("""
[I|We] <verb> a <adj> <noun> [today|yesterday|this morning|last night] and [it was|it felt|it turned out] [fine|great|odd|tiring].
[Can|Could] you [help me|give me some advice|share an idea] [with|about|on] [a|my|the] <adj> <noun>?
[That|This] [sounds|seems|looks] [nice|good|reasonable|like a plan]; [a|the] <noun> is [always|usually|often] [worth it|a good start|useful].
[Try|Consider|You could use] a <adj> <noun> [first|before anything else|for a week], and [see|check|notice] [how|whether] the <noun> [changes|behaves|feels].
[My|Our] [neighbor|friend|cousin|boss] <name> [thinks|says|believes] that <nouns> are [too|not|very] <adj>.
[Thanks|Thank you], [that|this] [helps|is helpful|makes sense]; [I|we] [will|might] [look for|try|read about] <nouns> [soon|tomorrow|next].
[Sure|Of course|Gladly|Certainly]: [a|the] <adj> <noun> [goes well|works|fits] with [a|any] <noun>, [especially|mostly|even] in [spring|summer|autumn|winter].
[What|Which] [kind|sort] of <noun> [would you|do people] [choose|use|like] for a <adj> <noun>?
[There are|I can think of] <small> [ways|reasons|kinds] to [pick|store|clean|fix] <nouns>, [but|and] [most|some] of them are <adj>.
[It|The weather|The week] was <adj>, so [I|we] <verb> the <noun> [instead|again|at home].
[Let me know|Tell me] [if|whether] the <noun> [is|gets|stays] <adj>, and [I can|we can] [adjust|look at|plan] the rest.
[Honestly|By the way|Anyway], [I|we] [never|rarely|always] [cared|worried|thought] about <nouns> [until|before] [now|this year].
""")

_NOISE = patterns("""
The [sky|sea|hill|road|wall] is [blue|gray|long|near|wide].
The [sun|moon|lamp|fire] is [yellow|bright|warm|low].
The [grass|leaf|field|moss] is [green|soft|dry|new].
[Here we go|Off we go|On we go|Round we go].
[There and back again|Up and down again|In and out again|Over and over again].
[Birds|Boats|Clouds|Days] [come and go|drift by|pass by].
[Nothing|Little|Not much] [happens|changes] here.
[One step|One day|One hour] after [another|the other].
""")

RULER_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The noise of RULER's own needle tasks: a published format, so a prompt made by it is no surprise."""

TRAIN, TEST = 0, 1


def _cut(items: tuple[Pattern, ...]) -> tuple[tuple[Pattern, ...], tuple[Pattern, ...]]:
    """Two thirds for training, one for the test."""
    return tuple(item for at, item in enumerate(items) if at % 3 != 2), items[2::3]


ESSAY = _cut(_ESSAY)
NOTES = _cut(_NOTES)
TALK = _cut(_TALK)
NOISE = _cut(_NOISE)
