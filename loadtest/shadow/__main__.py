"""Ask an endpoint; check what each answer said of its evidence by a second pass with all blocks resident.

    python -m loadtest.shadow --length 16384 --questions 4 --out loadtest/results

The endpoint must serve the model in --model; the second pass runs in this process, prompt by prompt.
"""

import asyncio
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forepage.settings import TINY_MODEL
from forepage.suites.registry import SUITES
from forepage.text.chat import chat_parts, encode_parts
from forepage.text.messages import ChatMessage, Conversation, Role
from forepage.text.tokenizer import Tokenizer
from forepage.text.wording import Wording
from loadtest.quality.__main__ import TEST_SEED
from loadtest.quality.arms import Arm, budget_of, residency_fields
from loadtest.quality.endpoint import Endpoint, Reply, first_model
from loadtest.quality.items import Document, Item, generated
from loadtest.shadow.checked import Checked
from loadtest.shadow.full_pass import FullPass
from loadtest.shadow.measures import measure, resident_sets
from loadtest.shadow.report import result_of, write

app = typer.Typer(pretty_exceptions_enable=False, help=__doc__)


class Shadow:
    """Asks, and passes over what came back."""

    def __init__(self, endpoint: Endpoint, model: Path, full_pass: FullPass) -> None:
        self._endpoint = endpoint
        self._tokenizer, self._wording = Tokenizer.load(model), Wording.load(model)
        self._full_pass = full_pass

    async def check(self, item: Item, arm: Arm, *, budget_blocks: int | None) -> Checked:
        """One answer."""
        budget = budget_blocks or budget_of(item.length_tokens)
        fields = residency_fields(arm, budget_blocks=budget, threshold=None)
        reply = await self._endpoint.ask(item, fields)
        residency = reply.usage.get("forepage") or {}
        about = (item.suite, item.length_tokens, arm.value, residency)
        if reply.error is not None:
            return Checked(*about, None, f"no answer: {reply.error}")
        try:
            prompt, answer = self._tokens(item, reply, residency.get("decode_steps") or 0)
            sets = resident_sets(residency, len(answer))
        except ValueError as error:
            return Checked(*about, None, str(error))
        return Checked(*about, measure(await asyncio.to_thread(self._full_pass.look, prompt, answer), sets))

    def _tokens(self, item: Item, reply: Reply, num_steps: int) -> tuple[list[int], list[int]]:
        """The prompt's, and those of the answer that decode steps processed.

        Raises: ValueError when the text does not give the tokens back.
        """
        messages = [ChatMessage(Role(turn.role), turn.text) for turn in item.turns]
        prompt = encode_parts(chat_parts(Conversation(messages), self._wording), self._tokenizer)
        if len(prompt) != reply.usage["prompt_tokens"]:
            raise ValueError("the prompt's tokens are not those of the endpoint: does it serve --model?")
        answer = self._tokenizer.encode_text(reply.text)
        if reply.usage["completion_tokens"] - len(answer) not in (0, 1):  # the end's own token has no text
            raise ValueError("the answer's text is not its tokens")
        if not 0 < num_steps <= len(answer):
            raise ValueError("the answer has no decode step")
        return prompt, answer[:num_steps]


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="folder for shadow.json, .md and .png")],
    base_url: Annotated[str, typer.Option(help="the endpoint, with /v1")] = "http://127.0.0.1:8000/v1",
    model: Annotated[Path, typer.Option(help="folder of the model that it serves")] = TINY_MODEL,
    model_device: Annotated[str, typer.Option(help="where the second pass runs")] = "auto",
    suite: Annotated[list[str] | None, typer.Option(help="a suite; several times; default: all")] = None,
    length: Annotated[list[int] | None, typer.Option(help="tokens of a prompt; several times")] = None,
    arm: Annotated[list[Arm] | None, typer.Option(help="an arm; several times")] = None,
    questions: Annotated[int, typer.Option(min=1, help="questions of each suite and length")] = 4,
    budget_blocks: Annotated[int | None, typer.Option(help="blocks kept by score")] = None,
    seed: Annotated[int, typer.Option(min=0, help="added to the documents' seeds")] = 0,
    device: Annotated[str, typer.Option(help="JSON: GPU name, link, host memory, torch, triton")] = "{}",
    timeout_s: Annotated[float, typer.Option(min=1.0, help="of one request")] = 1800.0,
) -> None:
    """Ask, pass over the tokens again, and write the table of both."""
    unknown = sorted(set(suite or ()) - set(SUITES))
    if unknown:
        raise typer.BadParameter(f"no such suite: {', '.join(unknown)}")
    lengths, arms = length or [8192], arm or [Arm.LOOKAHEAD, Arm.GUARDED]
    documents = [
        document
        for tokens in lengths
        for name in suite or SUITES
        for document in generated(
            name, tokens, num_questions=questions, per_document=questions, first_seed=TEST_SEED + seed
        )
    ]
    client = httpx.AsyncClient(base_url=base_url, timeout=timeout_s)
    full_pass = FullPass(model, device=model_device, max_tokens=2 * max(lengths))
    checked = asyncio.run(_run(client, model, full_pass, documents, arms, budget_blocks))
    command = shlex.join(["python", "-m", "loadtest.shadow", *sys.argv[1:]])
    config = {"model": model.name, "budget_blocks": budget_blocks, "lengths": lengths}
    result = result_of(checked, command=command, device=json.loads(device), config=config)
    write(out, result, checked)
    missing = sum(one.found is None for one in checked)
    typer.echo(
        f"{len(checked) - missing} answers checked, {missing} could not be: {out / 'shadow'}.json, .md, .png"
    )


async def _run(
    client: httpx.AsyncClient,
    model: Path,
    full_pass: FullPass,
    documents: Sequence[Document],
    arms: Sequence[Arm],
    budget_blocks: int | None,
) -> list[Checked]:
    checked: list[Checked] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with client:
        shadow = Shadow(Endpoint(client, await first_model(client)), model, full_pass)
        with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
            items = [item for document in documents for item in document.items]
            bar = progress.add_task("checking", total=len(items) * len(arms))
            for item in items:
                for arm in arms:  # one prompt's arms together: the second pass reads it once
                    checked.append(await shadow.check(item, arm, budget_blocks=budget_blocks))
                    progress.update(bar, advance=1, description=f"{item.suite} {item.length_tokens} {arm}")
    return checked


if __name__ == "__main__":
    app()
