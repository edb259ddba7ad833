"""A worker goes on with an answer that another one began: what it says is what the first would have said."""

import json
from dataclasses import replace

import pytest

from forepage.errors import ContextLengthError, RequestError
from forepage.rpc import worker_pb2 as pb
from forepage.settings import SEEDED_MODEL, WorkerSettings
from forepage.worker.constraint import GrammarTokenizer
from forepage.worker.request import Request
from rigs.worker import Running, WorkerRig, text_tokens, wants, worker_rig

EOS = 257
PROMPT = text_tokens(600)
MAX_TOKENS = 12
SAMPLINGS = {
    "greedy": pb.Sampling(temperature=0, max_tokens=MAX_TOKENS),
    "drawn": pb.Sampling(temperature=0.9, top_p=0.95, seed=7, max_tokens=MAX_TOKENS),
    "penalties": pb.Sampling(
        temperature=0.8,
        seed=7,
        max_tokens=MAX_TOKENS,
        presence_penalty=0.7,
        frequency_penalty=0.5,
        repetition_penalty=1.2,
    ),
}
SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer", "maximum": 9999, "minimum": 1000}},
    "required": ["count"],
    "additionalProperties": False,
}


def parse(sampling: pb.Sampling, *, mode: str = "FULL", answered: list[int] | None = None) -> Request:
    message = pb.GenerateRequest(
        request_id="r",
        prompt_token_ids=PROMPT,
        sampling=sampling,
        residency=pb.Residency(mode=f"RESIDENCY_MODE_{mode}", budget_blocks=1),
        ignore_eos=True,
        answered_token_ids=answered or [],
    )
    return Request.parse(message, WorkerSettings(), vocab_size=320, eos=EOS)


def run(rig: WorkerRig, request: Request) -> Running:
    running = rig.submit_request(request)
    rig.run(running)
    rig.check_baseline()
    return running


@pytest.mark.parametrize("mode", ["FULL", "EXACT"])
def test_tokens_are_those_of_the_worker_that_was_lost(mode: str) -> None:
    sampling = SAMPLINGS["greedy"]
    with worker_rig() as rig:
        whole = run(rig, parse(sampling)).tokens
    assert len(whole) == MAX_TOKENS
    for num_answered in (1, MAX_TOKENS - 1):
        with worker_rig() as rig:
            rig.index.auto = wants(1)
            resumed = run(rig, parse(sampling, mode=mode, answered=whole[:num_answered]))
        assert whole[:num_answered] + resumed.tokens == whole
        finished = resumed.finished
        assert finished is not None
        assert (finished.prompt_tokens, finished.completion_tokens) == (len(PROMPT), MAX_TOKENS)
        assert finished.residency.resumed_tokens == num_answered
        assert finished.residency.decode_steps == MAX_TOKENS - num_answered - 1, "its own figures only"


def test_draws_go_on_as_if_the_answer_had_been_the_prompt() -> None:
    """Bit for bit. The worker that was lost had decoded what is prefilled here, so its may round apart."""
    answered = [65, 66, 67, 68, 69]
    with worker_rig() as rig:
        resumed = run(rig, parse(SAMPLINGS["drawn"], answered=answered)).tokens
    with worker_rig() as rig:
        as_prompt = parse(SAMPLINGS["drawn"], answered=answered)
        plain = run(rig, replace(as_prompt, num_answered=0)).tokens
    assert len(resumed) == MAX_TOKENS - len(answered)
    assert resumed == plain


def test_penalties_know_what_was_answered() -> None:
    answered = [65, 65, 300]
    with worker_rig() as rig:
        running = rig.submit_request(parse(SAMPLINGS["penalties"], answered=answered))
        row = running.sequence.sampling_row(len(PROMPT) + len(answered))
        assert dict(row.generated) == {65: 2, 300: 1}
        assert row.seen == {*PROMPT, 65, 300}
        rig.loop.cancel(running.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)


def test_what_was_answered_is_a_prefix_like_any_other() -> None:
    """A worker on the same host finds the blocks that the lost one had written back."""
    with worker_rig() as rig:
        whole = run(rig, parse(SAMPLINGS["greedy"])).tokens
        resumed = run(rig, parse(SAMPLINGS["greedy"], answered=whole[:5]))
        assert resumed.tokens == whole[5:]
        assert resumed.finished is not None
        assert resumed.finished.cached_tokens == 512
        started = next(event.started for event in resumed.events if event.HasField("started"))
        assert started == pb.Started(prompt_tokens=len(PROMPT), cached_tokens=512)


def test_a_grammar_goes_on_where_it_was() -> None:
    grammar = GrammarTokenizer(SEEDED_MODEL, vocab_size=320, eos=EOS)
    sampling = pb.Sampling(temperature=1.0, seed=5, max_tokens=100, json_schema=json.dumps(SCHEMA))

    def generate(answered: list[int]) -> list[int]:
        request = parse(sampling, answered=answered)
        with worker_rig() as rig:
            running = rig.submit_request(request)
            running.sequence.constraint = grammar.constraint_of(request)
            rig.run(running)
            assert running.finished is not None
            assert running.finished.reason == pb.FINISH_REASON_STOP
            return running.tokens

    whole = generate([])
    assert 1_000 <= json.loads(bytes(token for token in whole if token < 256))["count"] <= 9_999
    for num_answered in (1, len(whole) // 2, len(whole) - 1):
        assert whole[:num_answered] + generate(whole[:num_answered]) == whole


def test_limits_count_what_was_answered() -> None:
    sampling = pb.Sampling(max_tokens=10)
    assert parse(sampling, answered=[65] * 9).max_tokens == 1
    with pytest.raises(RequestError, match="at least 11"):
        parse(sampling, answered=[65] * 10)
    with pytest.raises(RequestError, match="vocabulary"):
        parse(sampling, answered=[320])
    most = WorkerSettings().max_context_tokens - len(PROMPT)
    asked = pb.Sampling(max_tokens=most)
    assert parse(asked, answered=[65]).total_tokens == parse(asked).total_tokens
    with pytest.raises(ContextLengthError):
        parse(pb.Sampling(max_tokens=most + 1), answered=[65])


def test_whoever_watches_sees_one_answer() -> None:
    with worker_rig() as rig:
        request = parse(SAMPLINGS["greedy"], answered=[65, 66])
        running = rig.submit_request(request)
        rig.run_until(lambda: len(running.tokens) >= 3)
        num_generated = running.sequence.num_generated
        views = rig.loop.watch()
        rig.loop.turn()
        (view,) = views.result(timeout=0)
        assert view.prompt_tokens == len(PROMPT)
        assert view.generated_tokens == 2 + num_generated
        rig.loop.cancel(running.sequence)
        rig.run_until(lambda: rig.loop.num_sequences == 0)
