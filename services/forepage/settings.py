"""The one typed settings tree: a frozen section a process, read from FOREPAGE_<SECTION>__<FIELD>.

A process gets its own section, never the tree. settings_environment.py reads it. OTEL_* variables belong to
the OpenTelemetry SDK.
"""

import socket
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "FOREPAGE_"
REDIS_SCHEMES = ("redis", "rediss", "unix")
_BUNDLED = Path(__file__).parent / "model" / "bundled"
TINY_MODEL = _BUNDLED / "tiny"
"""What is served where no model is named: small, and trained to find things in long texts."""
SEEDED_MODEL = _BUNDLED / "seeded"
"""Smaller, with random weights made from a seed: for tests."""


class ResidencyMode(StrEnum):
    """What a sequence keeps on the GPU, and what is promised about the rest (DESIGN 4)."""

    FULL = "full"
    LOOKAHEAD = "lookahead"
    GUARDED = "guarded"
    EXACT = "exact"


class OnIndexDown(StrEnum):
    """What a paged sequence does while the lookahead index can't be reached."""

    TAIL = "tail"
    EXACT = "exact"


class Tier(StrEnum):
    """Where the cold pool puts records that the arena has no room for, in order of preference."""

    REDIS = "redis"
    DISK = "disk"


class Verify(StrEnum):
    """When arena payloads are checksummed: by a background scrubber, or also before each lease."""

    SCRUB = "scrub"
    ALWAYS = "always"


class WeightDtype(StrEnum):
    """What a worker holds the model's matrices in, and computes with."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    STORED = "stored"

    def on(self, device: str, *, quantised: bool) -> "WeightDtype":
        """What it is on a device of this type, for a checkpoint that is quantised or not.

        Left to us: on a GPU as stored, on a CPU fp32. Plain matrices are bf16 on a GPU, fp32 on a CPU.
        """
        if self in (WeightDtype.FP32, WeightDtype.BF16):
            return self
        if quantised and (self is WeightDtype.STORED or device != "cpu"):
            return WeightDtype.STORED
        return WeightDtype.FP32 if device == "cpu" else WeightDtype.BF16


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ModelSettings(Section):
    """Which model, and how its KV is stored."""

    path: Path = Field(TINY_MODEL, description="folder with config.json and tokenizer.json")
    kv_format: str = Field(
        "fp8", pattern="^(fp8|fp32)$", description="KV rows and keys: fp8, or fp32 (tests)"
    )
    key_format: str = Field(
        "fp8",
        pattern="^(fp8|mxfp4)$",
        description="indexer keys beside fp8 rows: fp8, or mxfp4 (half the bytes)",
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="where the worker computes")
    weight_dtype: WeightDtype = Field(
        WeightDtype.AUTO,
        description="what matrices are held in: fp32, bf16, or stored (FP8 and MXFP4 stay as they are); "
        "auto is stored on a GPU, fp32 on a CPU",
    )
    memory_indexer: Path | None = Field(
        None, description="memory indexer, .safetensors or .pt; none: memory_indexer.safetensors in path"
    )


class GatewaySettings(Section):
    """The HTTP edge."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: Port = Field(8000, description="port to listen on")
    worker_addresses: tuple[str, ...] = Field(
        (), description="fixed workers; empty: those registered in Redis"
    )
    max_concurrent_requests: int = Field(
        256, ge=1, description="requests in flight; more are refused with 429"
    )
    max_body_bytes: int = Field(64 << 20, ge=1024, description="largest request body")
    default_max_tokens: int = Field(512, ge=1, description="max_tokens when the request names none")
    request_timeout_s: Seconds = Field(3600.0, description="a request's longest life")
    drain_timeout_s: Seconds = Field(30.0, description="on SIGTERM: how long streams may go on")
    worker_poll_s: Seconds = Field(1.0, description="how often the worker list and load are refreshed")
    max_resumes: int = Field(
        2, ge=0, description="how often an answer whose worker was lost may go on at another; 0: it ends"
    )
    resume_wait_s: float = Field(
        10.0, ge=0, le=3600, description="how long such an answer waits for a worker that takes it over"
    )
    dashboard: bool = Field(
        True,
        description="whether `/` serves the page that shows what is resident; with api_keys it asks for one",
    )
    api_keys: Path | None = Field(
        None,
        description="file of API keys' digests, a line each (`forepage new-key`); none: no key is asked for",
    )
    cors_origins: tuple[str, ...] = Field((), description="web origins whose pages may ask; none by default")
    tls_cert: Path | None = Field(
        None, description="certificate chain for HTTPS, PEM; none: HTTP, for loopback or behind a proxy"
    )
    tls_key: Path | None = Field(None, description="its key, PEM without a password")

    @model_validator(mode="after")
    def _whole_pair(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("set both tls_cert and tls_key, or neither")
        return self


class IndexSettings(Section):
    """The lookahead index."""

    listen: str = Field("127.0.0.1:7101", description="gRPC address")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="where it scores; auto: on a GPU if it sees one",
    )
    threshold: float | None = Field(
        None, ge=0.0, le=1.0, description="an entry is wanted above this; none: as the indexer was calibrated"
    )
    plan_stream_maxlen: int = Field(10_000, ge=1, description="plans kept on the Redis stream for observers")
    max_inflight: int = Field(64, ge=1, le=1000, description="questions worked on or queued per stream")
    metrics_port: Port = Field(0, description="Prometheus port; 0: off")
    drain_timeout_s: Seconds = Field(5.0, description="on SIGTERM: how long open questions may take")


