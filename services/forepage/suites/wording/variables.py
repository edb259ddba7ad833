"""Wording of variable tracking. RULER's own prompt (Apache-2.0) is one wording of either split."""

from forepage.suites.pattern import Pattern, patterns

RULER_INTRO = Pattern(
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)
RULER_ASSIGNMENT = ("VAR {name} = {value}", "VAR {name} = VAR {value}")
RULER_QUESTION = Pattern(
    "Question: Find all variables that are assigned the value {value} in the text above."
)

INTROS = {
    "train": patterns("""
[Track|Follow|Remember|Keep track of] the [chain|chains] of [variable|] assignments [hidden|] in the [following|] text.\\n
[Some|A few] variables [get|are given] values [between the lines|in what follows].\\n
[Below is a text with assignments.|The text below sets variables.]\\n
"""),
    "test": patterns("""
[Values are handed from one variable to the next|Variables pass values on] [on this page|underneath].\\n
"""),
}
ASSIGNMENTS = {
    "train": (
        RULER_ASSIGNMENT,
        ("{name} = {value}", "{name} = {value}"),
        ("let {name} = {value};", "let {name} = {value};"),
        ("{name} := {value}.", "{name} := {value}."),
        ("set {name} to {value}.", "set {name} to {value}."),
        ("{name} is {value}.", "{name} is {value}."),
        ("The variable {name} holds {value}.", "The variable {name} holds what {value} holds."),
    ),
    "test": (
        ("{name} <- {value}", "{name} <- {value}"),
        ("define {name} as {value}.", "define {name} as {value}."),
    ),
}
QUESTIONS = {
    "train": patterns("""
[Question: |][Find|List|Name|Give me|Tell me] [all|all the|the|every one of the] variables that [are assigned|are given|hold|have|get] the value {value}[ in the text above| in the text|][.|, please.]
[Question: |][Which|What] variables [are assigned|hold|have|end up with|carry] the value {value}[ in the text above| in the text|]?
[According to the text|In the text above], which variables [have|hold|are assigned] [|the value ]{value}?
"""),
    "test": patterns("""
[By the end|Once all is done], which [names|variables] [stand for|refer to] {value}?
[Trace|Work out] every variable whose value is {value}.
"""),
}
