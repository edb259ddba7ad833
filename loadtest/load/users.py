"""Locust users that ask a shape's conversations over SSE. Importing this patches sockets, for gevent."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import monotonic
from typing import Any

import gevent
import httpx
from locust import LoadTestShape, User, task
from locust.env import Environment

from loadtest.load.conversation import Conversation, Message
from loadtest.load.sample import Sample, failed_sample, sample_of
from loadtest.load.shapes import Shape

USERS_PER_S = 100.0
"""How fast users come: a stage's users are there at once."""
MAX_WAIT_S = 10.0
"""What a refused user waits at most, whatever the server asks for."""
FAILED_WAIT_S = 1.0


@dataclass(frozen=True)
class LoadSettings:
    """What all requests share. `forepage` None: the endpoint does not know the field."""

    base_url: str
    model: str
    forepage: dict[str, Any] | None
    api_key: str | None
    timeout_s: float
    drain_s: float


def run_load(
    shape: Shape,
    conversations: Iterator[Conversation],
    settings: LoadSettings,
    *,
    on_sample: Callable[[Sample], None],
) -> None:
    """Run to the shape's end; answers under way then have `drain_s` more. Blocks."""
    headers = {"authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(
        base_url=settings.base_url, headers=headers, timeout=settings.timeout_s, limits=limits
    ) as client:
        asking = Asking(client, settings)
        environment = Environment(
            user_classes=[_user_class(conversations, asking, shape.think_s, on_sample)],
            shape_class=_locust_shape(shape),
            host=settings.base_url,
            stop_timeout=settings.drain_s,
            catch_exceptions=False,
        )
        runner = environment.create_local_runner()
        runner.start_shape()
        shaping = runner.shape_greenlet
        assert shaping is not None
        shaping.join()
        runner.quit()


class Asking:
    """Sends one question and reads its stream. `began_s` is when the load did, on the monotonic clock."""

    def __init__(self, client: httpx.Client, settings: LoadSettings) -> None:
        self._client = client
        self._settings = settings
        self._began_s = monotonic()

    def ask(self, conversation: Conversation, turn: int, messages: list[Message]) -> tuple[Sample, float]:
        """What came of it, and how long the user then waits because he was refused or failed."""
        item, sent_s = conversation.items[turn], monotonic()
        since_s = sent_s - self._began_s
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": messages,
            "max_tokens": item.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._settings.forepage is not None:
            body["forepage"] = self._settings.forepage
        try:
            with self._client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code == httpx.codes.OK:
                    lines = ((monotonic() - sent_s, line) for line in response.iter_lines())
                    return sample_of(item, turn, response.status_code, since_s, lines), 0.0
                response.read()
                error, wait_s = _code_of(response), _wait_s(response)
                status = response.status_code
        except httpx.HTTPError as failure:
            error, wait_s, status = type(failure).__name__, FAILED_WAIT_S, 0
        return failed_sample(item, turn, status, since_s, error, total_s=monotonic() - sent_s), wait_s


def _user_class(
    conversations: Iterator[Conversation],
    asking: Asking,
    think_s: float,
    on_sample: Callable[[Sample], None],
) -> type[User]:
    class Reader(User):
        """Takes a conversation, asks its questions one after the other, takes the next."""

        @task
        def converse(self) -> None:
            """One conversation; a question that fails ends it."""
            conversation = next(conversations)
            messages, answer = conversation.opening(), ""
            for turn in range(len(conversation.items)):
                if turn:
                    messages = conversation.follow_up(turn, messages, answer)
                gevent.sleep(think_s)
                sample, wait_s = asking.ask(conversation, turn, messages)
                on_sample(sample)
                self._count(sample)
                if sample.error is not None:
                    gevent.sleep(wait_s)
                    return
                answer = sample.text

        def _count(self, sample: Sample) -> None:
            """Into locust's own statistics too."""
            error = None if sample.error is None else RuntimeError(sample.error)
            for name, seconds in (("first token", sample.ttft_s), ("answer", sample.total_s)):
                if seconds is not None:
                    self.environment.events.request.fire(
                        request_type="SSE",
                        name=name,
                        response_time=seconds * 1e3,
                        response_length=len(sample.text),
                        exception=error,
                        context={},
                    )

    return Reader


def _locust_shape(shape: Shape) -> LoadTestShape:
    class Stages(LoadTestShape):
        """Locust's way to ask how many users there are now."""

        def tick(self) -> tuple[int, float] | None:
            users = shape.users_at(self.get_run_time())  # type: ignore[no-untyped-call]
            return None if users is None else (users, USERS_PER_S)

    return Stages()  # type: ignore[no-untyped-call]


def _code_of(response: httpx.Response) -> str:
    """The code of an error in OpenAI's shape, else the status."""
    try:
        error = response.json()["error"]
        return str(error.get("code") or error["type"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return str(response.status_code)


def _wait_s(response: httpx.Response) -> float:
    retry_after = response.headers.get("retry-after", "")
    return min(MAX_WAIT_S, float(retry_after)) if retry_after.isdigit() else FAILED_WAIT_S
