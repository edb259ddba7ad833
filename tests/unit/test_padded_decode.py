"""Padded decode steps: what is beside a row, how it is launched, where its rows lie: it changes no bit."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import pytest
import torch
from torch import Tensor

from forepage.model.indexer import IndexerTap
from forepage.worker.decode_graph import StepShape
from forepage.worker.launched_step import StepResult
from forepage.worker.padded_decode import padded_blocks, padded_rows
from forepage.worker.sampler import Row, Sampling, sample
from rigs.decode import GREEDY, DecodeRig, prompts

CPU = torch.device("cpu")
RANDOM = Sampling(temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=7)
PROMPT_TOKENS = 1_100
GRAPHS = 16
MODES = ("full", "lookahead", "exact")


@dataclass(frozen=True)
class Replay:
    """A run's logits [steps, B, vocab] and tokens [steps, B]."""

    logits: Tensor
    tokens: list[list[int]]


def run(
    device: torch.device, mode: str, *, batch: int, num_steps: int, max_graphs: int, ahead: int = 0
) -> Replay:
    """One recorded schedule: in a paged mode a sequence in three drops a block or gets one back each step."""
    random = Random(batch)
    rig = DecodeRig(device, num_sequences=batch, blocks_each=6, max_graphs=max_graphs)
    try:
        for at, prompt in enumerate(prompts(batch, PROMPT_TOKENS)):
            one = rig.add(prompt, RANDOM if at % 2 else GREEDY)
            if mode == "exact":
                rig.stage(one)
        logits, tokens, unread = [], [], []
        commits: list[Callable[[], None]] = []
        for _ in range(num_steps):
            for commit in commits:
                commit()
            commits = []
            for one in rig.held:
                if random.randrange(3) or mode == "full":
                    continue
                idx = random.choice(sorted(one.offsets))
                if idx in one.rows:
                    rig.drop(one, idx, keys=mode == "lookahead")
                else:
                    commits.append(rig.start_load(one, idx))
            step = rig.launch()
            logits.append(step.logits[:batch].clone())
            unread.append(step)
            while len(unread) > ahead:
                tokens.append(check_result(unread.pop(0).read(), mode))
        tokens += [check_result(step.read(), mode) for step in unread]
        return Replay(torch.stack(logits).cpu(), tokens)
    finally:
        rig.close()


def check_result(result: StepResult, mode: str) -> list[int]:
    assert not any(result.unserved)
    assert mode == "exact" or not any(result.pulled)
    return [pick.token for pick in result.picks]


