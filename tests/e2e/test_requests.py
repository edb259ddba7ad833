"""What a client meets besides a good answer: refusals that name the field, and going away in the middle."""

import threading

import httpx
import pytest

from rigs.stack import Stack, wait_until
from rigs.traced import Traced

CHAT = "/v1/chat/completions"


def post(stack: Stack, **fields: object) -> httpx.Response:
    body = {"model": "forepage-seeded", "messages": [{"role": "user", "content": "hello"}], **fields}
    return httpx.post(f"{stack.url}{CHAT}", json=body, timeout=60)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"forepage": {"mode": "quick"}}, "forepage.mode"),
        ({"forepage": {"min_recall": 2}}, "forepage.min_recall"),
        ({"forepage": {"mod": "exact"}}, "forepage.mod"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(
    traced: Traced, fields: dict[str, object], param: str
) -> None:
    response = post(traced.stack, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_prompt_over_the_limit_is_refused_before_any_work(traced: Traced) -> None:
    before = traced.stack.arena()
    response = post(traced.stack, messages=[{"role": "user", "content": "x" * (1 << 20)}])
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert traced.stack.arena() == before


def test_a_prompt_the_device_can_never_hold_is_refused_with_what_to_do(traced: Traced) -> None:
    response = post(traced.stack, messages=[{"role": "user", "content": "x" * 900_000}], max_tokens=8)
    assert response.status_code == 400
    assert "raise" in response.json()["error"]["message"]


def test_an_answer_without_streaming(traced: Traced) -> None:
    response = post(traced.stack, max_tokens=6, temperature=0, ignore_eos=True)
    assert response.status_code == 200
    body = response.json()
    assert body["usage"]["completion_tokens"] == 6
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["forepage"]["mode_requested"] == "guarded"
    assert body["usage"]["forepage"]["full_by_size"] is True


def test_text_completions_continue_the_prompt(traced: Traced) -> None:
    body = {"model": "forepage-seeded", "prompt": "import os\n", "max_tokens": 5, "temperature": 0}
    response = httpx.post(f"{traced.stack.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens"] == len("import os\n")


def test_models_health_and_metrics(traced: Traced) -> None:
    url = traced.stack.url
    assert [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]] == ["forepage-seeded"]
    assert httpx.get(f"{url}/health/live").status_code == 200
    assert httpx.get(f"{url}/health/ready").status_code == 200
    metrics = httpx.get(f"{url}/metrics").text
    assert "gen_ai_server_time_to_first_token" in metrics


def test_a_client_that_goes_away_frees_everything_within_a_moment(traced: Traced, document: str) -> None:
    stack = traced.stack
    body = {
        "model": "forepage-seeded",
        "messages": [{"role": "user", "content": document}],
        "max_tokens": 5000,
        "ignore_eos": True,
        "stream": True,
        "forepage": {"mode": "exact", "budget_blocks": 4},
    }
    with httpx.stream("POST", f"{stack.url}{CHAT}", json=body, timeout=120) as response:
        lines = (line for line in response.iter_lines() if '"content"' in line)
        for _ in range(5):
            next(lines)
        assert stack.worker().running == 1

    def is_idle() -> bool:
        worker = stack.worker()
        return worker.running == 0 and worker.slots_free == worker.max_running and stack.arena().leased == 0

    wait_until(is_idle, timeout_s=10, what=f"idle: {stack.worker()}")


def test_many_short_requests_at_once_all_end_and_nothing_is_left(traced: Traced) -> None:
    """More than run together: some wait their turn."""
    stack, answers = traced.stack, list[httpx.Response]()
    threads = [
        threading.Thread(target=lambda i=i: answers.append(post(stack, max_tokens=8, seed=i)))
        for i in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 24
    wait_until(lambda: stack.worker().running == 0, timeout_s=10, what="idle")
    assert stack.arena().leased == 0
