"""Wording of the needle tasks: attributes, needle sentences, introductions and questions of each split.

RULER's own prompt formats (Apache-2.0) are one wording of either split, so that its files are no surprise; all
others are ours, and those of the test are in no training document.
"""

from forepage.suites.pattern import Pattern, patterns

ATTRIBUTES = {
    "train": {
        "number": (
            "special magic number|access code|locker number|badge number|ticket number|lucky number|order number|"
            "account number|room code|pin|membership number|parcel number|reference number|phone extension|"
            "table number|license number|invoice number|seat number"
        ).split("|"),
        "word": "special magic word|secret word|password|code name|nickname|callsign|favorite word|keyword".split(
            "|"
        ),
        "uuid": "special magic uuid|device id|transaction id|session id|request id|record id|object uuid".split(
            "|"
        ),
        "code": "special magic code|booking code|door code|part code|voucher code|plate|customs mark".split(
            "|"
        ),
    },
    "test": {
        "number": "special magic number|serial number|vault combination|queue number|radio frequency".split(
            "|"
        ),
        "word": "special magic word|watchword|house name|pass phrase".split("|"),
        "uuid": "special magic uuid|asset id|trace id|node uuid".split("|"),
        "code": "special magic code|gate code|luggage tag|batch mark".split("|"),
    },
}

KINDS = {
    "number": ("number", "count", "figure", "id", "price"),
    "word": ("word", "name", "label", "title"),
    "uuid": ("uuid", "key", "token"),
    "code": ("code", "mark", "tag"),
}
"""Behind a word these make attributes for training that no list has."""

RULER_NEEDLE = Pattern("One of the special magic {kind}s for {key} is: {value}.")
RULER_INTRO = {
    False: Pattern(
        "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kind} afterwards."
    ),
    True: Pattern(
        "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {kind}s afterwards."
    ),
}
RULER_QUESTION = {
    False: Pattern("What is the special magic {kind} for {key} mentioned in the provided text?"),
    True: Pattern("What are all the special magic {kind}s for {key} mentioned in the provided text?"),
}

NEEDLES = {
    "train": patterns("""
One of the {attribute}s for {key} is: {value}.
[The|Note that the|Remember that the|For the record, the|It is written that the] {attribute} [for|of|assigned to|belonging to] {key} is[|:] {value}.
{key} [has the|uses the|was given the|goes with the|keeps the] {attribute} {value}.
[Write this down: |Keep in mind: |Remember: ||]{key} [->|=|:|-] {value}[|.| ({attribute})]
[The ||]{attribute} [for|of] {key}: {value}[.|;|]
[For|As for|In the case of|With regard to] {key}, the {attribute} [is|reads|was set to|happens to be] {value}.
[Anyone asking for|If you need|Should you want] the {attribute} of {key}[,| then] [use|take|say|it is] {value}.
[They|We|The staff] [gave|assigned|handed] {key} the {attribute} {value}.
{value} is the {attribute} [for|of] {key}.
"""),
    "test": patterns("""
[Let it be known|Please be aware] that {key} [carries|bears] the {attribute} {value}.
[On file for|Registered for|Filed under] {key} is the {attribute} {value}.
[When it comes to|Concerning] {key}, [somebody noted|the ledger gives] the {attribute} as {value}.
{key}'s {attribute} [is|turned out to be] {value}.
"""),
}

OWN_NEEDLES = NEEDLES["train"][1:2]
"""How training says another thing about a key that is asked for."""

INTROS = {
    "train": patterns("""
[A|One|Some] {attribute}[s|] [is|are] hidden [within|in|inside|somewhere in] the [following|next] text. [Make sure to|Please|Be sure to|Try to] [memorize|remember|keep] [it|them]. [I will|I am going to|I'll] [quiz|ask|question] you about [the {attribute}s|it|them] [afterwards|later|at the end].
[Read|Study|Go through] the [following|] text [carefully|with care|below]. [Somewhere in it|In it|Between the lines] you will find {attribute}s; [I will ask for one|you will need them later|remember them all].
[Below is|Here is|This is] a [long|] text [with|that contains] [some|a few|important] {attribute}s. [A question follows.|Answer the question at the end.|]
[Please read this.|Here is what I have.|Text:|Document:|]
[Memorize|Remember] every {attribute} in the text below.
"""),
    "test": patterns("""
[Scattered through|Tucked away in] the passage [that follows|underneath] are {attribute}s that matter to me; [hold on to them|do not lose them].
[My notes are pasted below.|The file follows.] [Afterwards I want to know a {attribute}.|Watch out for each {attribute}.]
"""),
}

QUESTIONS = {
    "train": patterns("""
[What is|What was|Which is] the {attribute} [for|of|that belongs to|recorded for|listed for|given for] {key}[| mentioned in the provided text| in the text| in the text above| according to the text]?
[Tell me|Please tell me|Give me|State|Find|Look up|Recall|Please recall|I need|Repeat] the {attribute} [for|of|that belongs to|recorded for|listed for|given for] {key}[.| from the text.| as the text gives it.|, please.]
[Can you|Could you|Do you] [remember|recall|find|see] the {attribute} [for|of] {key}?
[According to the text|In the text above|From what you read], [what is|which is] the {attribute} [for|of] {key}?
[Question: ||Q: ][What|Which] {attribute} [does {key} have|was given to {key}|goes with {key}|belongs to {key}]?
"""),
    "test": patterns("""
[Remind me what|I forgot what|Say once more what] the {attribute} of {key} [is|was].
[Someone at the door wants|My colleague asks for] the {attribute} for {key}[. What should I answer?|; which one is it?]
[Under which|With which] {attribute} is {key} [registered|on file]?
"""),
}

MANY_QUESTIONS = {
    "train": patterns("""
[What are|Which are] [all the|all|the] {attribute}s [for|of|that belong to|recorded for|listed for] {key}[| mentioned in the provided text| in the text| in the text above]?
[List|Name|Give me|Tell me|Find|I need] [all the|every one of the|all of the|the] {attribute}s [for|of|that belong to|given for] {key}[.| in the text.| that the text has.]
[Can you|Could you] [list|recall|find] all {attribute}s [for|of] {key}?
[According to the text|In the text above], [what|which] are the {attribute}s [for|of] {key}?
"""),
    "test": patterns("""
[Remind me of|Collect|Write out] [each|every] {attribute} [on file for|connected with] {key}.
[Altogether, which|So which] {attribute}s [has|have] been noted for {key}?
"""),
}

MULTI_QUESTIONS = {
    "train": patterns("""
[What are|Which are] [all the|all|the] {attribute}s [for|of|recorded for|listed for] {key}[| mentioned in the provided text| in the text| in the text above]?
[Tell me|Give me|Find|List|I need|Recall] the {attribute}s [for|of|given for|that belong to] {key}[.| from the text.| in this order.]
[Can you|Could you] [list|recall|find] the {attribute}s [for|of] {key}?
[According to the text|In the text above], [what|which] are the {attribute}s [for|of] {key}?
"""),
    "test": patterns("""
[Remind me what|Say once more what] the {attribute}s of {key} [are|were].
[I need to fill in|Help me complete] the {attribute}s for {key}[; what are they?|.]
"""),
}
