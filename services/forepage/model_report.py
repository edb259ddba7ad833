"""What a model folder holds and needs, as tables: `forepage check MODEL_DIR`. Reads headers only; no torch.

Weights count as stored and as a worker holds them. Without weight files the config alone says what a
release of it would hold.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from forepage.errors import ModelFormatError
from forepage.kv.geometry import MXFP4_GROUP, KeyFormat, KvFormat, KvGeometry
from forepage.model.checkpoint import Checkpoint, weight_files
from forepage.model.footprint import SequenceFootprint, held_bytes, kv_cost, rank_bytes, sequence_footprint
from forepage.model.held_form import HeldForm
from forepage.model.spec import MEMORY_INDEXER_CONFIG, ModelSpec, read_config
from forepage.model.stored_form import StoredTensor, announced_tensors, is_quantised
from forepage.model.tensor_parallel import can_split
from forepage.model.weight_table import MTP_PREFIX
from forepage.settings import ModelSettings, ResidencyMode, Settings, WeightDtype, WorkerSettings
from forepage.text.tokenizer import TOKENIZER_FILE, Tokenizer
from forepage.text.wording import FORMAT_FILE, MAX_EFFORT_FILE, TOOLS_FILE

LEAST_WIDTH = 140
CONTEXTS = {"64K": 1 << 16, "256K": 1 << 18, "512K": 1 << 19, "1M": 1 << 20}
RANKS = (1, 2, 4, 8)
_MODES = {
    "full": ResidencyMode.FULL,
    "lookahead, guarded": ResidencyMode.GUARDED,
    "exact": ResidencyMode.EXACT,
}
_GROUPS = (
    (MTP_PREFIX, "draft block, not loaded"),
    (".shared_experts.", "shared experts"),
    (".experts.", "routed experts"),
    (".attn.indexer.", "indexers"),
    (".attn.compressor.", "compressors"),
    (".attn.", "attention"),
    ("embed.", "embedding, head"),
    ("head.", "embedding, head"),
    ("", "norms, routing, streams"),
)
"""What a name holds -> its row, the first that fits."""
_DRAFT = _GROUPS[0][1]
WORDED = (TOOLS_FILE, FORMAT_FILE, MAX_EFFORT_FILE)


@dataclass(frozen=True)
class Budget:
    """Memory that sequences and weights share."""

    gpu_bytes: int
    host_bytes: int


@dataclass(frozen=True)
class ModelReport:
    """The figures; `stored` are all tensors by official name, draft blocks included.

    `weights` says in which form (as stored, as held) how many bytes a rank has, by number of ranks.
    """

    folder: Path
    spec: ModelSpec
    geometries: Mapping[KeyFormat, KvGeometry]
    stored: Mapping[str, StoredTensor]
    num_files: int
    weights: Mapping[str, Mapping[int, int]]

    @classmethod
    def read(cls, folder: Path, weight_dtype: WeightDtype, device: str) -> "ModelReport":
        """Weights would be held as `weight_dtype` means it on a device of this type.

        Raises: ModelFormatError as a load would, before any data is read.
        """
        config = read_config(folder)
        spec = ModelSpec.from_config(config)
        weight_dtype = weight_dtype.on(device, quantised=is_quantised(config))
        form = HeldForm.of(weight_dtype, device)
        files = weight_files(folder)
        if files:
            checkpoint = Checkpoint.open(folder, spec)
            found = {**checkpoint.tensors, **checkpoint.skipped}
            stored = {name: tensor.stored for name, tensor in found.items()}
        else:
            stored = announced_tensors(spec, config)
        formats = (KeyFormat.FP8,) if spec.index_dims % MXFP4_GROUP else (KeyFormat.FP8, KeyFormat.MXFP4)
        return cls(
            folder=folder,
            spec=spec,
            geometries={key: KvGeometry.from_config(config, KvFormat.FP8, key) for key in formats},
            stored=stored,
            num_files=len(files),
            weights={
                "as stored": {n: rank_bytes(spec, stored, n) for n in RANKS if can_split(spec, n)},
                f"held as {weight_dtype}": {
                    n: held_bytes(spec, n, form, stored) for n in RANKS if can_split(spec, n)
                },
            },
        )

    def footprints(
        self, key_format: KeyFormat, settings: WorkerSettings, mode: ResidencyMode
    ) -> Iterator[SequenceFootprint]:
        """One for each context length."""
        for num_tokens in CONTEXTS.values():
            yield sequence_footprint(
                self.geometries[key_format], settings, mode, num_tokens=num_tokens, topk=self.spec.index_topk
            )


def print_report(report: ModelReport, settings: Settings, budget: Budget, ranks: int | None) -> None:
    """Every table to stdout, ruled on a terminal and plain elsewhere.

    Raises: ModelFormatError for a number of ranks that the model can't be split into, or a tokenizer that
    can't be read.
    """
    terminal = Console()
    console = Console(highlight=False, width=max(terminal.width, LEAST_WIDTH))  # numbers are never cut
    allowed = [n for n in RANKS if can_split(report.spec, n)]
    if ranks is not None and ranks not in allowed:
        listed = ", ".join(map(str, allowed))
        raise ModelFormatError(f"{report.folder}: can't be split into {ranks} ranks, only {listed}")
    beside = companions(report.folder, report.spec, settings.model)
    console.print(_headline(report), soft_wrap=True)
    for table in _tables(report, settings.worker, budget, ranks):
        title, table.title = table.title, None  # as a table's title it would be wrapped to the table
        table.box = box.SIMPLE_HEAD if console.is_terminal else None
        console.print()
        console.print(title, style="bold", soft_wrap=True)
        console.print(table)
    console.print()
    console.print("Beside the weights", style="bold", soft_wrap=True)
    for line in beside:
        console.print(line, soft_wrap=True)
    console.print()
    console.print(_fine_print(settings.worker), soft_wrap=True)


def _headline(report: ModelReport) -> str:
    spec = report.spec
    kinds = f"{spec.num_layers} layers ({len(spec.c4_layers)} c4, {len(spec.c128_layers)} c128)"
    source = (
        f"{report.num_files} weight files"
        if report.num_files
        else "no weight files here: what follows is by its config alone"
    )
    return f"{report.folder}: {kinds}, {spec.num_experts} experts; {source}"


def _tables(
    report: ModelReport, settings: WorkerSettings, budget: Budget, ranks: int | None
) -> Iterator[Table]:
    yield _weights_table(report.stored)
    yield _ranks_table(report.weights, budget.gpu_bytes)
    yield from (_cost_table(key, geometry) for key, geometry in report.geometries.items())
    yield from (_gpu_table(report, settings, budget.gpu_bytes, form, ranks) for form in report.weights)
    yield _host_table(report, settings, budget.host_bytes)


def companions(folder: Path, spec: ModelSpec, settings: ModelSettings) -> list[str]:
    """What serving needs beside the weights, a line each: found, or what happens without it."""
    if (folder / TOKENIZER_FILE).exists():
        size = Tokenizer.load(folder).vocab_size
        tokenizer = f"{size:,} tokens" + (
            "" if size <= spec.vocab_size else f", the model {spec.vocab_size:,}"
        )
    else:
        tokenizer = "none: neither gateway nor worker start"
    if settings.memory_indexer is not None:
        is_there = "" if settings.memory_indexer.exists() else ", which is not there"
        indexer = f"{settings.memory_indexer} (FOREPAGE_MODEL__MEMORY_INDEXER){is_there}"
    elif (folder / MEMORY_INDEXER_CONFIG).exists():
        indexer = "in the folder"
    else:
        indexer = "none: name its file in FOREPAGE_MODEL__MEMORY_INDEXER, else neither index nor worker start"
    ours = {
        name: "in the folder" if (folder / name).exists() else "none: a wording of ours" for name in WORDED
    }
    if not (folder / MAX_EFFORT_FILE).exists():
        ours[MAX_EFFORT_FILE] = "none: reasoning_effort max is refused"
    found = {TOKENIZER_FILE: tokenizer, "memory indexer": indexer} | ours
    return [f"{what}: {state}" for what, state in found.items()]


def _weights_table(stored: Mapping[str, StoredTensor]) -> Table:
    """Tensors and bytes by group and dtype."""
    dtypes = sorted({tensor.dtype for tensor in stored.values()})
    counts: Counter[str] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for name, tensor in stored.items():
        group = next(group for mark, group in _GROUPS if mark in name)
        counts[group] += 1
        sizes[group, tensor.dtype] += tensor.num_bytes
    table = _table("Weights, bytes as stored", "", "tensors", *dtypes, "all")
    loaded = sorted(counts.keys() - {_DRAFT})

    def row(label: str, groups: list[str]) -> None:
        by_dtype = [sum(sizes[group, dtype] for group in groups) for dtype in dtypes]
        numbers = (sum(counts[group] for group in groups), *by_dtype, sum(by_dtype))
        table.add_row(label, *(f"{number:,}" for number in numbers))

    for group in loaded:
        row(group, [group])
    row("loaded", loaded)
    if counts[_DRAFT]:
        row(_DRAFT, [_DRAFT])
        row("in the folder", [*loaded, _DRAFT])
    return table


def _ranks_table(weights: Mapping[str, Mapping[int, int]], gpu_bytes: int) -> Table:
    columns = [column for form in weights for column in (f"bytes {form}", f"left of {_size(gpu_bytes)}")]
    table = _table("Weights of a tensor-parallel rank", "ranks", *columns)
    for ranks in RANKS:
        cells: list[str] = []
        for by_ranks in weights.values():
            if ranks in by_ranks:
                left = gpu_bytes - by_ranks[ranks]
                cells += [_exact(by_ranks[ranks]), _size(left) if left > 0 else "does not fit"]
        if not cells:
            cells = ["-", "heads, output groups or experts don't divide"]
        table.add_row(str(ranks), *cells)
    return table


def _cost_table(key_format: KeyFormat, geometry: KvGeometry) -> Table:
    title = f"KV of one sequence, {key_format} indexer keys"
    table = _table(title, "context", "c4 rows", "indexer keys", "c128 rows", "window", "total", "B/token")
    for label, num_tokens in CONTEXTS.items():
        cost = kv_cost(geometry, num_tokens)
        parts = (f"{part:,}" for part in (cost.rows, cost.keys, cost.c128, cost.window))
        table.add_row(label, *parts, _exact(cost.total), f"{cost.total / num_tokens:.1f}")
    return table


def _gpu_table(
    report: ModelReport, settings: WorkerSettings, gpu_bytes: int, form: str, ranks: int | None
) -> Table:
    """With the weights in that form; on the given number of ranks, else on the fewest that hold them."""
    by_ranks = report.weights[form]
    chosen = by_ranks if ranks is None else {ranks: by_ranks[ranks]}
    ranks = next((n for n, weights in chosen.items() if weights < gpu_bytes), None)
    if ranks is None:
        return _table(f"Sequences on a GPU of {_size(gpu_bytes)}: none, weights {form} don't fit", "")
    free = gpu_bytes - by_ranks[ranks]
    split = "one rank" if ranks == 1 else f"{ranks} ranks"
    title = f"Sequences in {_size(free)}: a GPU of {_size(gpu_bytes)}, {split}, weights {form}"
    table = _table(title, "keys", "mode", *CONTEXTS)
    table.columns[1].justify = "left"
    for key_format in report.geometries:
        for label, mode in _MODES.items():
            fits = (str(foot.num_on_gpu(free)) for foot in report.footprints(key_format, settings, mode))
            table.add_row(key_format, label, *fits)
    return table


def _host_table(report: ModelReport, settings: WorkerSettings, host_bytes: int) -> Table:
    table = _table(f"Sequences that fit in host memory of {_size(host_bytes)}", "keys", "mode", *CONTEXTS)
    table.columns[1].justify = "left"
    for key_format in report.geometries:
        for label, mode in _MODES.items():
            fits = (
                str(foot.num_on_host(host_bytes)) for foot in report.footprints(key_format, settings, mode)
            )
            table.add_row(key_format, label, *fits)
    return table


def _fine_print(settings: WorkerSettings) -> str:
    given = settings.budget_blocks
    budget = "a budget that follows the length" if given is None else f"budget {given} blocks"
    return (
        "A worker holds weights as FOREPAGE_MODEL__WEIGHT_DTYPE says; on a CPU head, router and compressors "
        "in fp32.\n"
        f"Fits: {budget}, {settings.recent_tokens} recent tokens, "
        f"{settings.load_slack_blocks} blocks of slack; window and compressor state counted; nothing is set "
        "aside for activations.\n"
        "One sequence at a time is prefilled, which takes all its KV. All ranks hold the same KV.\n"
        "In every mode finished blocks and resume records go to host memory."
    )


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _exact(num_bytes: int) -> str:
    return f"{num_bytes:,} ({_size(num_bytes)})"


def _size(num_bytes: int) -> str:
    """In the unit that people say it in."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
