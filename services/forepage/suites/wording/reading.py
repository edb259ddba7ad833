"""Wording of the reading tasks. RULER's own prompt (Apache-2.0) is one wording of either split."""

from forepage.suites.pattern import Pattern, patterns

RULER_INTRO = Pattern(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nThe following are given documents.\n\n"
)
RULER_QUESTION = Pattern(
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nQuestion: {question}"
)
INTROS = {
    "train": patterns("""
[Read|Study|Use] the [documents|paragraphs|articles] [below|that follow] [and answer the question|to answer me|carefully].\\n\\n
[Here are some articles.|Articles:|The documents follow.]\\n\\n
"""),
    "test": patterns("""
[I clipped these from an almanac.|Some clippings for you:]\\n\\n
"""),
}
FRAMES = {
    "train": patterns("""
{question}
Question: {question}
[According to the documents|Based on the documents|From the articles above]: {question}
[Please answer|Answer this]: {question}
"""),
    "test": patterns("""
[Going by the clippings|One thing I want to know]: {question}
"""),
}

HOPS: tuple[tuple[str, str, str, str, str], ...] = (
    (
        "birthplace",
        "country",
        "[In which country was {s} born|Which country is the birthplace of {s} in]?",
        "[Which state has the birthplace of|Within whose borders was] {s} [in it|born]?",
        "person",
    ),
    (
        "birthplace",
        "river",
        "[Which river flows past|On which river lies] the birthplace of {s}?",
        "[Which river feeds the town that {s} comes from]?",
        "person",
    ),
    (
        "school",
        "mayor",
        "Who is the mayor of the town where {s} studied?",
        "Who governs the town that taught {s}?",
        "person",
    ),
    (
        "spouse",
        "job",
        "What was the [occupation|job] of the [spouse|husband or wife] of {s}?",
        "Which trade did the spouse of {s} follow?",
        "person",
    ),
    (
        "founder",
        "birthplace",
        "[Where|In which town] was the founder of {s} born?",
        "[From which town comes the founder of {s}]?",
        "company",
    ),
    (
        "seat",
        "country",
        "[In which country|In what country] [are the headquarters|is the head office] of {s}?",
        "[Which state taxes the head office of {s}]?",
        "company",
    ),
    (
        "author",
        "birthplace",
        '[Where|In which town] was the author of "{s}" born?',
        '[From which town comes the author of "{s}"]?',
        "book",
    ),
    (
        "author",
        "prize",
        'Which prize did the author of "{s}" win?',
        'Which prize did the author of "{s}" take home?',
        "book",
    ),
)