class ColdpoolSettings(Section):
    """The cold pool manager of one host."""

    listen: str = Field("127.0.0.1:7102", description="gRPC address")
    capacity_bytes: int = Field(1 << 30, ge=1 << 16, description="arena size; allocated at the start")
    shm_dir: Path = Field(Path("/dev/shm"), description="where the arena and the holders' locks lie")
    tiers: tuple[Tier, ...] = Field((), description="spill tiers behind the arena, in order")
    disk_dir: Path | None = Field(None, description="folder of the disk tier")
    disk_bytes: int = Field(8 << 30, ge=0, description="bound of the disk tier")
    redis_tier_bytes: int = Field(1 << 30, ge=0, description="bound of the Redis value tier")
    verify: Verify = Field(Verify.SCRUB, description="when payloads in the arena are checksummed")
    scrub_bytes_per_s: int = Field(64 << 20, ge=0, description="speed of the scrubber; 0: off")
    probe_interval_s: Seconds = Field(1.0, description="how often dead holders are looked for")
    directory_queue: int = Field(10_000, ge=1, description="directory writes kept while Redis is down")
    metrics_port: Port = Field(0, description="Prometheus port; 0: off")
    drain_timeout_s: Seconds = Field(5.0, description="on SIGTERM: how long calls may take")


class WorkerSettings(Section):
    """One decode worker: a GPU, several that share the model, or the CPU."""

    listen: str = Field("127.0.0.1:7103", description="gRPC address")
    worker_id: str = Field(
        "worker-0",
        pattern="^[A-Za-z0-9_.-]{1,64}$",
        description="unique name; {hostname} in it stands for this host's",
    )
    advertise: str | None = Field(
        None, description="address that gateways use, likewise with {hostname}; default: listen"
    )
    index_address: str = Field("127.0.0.1:7101", description="the lookahead index")
    coldpool_address: str = Field("127.0.0.1:7102", description="the cold pool manager of this host")
    default_mode: ResidencyMode = Field(ResidencyMode.GUARDED, description="mode of requests that name none")
    min_recall: float = Field(
        0.95, ge=0.0, le=1.0, description="guarded: floor of evidence recall at an audited step"
    )
    budget_blocks: int | None = Field(
        None, ge=1, description="blocks a sequence may keep because of their score; none: by its length"
    )
    recent_tokens: int = Field(2048, ge=256, description="newest tokens that always stay resident")
    prompt_tokens: int = Field(
        256,
        ge=0,
        le=4096,
        description="tokens at a prompt's end whose evidence the plans keep; 0: prediction alone",
    )
    interval_steps: int = Field(64, ge=4, le=1024, description="decode steps between predictions")
    random_audits: int = Field(7, ge=0, le=16, description="audited steps an interval besides the boundary")
    early_audit_steps: int = Field(
        256, ge=0, le=4096, description="first steps of an answer audited densely, unless split over ranks"
    )
    early_audit_every_steps: int = Field(
        1, ge=1, le=64, description="every so many of the first steps are audited, the first one included"
    )
    audit_layers: int = Field(2, ge=1, description="c4 layers looked at in an audited step")
    clean_intervals: int = Field(4, ge=1, description="clean intervals before an escalation is stepped back")
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="ranks the model is split over: GPUs, or processes on the CPU"
    )
    max_running: int = Field(16, ge=1, le=1024, description="sequences decoded together")
    decode_graphs: int = Field(
        100, ge=0, le=1024, description="CUDA graphs of decode steps kept, one for each shape; 0: none"
    )
    warm_up_tokens: tuple[Annotated[int, Field(ge=512)], ...] = Field(
        (1 << 17, 1 << 18, 1 << 19, 1 << 20),
        description="contexts whose decode steps a GPU captures before it is ready; []: no warm-up",
    )
    ahead_steps: int | None = Field(
        None,
        ge=0,
        le=1,
        description="decode steps launched before the last is read; none: 1 on one GPU, else 0",
    )
    ahead_of_verdicts: bool = Field(
        False,
        description="launch the step behind one whose token waits for its audit's verdict; after a miss the "
        "device leaves it out. Off, since it has not run on a GPU",
    )
    max_waiting: int = Field(256, ge=1, description="sequences queued; more are refused with 429")
    max_context_tokens: int = Field(1 << 20, ge=512, description="prompt and answer together")
    prefill_chunk_tokens: int | None = Field(
        None, ge=128, multiple_of=128, description="tokens of a prefill step; none: 4096 on a GPU, else 512"
    )
    prefill_share: float = Field(
        0.45,
        ge=0.0,
        le=1.0,
        description="of the time, for prefill while others decode; 0.5: a token takes up to twice as long, "
        "1: a chunk is never cut",
    )
    resume_every_tokens: int = Field(
        16_384, ge=256, multiple_of=256, description="distance of resume records"
    )
    kv_bytes: int = Field(2 << 30, ge=1 << 20, description="device memory for rows and keys of all sequences")
    key_share: float = Field(0.25, gt=0.0, lt=1.0, description="share of kv_bytes for key blocks")
    c128_share: float = Field(0.1, gt=0.0, lt=0.5, description="share of kv_bytes for c128 rows, never paged")
    full_share: float = Field(
        0.5,
        ge=0.0,
        le=1.0,
        description="share of the blocks up to which sequences whose request names no budget stay full; "
        "0: none do",
    )
    load_slack_blocks: int = Field(
        16, ge=1, description="blocks a sequence may hold above its set while loading: promised to each"
    )
    load_lent_blocks: int = Field(
        112, ge=0, description="and so many more, while nobody is promised them and no request waits for room"
    )
    escalation_reserve_bytes: int = Field(64 << 20, ge=0, description="key blocks kept for moves to exact")
    predict_deadline_ms: int = Field(2_000, ge=1, description="a plan later than this is not waited for")
    first_plan_timeout_ms: int = Field(5_000, ge=1, description="how long the first step waits for its plan")
    admission_timeout_s: Seconds = Field(120.0, description="a request that finds no room by then is refused")
    on_index_down: OnIndexDown = Field(OnIndexDown.TAIL, description="paged sequences without an index")
    metrics_port: Port = Field(0, description="Prometheus port; 0: off")
    drain_timeout_s: Seconds = Field(30.0, description="on SIGTERM: how long sequences may go on")

    @field_validator("worker_id", "advertise", mode="before")
    @classmethod
    def _with_hostname(cls, value: object) -> object:
        """So that replicas of one container differ."""
        return value.replace("{hostname}", socket.gethostname()) if isinstance(value, str) else value


