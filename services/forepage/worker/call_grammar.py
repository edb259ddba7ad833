"""The grammar of an answer that must be tool calls: DSML whose arguments fit the tools' schemas. Pure.

Written in the Lark dialect of llguidance. A call's arguments are one parameter element each, in the order
of the schema, as the model was trained to write them; a schema that says more than that about the whole
object gets all arguments as one JSON object, which the gateway's parser reads as well.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forepage.text.dsml import BEFORE_CALLS, CALLS, DSML, INVOKE, PARAMETER, to_json

ANNOTATIONS = frozenset(
    (
        "$schema",
        "$comment",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
    )
)
"""Keywords that say nothing about which values fit."""
DEFINITIONS = ("$defs", "definitions")
OBJECT_KEYWORDS = ANNOTATIONS | {"type", "properties", "required", "additionalProperties", *DEFINITIONS}
"""Of a schema whose arguments can be written one by one."""
MAX_REFERENCES = 16
"""References that lead to another before a value's schema is only used as a whole."""
MAX_NAME_CHARS = 256

SPACING = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""JSON inside calls is spaced as earlier calls are shown to the model (`text.dsml.to_json`)."""

START, ANSWER, CALL, TEXT = "start", "answer", "call", "TEXT"


@dataclass(frozen=True)
class CallableTool:
    """A function by name; `parameters` is the JSON schema of its arguments, empty if it takes none."""

    name: str
    parameters: str

    def schema(self) -> dict[str, Any]:
        """The schema. Raises: ValueError unless it is a JSON object."""
        value = json.loads(self.parameters or '{"properties": {}}')
        if not isinstance(value, dict):
            raise ValueError("a JSON object is needed")
        return value


@dataclass(frozen=True)
class _Forms:
    """How a value can be written: as any text, as one of some texts, as JSON."""

    is_text: bool = False
    literals: tuple[str, ...] = ()
    is_json: bool = False

    def __or__(self, other: "_Forms") -> "_Forms":
        literals = dict.fromkeys((*self.literals, *other.literals))
        return _Forms(self.is_text or other.is_text, tuple(literals), self.is_json or other.is_json)


ANYTHING = _Forms(is_text=True, is_json=True)
ONLY_JSON = _Forms(is_json=True)


def call_grammar(
    tools: Sequence[CallableTool], *, max_calls: int, dsml_id: int, answer: Mapping[str, Any] | None = None
) -> str:
    """One block of calls of these tools, or JSON of the schema `answer` where there is one.

    `max_calls` 0 is any number; `dsml_id` is the token that markup is made of.
    Raises: ValueError for a schema that is none; the engine finds out about the rest.
    """
    mark = f"<[{dsml_id}]>"
    repeated = f"{CALL}{{1,{max_calls}}}" if max_calls else f"{CALL}+"
    names = [f"{CALL}_{index}" for index in range(len(tools))]
    lines = [
        f"{START}: calls" + (f" | {ANSWER}" if answer is not None else ""),
        f"calls: {_quoted(BEFORE_CALLS + '<')} {mark} {_quoted(CALLS + '>' + chr(10))} {repeated} "
        f'"</" {mark} {_quoted(CALLS + ">")}',
        f'{CALL}: "<" {mark} ({" | ".join(names)}) "</" {mark} {_quoted(INVOKE + ">" + chr(10))}',
        # A text ends where markup begins; spelled in other tokens, markup's beginning is no text either.
        rf"{TEXT}: /(?s:.*)<\// & ~/(?s:.*)<\/{DSML}(?s:.*)/",
    ]
    if answer is not None:
        lines.append(f"{ANSWER}: %json {to_json(answer)}")
    for name, tool in zip(names, tools, strict=True):
        opening = _quoted(f'{INVOKE} name="{tool.name}">\n')
        lines.append(f"{name}: {opening} {_arguments(tool.schema(), mark)}")
    return "\n".join(lines)


def _arguments(schema: Mapping[str, Any], mark: str) -> str:
    """What stands between an invoke element's tags."""
    if not _is_written_one_by_one(schema):
        return f"%json {to_json({'type': 'object', **schema, **SPACING})}"
    required = frozenset(schema.get("required", ()))
    properties: Mapping[str, Any] = schema.get("properties", {})
    elements = [
        f"({_element(name, value, schema, mark)}){'' if name in required else '?'}"
        for name, value in properties.items()
    ]
    each = " ".join(elements)
    if required:
        return each
    return f'({each} | "\\n")' if each else '"\\n"'  # the layout has an empty line in place of no arguments


