"""Wording of the n-th answer. OpenAI-MRCR's own question (MIT) is one wording of either split."""

from forepage.suites.pattern import Pattern, patterns

FORMS = {
    "train": (
        "poem|short story|letter|riddle|speech|song|diary entry|news item|recipe|prayer|advertisement|fable|"
        "travel note|toast|review|warning|postcard|sonnet"
    ).split("|"),
    "test": "poem|short story|essay|joke|blog post|ballad|memo|proverb|legend|social media post".split("|"),
}
REQUESTS = {
    "train": patterns("""
[Write|Please write|Compose|Make up|Give me|I would like] a [short |]{form} about {topic}[.|, please.]
[Can|Could] you [write|compose|make up] a {form} about {topic}?
[Now|Next|Then] [write|compose] a {form} about {topic}.
"""),
    "test": patterns("""
[Write|Please write] a {form} about {topic}[.|, please.]
[Let us have|Draft|May I have] a {form} about {topic}.
"""),
}
OPENAI_QUESTION = Pattern(
    "Prepend {code} to the {nth} (1 indexed) {form} about {topic}. Do not include any other text in your response."
)
"""The question of the published OpenAI-MRCR set (MIT): its files are no surprise."""

QUESTIONS = {
    "train": patterns("""
[Prepend|Put|Write] {code} [to|before|in front of] the {nth} {form} about {topic}[.| and repeat it.| and say nothing else.]
[Start with|Begin with|First write] {code}, then [repeat|copy|quote] the {nth} {form} about {topic}[.| word for word.| exactly.]
[Repeat|Copy|Quote|Give me again] the {nth} {form} about {topic}[| word for word|, exactly as it was], [starting with|beginning with|prefixed by] {code}.
"""),
    "test": patterns("""
[I want to reread|Show me once more] the {nth} {form} about {topic}; [type|place] {code} [ahead of it|at its head].
"""),
}
PLAIN_QUESTIONS = {
    "train": patterns("""
[Repeat|Copy|Quote|Give me again|Say again] the {nth} {form} about {topic}[| word for word|, exactly as it was|, please].
[What was|How did] the {nth} {form} about {topic}[ go|]?
"""),
    "test": patterns("""
[I want to reread|Show me once more] the {nth} {form} about {topic}.
"""),
}
ORDINALS = (
    ("1st", "first"), ("2nd", "second"), ("3rd", "third"), ("4th", "fourth"),
    ("5th", "fifth"), ("6th", "sixth"), ("7th", "seventh"), ("8th", "eighth"),
)  # fmt: skip
