"""Wording of the counting tasks. RULER's own prompts (Apache-2.0) are one wording of either split."""

from forepage.suites.pattern import Pattern, patterns

RULER_INTRO = {
    "cwe": Pattern(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    ),
    "fwe": Pattern(
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words."
    ),
}
RULER_QUESTION = {
    "cwe": Pattern("Question: What are the {count} most common words in the above list?"),
    "fwe": Pattern(
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    ),
}
INTROS = {
    "train": patterns("""
[Some|A few] words [in|of] what follows [appear|come up|are repeated] more often than [others|the rest]. [Remember them.|Keep count.]
[Read|Go through] the [following |][text|words] and [count|keep count of] [how often each word comes|every word].
[Here it is.|Words:|The words follow.]
"""),
    "test": patterns("""
[Keep a tally|Mark a stroke for each word] while you read on.
"""),
}
QUESTIONS = {
    "train": patterns("""
[Question: |][What|Which] are the {count} [most common|most frequent|most repeated] [coded |]words [in|of] {list}[|, not counting dots]?
[Question: |Ignore dots. |][List|Name|Give me|Find|Tell me] the {count} words that [appear|occur|come up|are repeated] most often in {list}.
[Question: |][Which|What] {count} words [appear|occur|come up|are repeated] most often in {list}? [Ignore dots.|]
"""),
    "test": patterns("""
[Count for me|Please tally]: which {count} words does {list} repeat the most?
[Of all words in|Looking at] {list}, which {count} are met most often, dots aside?
"""),
}
