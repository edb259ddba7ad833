"""Trains a dual encoder on a dump, the backbone never in memory; resumable, the best weights kept.

A step's draws come from its number and the seed, so a run that was stopped goes on as it would have.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from forepage.errors import ModelFormatError, RequestError
from forepage.kv.geometry import BLOCK_ENTRIES
from forepage.model.safetensors_file import read_file
from forepage.training.backbone.journal import Journal
from forepage.training.indexer.calibration import recall_at_budget, share_for_recall
from forepage.training.indexer.candidates import choose_candidates
from forepage.training.indexer.config import Granularity, IndexerTrainingConfig
from forepage.training.indexer.encoder import DualEncoder, block_best
from forepage.training.indexer.objective import plan_losses
from forepage.training.indexer.text_store import LoadedText, TextStore
from forepage.training.indexer.validation import validation_cells
from forepage.training.indexer.wanted import Plans

CHECKPOINT_FILE = "checkpoint.safetensors"
STATE_FILE = "state.json"
BEST_FILE = "best.safetensors"
NOTE_EVERY = 50
JITTER_STEP = 4
"""Tokens; keys stand at multiples of it."""


@dataclass(frozen=True)
class FitState:
    """Where a run stands."""

    step: int = 0
    seconds: float = 0.0
    best_share: float = float("inf")  # of blocks for the recall asked for, mean over lengths
    best_step: int = -1
    config: str = ""  # what the run is of; another config can't resume it


@dataclass(frozen=True)
class Drawn:
    """A step's plans of one text, and the queries' positions after jitter."""

    plans: Plans
    positions: Tensor


class Fitting:
    """One run in one folder."""

    def __init__(
        self,
        encoder: DualEncoder,
        store: TextStore,
        config: IndexerTrainingConfig,
        folder: Path,
    ) -> None:
        """Resumes what the folder holds. Raises: ModelFormatError: a run of another config; RequestError."""
        self.encoder = encoder
        self.store = store
        self.config = config
        self._folder = folder
        self._texts = store.texts(validation=False)
        self._validation = store.texts(validation=True)
        if not self._texts or not self._validation:
            raise RequestError("the dump has no text long enough to plan for in one of the splits", "dump")
        fit = config.fit
        self._optimizer = torch.optim.AdamW(
            encoder.parameters(), lr=fit.lr, weight_decay=fit.weight_decay, betas=(0.9, 0.98)
        )
        self.state = FitState(config=_digest(config, store.header.model_fingerprint))
        self._resume()

    def train(self, journal: Journal, *, until: float, clock: Callable[[], float] = time.monotonic) -> bool:
        """Train until all steps are done or the clock says so; whether they are."""
        fit, began, before = self.config.fit, clock(), self.state.seconds
        losses: list[Tensor] = []
        mined = 0
        if self.state.step == 0:
            self._validate(journal)
        while self.state.step < fit.steps and clock() < until:
            loss, num_mined = self._step(self.state.step)
            losses.append(loss)
            mined += num_mined
            self.state = _changed(self.state, step=self.state.step + 1, seconds=before + clock() - began)
            if self.state.step % NOTE_EVERY == 0 or self.state.step == fit.steps:
                mean = float(torch.stack(losses).mean())
                journal.write(
                    {"step": self.state.step, "seconds": self.state.seconds, "loss": mean, "mined": mined},
                    f"{self.state.seconds:6.0f}s step {self.state.step} loss {mean:.4f} mined {mined}",
                )
                journal.advance(self.state.step, "memory indexer")
                losses, mined = [], 0
            if self.state.step % fit.validate_every == 0 or self.state.step == fit.steps:
                self._validate(journal)
        self._save()
        return self.state.step >= fit.steps

    def best(self) -> dict[str, Tensor]:
        """The best weights so far, by released name."""
        return read_file(self._folder / BEST_FILE)

    def _step(self, step: int) -> tuple[Tensor, int]:
        """Its loss, and how many hard negatives it learned from."""
        fit = self.config.fit
        draw = np.random.default_rng((fit.seed, step))
        rate = _rate(step, fit.warmup_steps, fit.steps) * fit.lr
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        total, mined = torch.zeros((), device=self.encoder.wq_a.device), 0
        for _ in range(fit.texts_per_step):
            text = self._draw_text(draw)
            loss, num_mined = self._text_loss(
                text, self._drawn(text, draw), draw, mines=step >= fit.mine_from
            )
            (loss / fit.texts_per_step).backward()
            total += loss.detach() / fit.texts_per_step
            mined += num_mined
        nn.utils.clip_grad_norm_(self.encoder.parameters(), fit.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total, mined

    def _draw_text(self, draw: np.random.Generator) -> LoadedText:
        """One with plans; a text whose answers all lie in the resident tail has none."""
        for place in draw.permutation(len(self._texts)).tolist():
            text = self.store.load(self._texts[place])
            if len(text.plans):
                return text
        raise RequestError("no training text has a plan to learn from: longer texts are needed", "lengths")

    def _drawn(self, text: LoadedText, draw: np.random.Generator) -> Drawn:
        """Plans at questions' ends and elsewhere; some asked from further away than they are."""
        fit = self.config.fit
        num_first = min(len(text.firsts), round(fit.rows * fit.first_share))
        num_other = min(len(text.others), fit.rows - num_first)
        picked = np.concatenate(
            (
                draw.permutation(len(text.firsts))[:num_first],
                len(text.firsts) + draw.permutation(len(text.others))[:num_other],
            )
        )
        places = torch.cat((text.firsts, text.others))[torch.from_numpy(picked).to(text.firsts.device)]
        plans = text.plans[places]
        positions = text.features.positions[plans.rows].long()
        moved = draw.random(len(picked)) < fit.jitter_share
        steps = draw.integers(0, fit.jitter_tokens // JITTER_STEP + 1, len(picked)) * moved * JITTER_STEP
        return Drawn(plans, positions + torch.from_numpy(steps).to(positions.device))

    def _text_loss(
        self, text: LoadedText, drawn: Drawn, draw: np.random.Generator, *, mines: bool
    ) -> tuple[Tensor, int]:
        fit, plans = self.config.fit, drawn.plans
        in_blocks = self.config.label.granularity is Granularity.BLOCK
        entry_mass = self.store.wanted_mass(text, plans)  # [B, N] or [L, B, N]
        mass = entry_mass.unflatten(-1, (-1, BLOCK_ENTRIES)).sum(-1) if in_blocks else entry_mass
        limit = plans.candidates if in_blocks else plans.candidates * BLOCK_ENTRIES
        valid = torch.arange(mass.shape[-1], device=mass.device) < limit.unsqueeze(1)  # [B, n]
        asked = self.encoder.queries(text.features.hidden[plans.rows], drawn.positions)
        scores = self._present_scores(asked, text.keys, in_blocks=in_blocks) if mines else None
        generator = torch.Generator(device=mass.device).manual_seed(int(draw.integers(1 << 62)))
        chosen = choose_candidates(
            (mass > 0).reshape(-1, *mass.shape[-2:]).any(0),
            valid,
            scores,
            hard=fit.hard_negatives,
            random=fit.random_negatives,
            generator=generator,
        )
        valid = valid[:, chosen.ids]
        if not in_blocks:
            logits = self.encoder.logits(asked, text.keys[:, chosen.ids])
            return self._loss(logits, mass[..., chosen.ids], valid), chosen.num_mined
        entries = _entries_of(chosen.ids)
        logits = self.encoder.logits(asked, text.keys[:, entries])
        loss = (1 - fit.entry_share) * self._loss(block_best(logits), mass[..., chosen.ids], valid)
        if fit.entry_share:
            each = valid.repeat_interleave(BLOCK_ENTRIES, dim=1)
            loss = loss + fit.entry_share * self._loss(logits, entry_mass[..., entries], each)
        return loss, chosen.num_mined

    def _present_scores(self, asked: tuple[Tensor, Tensor], keys: Tensor, *, in_blocks: bool) -> Tensor:
        """As served, maximum over layers: f32 [B, n]."""
        scores = self.encoder.all_logits((asked[0].detach(), asked[1].detach()), keys).amax(0)
        return block_best(scores) if in_blocks else scores

    def _loss(self, logits: Tensor, mass: Tensor, valid: Tensor) -> Tensor:
        """logits [L, B, C]: each layer's own loss, and that of their maximum."""
        fit = self.config.fit

        def mean(scores: Tensor) -> Tensor:
            return plan_losses(
                fit.loss, scores, mass, valid, gamma=fit.gamma, positive_weight=fit.positive_weight
            ).mean()

        loss = logits.new_zeros(())
        if fit.joint_share < 1:
            loss = loss + (1 - fit.joint_share) * mean(logits)
        if fit.joint_share > 0:
            loss = loss + fit.joint_share * mean(logits.amax(0))
        return loss

    def _validate(self, journal: Journal) -> None:
        """Full candidate set; keeps the weights where they are the best so far."""
        cells = validation_cells(self.encoder, self.store, self._validation, lambda: None)
        target = self.config.calibration.evidence_recall
        shares = share_for_recall(cells, target)
        if not shares:
            raise RequestError("no validation text has evidence in its candidate blocks", "lengths")
        mean = sum(shares.values()) / len(shares)
        recalls = {budget: recall_at_budget(cells, budget) for budget in self.config.calibration.budgets}
        row: dict[str, Any] = {
            "step": self.state.step,
            "seconds": self.state.seconds,
            "share_for_recall": shares,
            "recall_at_budget": recalls,
        }
        shown = " ".join(f"{length}: {share:.3f}" for length, share in shares.items())
        journal.write(row, f"step {self.state.step} share of blocks for recall {target}: {shown}")
        if mean < self.state.best_share:
            save_file(self.encoder.tensors(), self._folder / BEST_FILE)
            self.state = _changed(self.state, best_share=mean, best_step=self.state.step)
        self._save()

    def _save(self) -> None:
        """Weights and moments, then the state: a state file says that the rest is whole."""
        tensors = {f"master.{name}": value.detach() for name, value in self.encoder.named_parameters()}
        for place, moments in self._optimizer.state_dict()["state"].items():
            tensors |= {f"moment.{place}.{name}": value for name, value in moments.items()}
        beside = self._folder / f"{CHECKPOINT_FILE}.new"
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, beside)
        beside.replace(self._folder / CHECKPOINT_FILE)
        (self._folder / STATE_FILE).write_text(json.dumps(asdict(self.state)) + "\n", encoding="utf-8")

    def _resume(self) -> None:
        path = self._folder / STATE_FILE
        if not path.exists():
            return
        state = FitState(**json.loads(path.read_text(encoding="utf-8")))
        if state.config != self.state.config:
            raise ModelFormatError(f"{path}: a run of another config or dump; take another folder")
        tensors = read_file(self._folder / CHECKPOINT_FILE)
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, master in self.encoder.named_parameters():
                master.copy_(tensors[f"master.{name}"])
        for name, value in tensors.items():
            if name.startswith("moment."):
                _, place, kind = name.split(".")
                moments.setdefault(int(place), {})[kind] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.state = state


def _entries_of(blocks: Tensor) -> Tensor:
    """Every entry of these blocks, in their order: i64 [64 * blocks]."""
    return (blocks.unsqueeze(1) * BLOCK_ENTRIES + torch.arange(BLOCK_ENTRIES, device=blocks.device)).flatten()


def _rate(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / max(1, warmup)) * 0.5 * (1 + float(np.cos(np.pi * step / steps)))


def _changed(state: FitState, **values: Any) -> FitState:
    return FitState(**(asdict(state) | values))


def _digest(config: IndexerTrainingConfig, fingerprint: str) -> str:
    """What must be the same for a run to go on."""
    return json.dumps(
        [asdict(config.label), asdict(config.fit), config.interval, config.recent_tokens, fingerprint]
    )