def is_same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, and no NaN."""
    return bool(torch.equal(one.view(torch.int32), other.view(torch.int32)) and not one.isnan().any())


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with torch.inference_mode():
        yield torch.device("cuda", 0)


def test_padding_goes_up_in_few_steps_and_never_down() -> None:
    sizes = [padded_rows(count) for count in range(1, 257)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 14
    assert all(size <= 2 * count for count, size in enumerate(sizes, 1))
    assert [padded_blocks(count, 300) for count in (1, 8, 9, 200, 300)] == [8, 8, 16, 256, 300]


def test_rows_beside_it_and_how_its_token_comes_change_nothing() -> None:
    """On a CPU: the tokens of a batch that feeds itself are those of each sequence given its own."""
    with torch.inference_mode():
        together = run(CPU, "full", batch=3, num_steps=6, max_graphs=0, ahead=1)
        rig = DecodeRig(CPU, num_sequences=3, blocks_each=6, max_graphs=0)
        held = [
            rig.add(prompt, RANDOM if at % 2 else GREEDY)
            for at, prompt in enumerate(prompts(3, PROMPT_TOKENS))
        ]
        for at, one in enumerate(held):
            for step in range(6):
                pick = rig.launch([one]).read().picks[0]
                assert pick.token == together.tokens[step][at]
                one.token = pick.token
        rig.close()


def test_exact_equals_full_bit_for_bit_while_blocks_come_and_go() -> None:
    with torch.inference_mode():
        full, exact = (run(CPU, mode, batch=3, num_steps=8, max_graphs=0) for mode in ("full", "exact"))
    assert is_same(exact.logits, full.logits)
    assert exact.tokens == full.tokens


def test_taps_are_those_of_the_step() -> None:
    """Hidden states and indexer taps of two rows of three equal what the model gave."""
    with torch.inference_mode():
        rig = DecodeRig(CPU, num_sequences=3, blocks_each=6, max_graphs=0)
        for prompt in prompts(3, PROMPT_TOKENS):
            rig.add(prompt)
        given: list[list[IndexerTap]] = []
        inner = rig.local.decode

        def spy(*args: object, **how: bool) -> object:
            output = inner(*args, **how)  # type: ignore[arg-type]
            given.append(output.indexer)
            return output

        rig.local.decode = spy  # type: ignore[method-assign,assignment]
        step = rig.launch(taps=(0, 2))
        for row in (0, 2):
            tap = step.tap(row)
            assert tap.hidden is not None
            assert tap.hidden.shape == (2, rig.spec.hidden_size)
            for ours, theirs in zip(tap.indexer, given[0], strict=True):
                for name in ("query", "weights", "selected", "scores"):
                    assert torch.equal(getattr(ours, name)[tap.row], getattr(theirs, name)[row])
        rig.close()


class NoRoom:
    """Graphs of a device that has no memory for one."""

    def find(self, shape: StepShape) -> None: ...

    def capture(self, shape: StepShape) -> None:
        raise torch.OutOfMemoryError(f"no room for {shape}")


def test_without_memory_for_a_graph_steps_go_on_kernel_by_kernel_and_say_so() -> None:
    with torch.inference_mode():
        said = []
        for graphs in (None, NoRoom()):
            rig = DecodeRig(CPU, num_sequences=1, blocks_each=2, max_graphs=0)
            rig.decode._wants_graphs, rig.decode._graphs = True, graphs  # type: ignore[assignment]
            rig.add(prompts(1, 200)[0])
            steps = [rig.launch() for _ in range(3)]
            said.append([step.read().picks for step in steps])
            assert {step.fallbacks for step in steps} == {("eager_decode",)}
            rig.close()
    assert said[0] == said[1]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "batch"),
    [*((mode, batch) for mode in MODES for batch in (1, 7, 64)), ("lookahead", 256)],
)
def test_a_replayed_step_equals_a_launched_one(cuda: torch.device, mode: str, batch: int) -> None:
    """Graphs running one step ahead against the same schedule kernel by kernel, each step read at once."""
    num_steps = 24 if batch > 64 else 60
    eager = run(cuda, mode, batch=batch, num_steps=num_steps, max_graphs=0)
    graphs = run(cuda, mode, batch=batch, num_steps=num_steps, max_graphs=GRAPHS, ahead=1)
    assert is_same(graphs.logits, eager.logits)
    assert graphs.tokens == eager.tokens


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_exact_equals_full_in_graphs(cuda: torch.device, batch: int) -> None:
    full, exact = (
        run(cuda, mode, batch=batch, num_steps=60, max_graphs=GRAPHS, ahead=1) for mode in ("full", "exact")
    )
    assert is_same(exact.logits, full.logits)
    assert exact.tokens == full.tokens


@pytest.mark.gpu
def test_padding_rows_change_no_other(cuda: torch.device) -> None:
    """Seven sequences padded to eight, and the same seven with a real eighth."""
    padded = run(cuda, "full", batch=7, num_steps=30, max_graphs=GRAPHS)
    rig = DecodeRig(cuda, num_sequences=8, blocks_each=6, max_graphs=GRAPHS)
    for at, prompt in enumerate(prompts(8, PROMPT_TOKENS)):
        rig.add(prompt, RANDOM if at % 2 else GREEDY)
    for expected in padded.logits:
        assert is_same(rig.launch().logits[:7].cpu(), expected)
    rig.close()


@pytest.mark.gpu
def test_tokens_picked_in_a_graph_are_the_samplers(cuda: torch.device) -> None:
    hows = [GREEDY, RANDOM, Sampling(1.3, 1.0, 0, 0.0, 1), Sampling(0.7, 0.5, 0, 0.2, 2), GREEDY]
    rig = DecodeRig(cuda, num_sequences=5, blocks_each=6, max_graphs=GRAPHS)
    held = [rig.add(prompt, how) for prompt, how in zip(prompts(5, 300), hows, strict=True)]
    for _ in range(40):
        step = rig.launch()
        rows = [Row(one.sampling, one.position) for one in held]
        expected = sample(step.logits[:5].clone(), rows)
        alone = [sample(step.logits[at : at + 1].clone(), [row])[0] for at, row in enumerate(rows)]
        assert list(step.read().picks) == expected == alone
    rig.close()


@pytest.mark.gpu
def test_graphs_are_few_share_memory_and_can_be_captured_again(cuda: torch.device) -> None:
    rig = DecodeRig(cuda, num_sequences=12, blocks_each=6, max_graphs=3)
    held = [rig.add(prompt) for prompt in prompts(12, 300)]
    for count in (1, 2, 4, 8, 12, 1, 12):
        rig.launch(held[:count]).read()
        for one in held:
            one.token = 65
    assert rig.decode.num_graphs == 3
    assert 0 < rig.decode.graph_bytes < 1 << 30
    rig.close()


@pytest.mark.gpu
def test_a_shape_captured_beforehand_is_not_captured_again_and_changes_no_bit(cuda: torch.device) -> None:
    shape = StepShape(rows=4, blocks=6, draws=True, pulls=False)
    results = []
    for is_warmed in (False, True):
        rig = DecodeRig(cuda, num_sequences=3, blocks_each=6, max_graphs=GRAPHS)
        try:
            if is_warmed:
                rig.decode.capture(shape)
            for at, prompt in enumerate(prompts(3, PROMPT_TOKENS)):
                rig.add(prompt, RANDOM if at % 2 else GREEDY)
            steps = [rig.launch().read() for _ in range(4)]
            assert rig.decode.num_graphs == 1
            results.append([[pick.token for pick in step.picks] for step in steps])
        finally:
            rig.close()
    assert results[0] == results[1]