def _element(name: str, value: Any, root: Mapping[str, Any], mark: str) -> str:
    """One parameter with its line end; alternatives for the forms it can be written in."""
    forms = _forms(value, root)
    ways = []
    if forms.is_text:
        ways.append(f"{_quoted(_tag(name, 'true'))} {TEXT}")
    elif forms.literals:
        literals = " | ".join(map(_quoted, forms.literals))
        ways.append(f'{_quoted(_tag(name, "true"))} ({literals}) "</"')
    if forms.is_json:
        schema = dict(value) if isinstance(value, dict) else {}
        schema |= {key: root[key] for key in DEFINITIONS if key in root} | SPACING
        ways.append(f'{_quoted(_tag(name, "false"))} %json {to_json(schema)} "</"')
    return f'"<" {mark} ({" | ".join(ways)}) {mark} {_quoted(PARAMETER + ">" + chr(10))}'


def _tag(name: str, is_text: str) -> str:
    return f'{PARAMETER} name="{name}" string="{is_text}">'


def _is_written_one_by_one(schema: Mapping[str, Any]) -> bool:
    """Whether arguments that each fit their own schema fit the whole one."""
    properties, required = schema.get("properties"), schema.get("required", [])
    return (
        schema.keys() <= OBJECT_KEYWORDS
        and schema.get("type", "object") == "object"
        and isinstance(properties, dict)
        and isinstance(required, list)
        and all(isinstance(name, str) and name in properties for name in required)
        and all(map(_is_plain_name, properties))
        and all(reference.startswith(_own(DEFINITIONS)) for reference in _references(schema))
        and not any(
            DSML in literal for value in properties.values() for literal in _forms(value, schema).literals
        )
    )


def _own(keywords: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"#/{keyword}/" for keyword in keywords)


def _is_plain_name(name: str) -> bool:
    """Whether it can stand in a tag as it is."""
    return 0 < len(name) <= MAX_NAME_CHARS and name.isprintable() and not any(mark in name for mark in '"<>')


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        reference = value.get("$ref")
        if isinstance(reference, str):
            yield reference
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _references(item)


def _forms(schema: Any, root: Mapping[str, Any], num_references: int = 0) -> _Forms:
    """In which forms values of a schema can be written. Texts are written raw only where every one fits."""
    if not isinstance(schema, dict):
        return ANYTHING if schema is True else ONLY_JSON
    keywords = schema.keys() - ANNOTATIONS
    if not keywords:
        return ANYTHING
    if keywords == {"type"}:
        return _forms_of_types(schema["type"])
    if keywords <= {"type", "enum"} or keywords <= {"type", "const"}:
        return _forms_of_values(schema.get("enum", [schema.get("const")]), schema.get("type"))
    if keywords == {"anyOf"} and isinstance(schema["anyOf"], list):
        forms = _Forms()
        for branch in schema["anyOf"]:
            forms |= _forms(branch, root, num_references)
        return forms
    if keywords == {"$ref"} and num_references < MAX_REFERENCES:
        return _forms(_referenced(schema["$ref"], root), root, num_references + 1)
    return ONLY_JSON


def _forms_of_types(types: Any) -> _Forms:
    listed = types if isinstance(types, list) else [types]
    return _Forms(is_text="string" in listed, is_json=any(kind != "string" for kind in listed))


def _forms_of_values(values: Any, types: Any) -> _Forms:
    if not isinstance(values, list):
        return ONLY_JSON
    may_be_text = types is None or _forms_of_types(types).is_text
    literals = tuple(value for value in values if isinstance(value, str)) if may_be_text else ()
    return _Forms(literals=literals, is_json=len(literals) < len(values))


def _referenced(reference: Any, root: Mapping[str, Any]) -> Any:
    """What a reference names; a schema that only JSON can be of where it names nothing here."""
    found: Any = root
    for step in str(reference).removeprefix("#/").split("/"):
        found = found.get(step) if isinstance(found, dict) else None
    return {"$ref": reference, "not": {}} if found is None else found


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
