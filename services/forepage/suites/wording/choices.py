"""Wording of multiple choice. LongBench-v2's own prompt (MIT) is one wording of either split."""

from forepage.suites.pattern import Pattern, patterns

LETTERS = "ABCD"
ANSWER = "{facts} The correct answer is ({letter})."

PUBLISHED_INTRO = "Please read the following text and answer the question below.\n\n<text>\n"
PUBLISHED_OUTRO = "\n</text>"
PUBLISHED_QUESTION = Pattern(
    "What is the correct answer to this question: {question}\nChoices:\n{choices}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)
"""The prompt of the published benchmark (MIT): its files are no surprise."""

INTROS = {
    "train": patterns("""
[Read|Study] the [report|chronicle|book|text] [below|that follows][ with care|].\\n\\n
[Here is the text.|The report:|Text:]\\n\\n
"""),
    "test": patterns("""
[What follows is a chronicle|A yearbook is pasted here].\\n\\n
"""),
}
QUESTIONS = {
    "train": patterns("""
{question}\\n{choices}\\n[Choose|Pick|Select] [one|the right one|the correct answer][.| and name its letter.| as in: The correct answer is (A).]
[Question: |][Which of the four is right|Which answer is correct|Choose one]: {question}\\n{choices}
[What is the correct answer to this question: |Answer with one of the choices: ]{question}\\n[Choices|Options]:\\n{choices}
"""),
    "test": patterns("""
[Quiz: |Only one option holds. ]{question}\\n{choices}\\n[Say which letter is right.|Which is it?]
"""),
}
HEADS = {
    "train": patterns("""
Chapter {number}. [On|About] <nouns> and <nouns>
{number}. [The|A] <adj> <noun>
Section {number}
"""),
    "test": patterns("""
Part {number}: <adj> <nouns>
"""),
}
