"""What a sequence tells its caller, as messages."""

from forepage.errors import ForepageError
from forepage.rpc import worker_pb2 as pb
from forepage.telemetry import fail_span
from forepage.worker.parts import WorkerParts
from forepage.worker.sampler import Pick
from forepage.worker.sequence import Sequence
from forepage.worker.usage import residency_report


def tokens_event(pick: Pick) -> pb.GenerateEvent:
    """One token."""
    tokens = pb.Tokens(token_ids=[pick.token])
    if pick.logprob is not None:
        tokens.chosen.add(token_id=pick.token, logprob=pick.logprob)
        for token, logprob in pick.top:
            tokens.top.add(token_id=token, logprob=logprob)
    return pb.GenerateEvent(tokens=tokens)


def started_event(sequence: Sequence) -> pb.GenerateEvent:
    """Admitted, its cached prefix on the device."""
    return pb.GenerateEvent(
        started=pb.Started(
            prompt_tokens=sequence.request.num_prompt_tokens, cached_tokens=_cached_tokens(sequence)
        )
    )


def finished_event(parts: WorkerParts, sequence: Sequence, reason: pb.FinishReason) -> pb.GenerateEvent:
    """A regular end, with what it used."""
    return pb.GenerateEvent(
        finished=pb.Finished(
            reason=reason,
            prompt_tokens=sequence.request.num_prompt_tokens,
            cached_tokens=_cached_tokens(sequence),
            completion_tokens=sequence.num_answer_tokens,
            residency=residency_report(parts, sequence),
        )
    )


def refuse(sequence: Sequence, error: ForepageError) -> None:
    """End a request that was never taken: it holds nothing."""
    fail_span(sequence.span, error)
    sequence.emit(failed_event(error))
    sequence.span.end()
    sequence.released.set()


def failed_event(error: ForepageError) -> pb.GenerateEvent:
    """An end in a typed error."""
    return pb.GenerateEvent(
        failed=pb.Failed(
            code=error.code,
            message=error.message,
            param=error.param or "",
            retry_after_s=error.retry_after_s or 0.0,
        )
    )


def _cached_tokens(sequence: Sequence) -> int:
    """Of the caller's prompt: what is cached of an answer so far is no part of it."""
    return min(sequence.cached_tokens, sequence.request.num_prompt_tokens)