class TlsSettings(Section):
    """Mutual TLS between our processes, and with Redis where its URL is `rediss://`."""

    cert: Path | None = Field(None, description="this process's certificate chain, PEM; none: plain gRPC")
    key: Path | None = Field(None, description="its key, PEM without a password")
    ca: Path | None = Field(None, description="authorities that peers must be signed by, PEM")
    server_name: str | None = Field(
        None, description="name in the certificates of all our servers; none: each names its own address"
    )

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        given = [self.cert is not None, self.key is not None]
        if any(given) and not (all(given) and self.ca is not None):
            raise ValueError("set cert, key and ca, or none of them (ca alone: for Redis)")
        return self


class TelemetrySettings(Section):
    """Logs and traces; exporters over the network are chosen by the SDK's own OTEL_* variables."""

    log_level: str = Field("info", pattern="^(debug|info|warning|error)$", description="least level logged")
    log_json: bool = Field(True, description="one JSON object a line; false: for reading")
    span_dir: Path | None = Field(
        None,
        description="folder where each process keeps its newest spans for `forepage trace`; "
        "none: nowhere (`forepage up`: its run folder)",
    )
    span_bytes: int = Field(16 << 20, ge=1 << 16, description="bound of one process's spans in span_dir")


class Settings(BaseSettings):
    """The whole tree."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    instance: str = Field(
        "default", pattern="^[A-Za-z0-9_.-]{1,64}$", description="names shared memory and Redis keys"
    )
    redis_url: SecretStr | None = Field(None, description="Redis or Valkey; none: `forepage up` starts one")
    gateway: GatewaySettings = GatewaySettings()
    index: IndexSettings = IndexSettings()
    worker: WorkerSettings = WorkerSettings()
    coldpool: ColdpoolSettings = ColdpoolSettings()
    model: ModelSettings = ModelSettings()
    tls: TlsSettings = TlsSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @field_validator("redis_url")
    @classmethod
    def _is_redis(cls, url: SecretStr | None) -> SecretStr | None:
        """Here for every role, since the client's own error quotes what it took for a port."""
        if url is None:
            return None
        try:
            found = urlsplit(url.get_secret_value())
            is_right = found.scheme in REDIS_SCHEMES and (found.port is None or found.port > 0)
        except ValueError:
            is_right = False
        if not is_right:
            raise ValueError(
                f"begins with one of {', '.join(REDIS_SCHEMES)}, then ://, and has a number for its port; "
                "in a password write / as %2F, : as %3A, @ as %40, # as %23 and ? as %3F"
            )
        return url
