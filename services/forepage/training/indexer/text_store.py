"""A dump's texts on the device, decoded and labelled: made when first asked for, kept while they fit."""

from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from forepage.errors import RequestError
from forepage.training.indexer.config import IndexerTrainingConfig, LabelRule
from forepage.training.indexer.encoder import decoded_keys
from forepage.training.indexer.features import Features
from forepage.training.indexer.shards import StoredText, of_split, read_features, read_header, stored_texts
from forepage.training.indexer.wanted import (
    Plans,
    WantedEntries,
    is_first,
    possible_plans,
    served_plans,
    wanted_entries,
    wanted_mass,
)


@dataclass(frozen=True)
class LoadedText:
    """One text, ready to learn from or to be scored."""

    features: Features
    keys: Tensor  # [L, M * 64, Di]
    plans: Plans  # all that are possible
    firsts: Tensor  # i64: places in `plans` of those made at the last token of a question
    others: Tensor  # i64: the rest
    served: Plans  # those that serving makes
    wanted: WantedEntries  # by the config's rule
    evidence: WantedEntries

    @property
    def num_places(self) -> int:
        """Entries of all blocks, the last one's empty places included."""
        return self.keys.shape[1]

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return self.features.num_bytes + self.keys.nbytes


class TextStore:
    """Texts of one split that have plans; the least recently used leave when `cache_bytes` are exceeded."""

    def __init__(
        self, folder: Path, config: IndexerTrainingConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raises: ModelFormatError, or RequestError for a dump that the config's labels don't fit."""
        self.header = read_header(folder)
        self.config = config
        self._num_c4 = len(self.header.spec.c4_layers)
        if config.label.mass > self.header.mass:
            raise RequestError(f"label.mass: the dump keeps mass sets of {self.header.mass} only", "mass")
        self._folder, self._device, self._dtype = folder, device, dtype
        self._texts = stored_texts(folder)
        self._kept: OrderedDict[int, LoadedText] = OrderedDict()

    def texts(self, *, validation: bool) -> list[StoredText]:
        """Of one split, those long enough to have a plan."""
        least = self.config.recent_tokens + 256
        return [text for text in of_split(self._texts, validation=validation) if 4 * text.num_entries > least]

    def load(self, text: StoredText) -> LoadedText:
        """The text on the device."""
        key = text.number
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        loaded = self._made(read_features(self._folder, text, self._device))
        held = sum(one.num_bytes for one in self._kept.values())
        while self._kept and held + loaded.num_bytes > self.config.fit.cache_bytes:
            _, oldest = self._kept.popitem(last=False)
            held -= oldest.num_bytes
        self._kept[key] = loaded
        return loaded

    def wanted_mass(self, text: LoadedText, plans: Plans) -> Tensor:
        """Of the config's rule: f32 [B, places], or [L, B, places] where each layer has labels of its own."""
        if self.config.label.rule is not LabelRule.OWN_LAYER:
            return wanted_mass(text.wanted, plans, text.num_places)
        layers = [
            wanted_mass(text.wanted, plans, text.num_places, layer) for layer in self.header.target_layers
        ]
        return torch.stack(layers)

    def _made(self, features: Features) -> LoadedText:
        config = self.config
        plans = possible_plans(features, interval=config.interval, recent_tokens=config.recent_tokens)
        first = is_first(features, plans)
        evidence = replace(config.label, rule=LabelRule.EVIDENCE)
        return LoadedText(
            features=features,
            keys=decoded_keys(features.keys, self.header.key_layout, self._dtype),
            plans=plans,
            firsts=first.nonzero().squeeze(1),
            others=(~first).nonzero().squeeze(1),
            served=served_plans(features, plans, config.interval),
            wanted=wanted_entries(features, config.label, self._num_c4),
            evidence=wanted_entries(features, evidence, self._num_c4),
        )
