"""The tables of a configuration file, as frozen dataclasses. All defaults are defined here, those of [policy] and flips
in policy/."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetri.policy.length import ENDS
from tetri.policy.pairing import TRANSPORTS
from tetri.policy.rules import TABLES, Rules
from tetri.policy.views import FlipSettings
from tetri.strict import REQUIRED, ConfigError, choice, number, path, text

_RULES = Rules()
_FLIP = FlipSettings()
CLUSTER_NAME = r"[a-z0-9-]{1,20}"
_IID = r"(?!(broker|monitor|supervisord|gateway\d*)$)[a-z0-9]{1,16}"  # worker processes are named by iid, beside these
LINKS = ("roce-200g", "nvlink")
_CPUS = r"(\+?\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?"
# As in numactl, + counts the CPUs that the process may use: "+0" is the first of them, whatever its number.
_CPUS_ALLOWED = 'CPU numbers such as "0", "0-1" or "0,2", or "+0" for the first allowed; "" pins nothing'


def _cpus() -> Any:
    return text("", _CPUS, _CPUS_ALLOWED)


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """Settings of the whole deployment: its name, folder, key and timeouts."""

    name: str = text("tetri", CLUSTER_NAME, "1 to 20 of a-z, 0-9 and -")  # part of shared-memory names
    run_dir: str = path("", "a folder")  # "": $XDG_RUNTIME_DIR/tetri, or /tmp/tetri-<uid>
    # KV over TCP is encrypted with it: the same file on all hosts; "": `up` makes one for this host.
    key: str = path("", "a file made by tetri-cli keygen")
    heartbeat_s: float = number(0.2, 0.01, 60, was="beat_s")  # how often a worker reports what it holds
    dead_s: float = number(20.0, 0.1, 3600)  # a worker silent for so long is lost; must exceed the longest chunk
    patience_s: float = number(60.0, 0, 86400)  # a request that no worker can take fails after this
    record: bool = False  # write events and actions of every core to <run_dir>/record, for tetri-cli sim replay
    record_mib: int = number(1024, 1, 1 << 24)  # a process with so many MiB of records, old ones too, records no more


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Where clients connect, and how many requests may be open."""

    clients: str = path("", "an address")  # "": ipc://<run_dir>/clients; or tcp://127.0.0.1:PORT
    max_open: int = number(4096, 1, 1 << 20)  # choices of requests
    # Memory for all requests: each takes 4 KiB, 8 bytes a token of its prompt and 24 for each that it may generate; a
    # further choice 2 KiB and its output. A token with a log probability takes 28 more, and 13 for each likely token.
    max_mib: int = number(1024, 1, 1 << 24)
    # Memory for the timelines of ended choices (tetri-cli explain); 0: none is kept. Those of open choices take at most
    # as much again. Neither is part of max_mib.
    timelines_mib: int = number(64, 0, 1 << 20)
    text_mib: int = number(32, 1, 1 << 20)  # texts that wait to be tokenised; one client's fill at most half of it
    max_clients: int = number(1024, 1, 1 << 20)  # connections; further ones wait until others close
    # A request is cancelled when its client has been disconnected for so long.
    client_grace_s: float = number(5.0, 0, 3600)
    ready_s: float = number(30.0, 1, 86400)  # for so long a hand-over shows that its pair of instances carries KV
    # A request ends when so many workers were lost with it, the last one while it computed this request alone.
    max_deaths: int = number(3, 3, 1 << 20)
    # Serve /metrics at this port of 127.0.0.1 too, for deployments without a gateway; 0: nowhere.
    metrics_port: int = number(0, 0, 65535)
    cpus: str = _cpus()  # the CPUs that it runs on


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """The HTTP gateways: who may use them, and how long they wait for a client."""

    count: int = number(1, 0, 64)  # processes; each further one listens on the next port; 0: no HTTP
    host: str = text("127.0.0.1", r"[0-9a-fA-F.:]+", "an IP address")  # listens there; "0.0.0.0": at all addresses
    port: int = number(8000, 0, 65535)  # 0: any free one, which tetri-cli status shows
    # Names by which clients may call it besides its address and localhost, such as "llm.example.com, *.internal"; "*":
    # any. Without this check, any web page could use a gateway on its reader's machine.
    names: str = ""
    # SHA-256 of every allowed API key in hexadecimal, one a line (docs/operations.md); "": $TETRI_API_KEY if it is set,
    # else everybody who can connect may ask.
    key_file: str = path("", "a file")
    models: str = ""  # further names of the model, for clients that cannot be given its own, such as "gpt-4o"
    origins: str = ""  # web pages of these origins may ask, such as "https://chat.example.com"; "*": all (CORS)
    body_kib: int = number(4096, 1, 65536)  # of one request
    request_s: float = number(30.0, 0.1, 3600)  # a whole request must arrive within this
    idle_s: int = number(75, 1, 86400)  # a connection without a request is closed after this
    stall_s: float = number(60.0, 0.1, 86400)  # a client that reads nothing of its answer for so long is cut off
    max_connections: int = number(4000, 1, 1 << 20)  # further ones get an error
    cpus: str = _cpus()  # the CPUs that it runs on


@dataclass(frozen=True, slots=True)
class SloConfig:
    """The limits of latency of requests that name none. They are goals: the choice of a prefill instance, chunk size
    and admission work towards them, prefill order too if it is `deadline`, and `status` shows how many requests keep
    them. No request ends because of them."""

    ttft_s: float = number(0.0, 0, 86400)  # to the first token; 0: 6 times the prefill alone of the p90 prompt
    tpot_s: float = number(0.0, 0, 86400)  # between two tokens, on average; 0: 3 times a decode step alone


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The model that every worker serves."""

    name: str = text("smollm2-135m", r"[^\0]+", "a known model's name or a folder")  # in it a Hugging Face checkpoint
    dtype: str = choice("bfloat16", "bfloat16", "float32")  # of weights and KV
    context: int = number(0, 0, 1 << 24)  # tokens; 0: the model's maximum
    # Whether special tokens in a prompt's text count, for clients that render templates themselves. If not, they are
    # ordinary text there, as they always are in the messages of a conversation.
    special_tokens_in_prompt: bool = True


AUTO = "auto"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine of every worker and its limits."""

    kind: str = choice("vllm", "vllm", "emulated")  # emulated: no model, see [emulated]
    chunk_tokens: int = number(512, 1, 1 << 20)  # most tokens of one step: one for each decode, the rest prefill
    max_batch: int = number(32, 1, 1 << 14)  # requests that decode together; must be below chunk_tokens
    block_tokens: int = number(128, 1, 1 << 14)  # tokens of one KV block
    kv_mib: int = number(1024, 1, 1 << 24)  # memory for the KV cache of one worker, with a model
    # The cost table: every prediction of time uses it, and an emulated engine takes its step times from it. auto: each
    # worker uses the one that was measured on this machine, and measures it at the first start, in less than 20 s. Else
    # a file in the folder `cost` beside the configuration, or an absolute path. "": none. An emulated engine has none
    # with auto either; its steps take no time then.
    cost: str = path(AUTO, "auto or a file")
    stream_interval: int = number(1, 1, 1 << 20)  # output tokens of a request that one message carries

    @property
    def table(self) -> str:
        """The file of the cost table; "" if none is named."""
        return "" if self.cost == AUTO else self.cost

    @property
    def measures(self) -> bool:
        """Whether workers measure the cost table."""
        return self.cost == AUTO and self.kind != "emulated"


@dataclass(frozen=True, slots=True)
class EmulatedConfig:
    """The engine without a model, of engine.kind = "emulated"."""

    blocks: int = number(4096, 1, 1 << 24)  # KV blocks of one worker
    token_bytes: int = number(64, 1, 1 << 20)  # bytes of KV per token
    vocabulary: int = number(32000, 257, 1 << 24)  # more than 256, since the ids below 256 stand for bytes
    context: int = number(8192, 2, 1 << 24)  # most tokens of a prompt and its output
    time_scale: float = number(1.0, 0, 1000)  # a step takes so many times what the cost table says
    nan_token: int = number(-1, -1, 1 << 24)  # a fault: a request with this id gets NaN logits; -1: none
    salt: bool = False  # tokens depend on the instance too, so that tests see which one wrote a token (design.md)
    deadly_token: int = number(-1, -1, 1 << 24)  # a fault: a worker that computes this id dies at once; -1: none


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """The KV transfer between workers."""

    transport: str = choice("auto", "auto", *TRANSPORTS)  # the path of all KV; auto: the best of each pair of workers
    address: str = ""  # serve KV to other hosts at tcp://ADDRESS:PORT (PORT may be *); "": to this host only
    announce: str = ""  # the address that other hosts connect to, if they reach this host under another one
    # Memory for KV that is in flight over `stream`; always large enough for two chunks of the usual size.
    buffer_mib: int = number(64, 8, 1 << 20, was="room_mib")
    slab_blocks: int = number(64, 1, 1 << 20)  # KV blocks on their way out of one worker, in shared memory
    reserve_share: float = number(0.5, 0.01, 1)  # share of a decode instance's KV blocks that may be reserved
    digest: bool = True  # compute a digest of every KV chunk; the receiver checks its own copy
    offer_s: float = number(1.0, 0.01, 60)  # an unanswered offer or KV chunk is sent again after this
    # Emulates a slower link (docs/transfer.md): each worker fetches KV as if over this link.
    emulate: str = choice("", "", *LINKS)
    emulate_gbs: float = number(0.0, 0, 1e6)  # its GB/s; 0: those of `emulate`, and if that is "" no limit
    emulate_latency_us: float = number(0.0, 0, 1e9)  # its latency for each chunk
    emulate_token_bytes: int = number(0, 0, 1 << 30)  # KV bytes per token of the emulated model; 0: from the cost table
    faults: str = ""  # faults to inject, for rehearsals, such as "drop=0.01,flip=0.01,seed=1"; "": none
    # Workers that cannot read KV, for rehearsals, such as "d1, p0>d0@5-20"; "": none (docs/transfer.md).
    cuts: str = ""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The fields of `Rules`, with the same names and defaults."""

    prefill_route: str = choice(_RULES.prefill_route, *TABLES["prefill_route"])  # which prefill instance
    decode_route: str = choice(_RULES.decode_route, *TABLES["decode_route"])  # which decode instance
    order: str = choice(_RULES.order, *TABLES["order"])  # in which order prompts are computed
    sched_batch: int = number(_RULES.sched_batch, 1, 1 << 20)  # prompts that are ordered together
    stretch: float = number(_RULES.stretch, 0, 1e6)  # of `ageing`: seconds of waiting that outweigh one second of work
    chunk: str = choice(_RULES.chunk, *TABLES["chunk"])  # how prompts are cut
    admit: str = choice(_RULES.admit, *TABLES["admit"])  # which requests enter the running batch
    length: str = choice(_RULES.length, *TABLES["length"])  # what is predicted of the output
    length_granularity: int = number(_RULES.length_granularity, 1, 1 << 20)  # tokens of one predicted range
    length_accuracy: float = number(_RULES.length_accuracy, 0, 1)  # of `noisy`: share of right ranges
    # Of `trained`: target share of requests that end below the high end of their range; 0: the range is the likeliest
    # one of length_granularity tokens, as in the paper.
    length_cover: float = number(_RULES.length_cover, 0, 0.999)
    # Longest wait of a started prompt for its predicted length, at most until its last chunk; then it is offered
    # without one.
    length_wait_s: float = number(_RULES.length_wait_s, 0, 3600)
    # Which running decodes go on at another instance: those of an instance that takes no decodes any more, or is short
    # of memory. auto: only at instances in the role auto; everywhere: at any that takes decodes.
    migrate: str = choice(_RULES.migrate, *TABLES["migrate"])
    heavy_tokens: int = number(_RULES.heavy_tokens, 1, 1 << 30)  # a decode whose range has a higher middle is heavy
    # The end of the length range that the dispatcher uses, so that its requests fit.
    dispatch_end: str = choice(_RULES.dispatch_end, *ENDS)
    # The end that admission uses; the paper: low. With `high`, `peak` preempts hardly any request, and reserve_dynamic
    # is no worse.
    admit_end: str = choice(_RULES.admit_end, *ENDS)


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """The length predictor of policy.length = "trained"."""

    # "auto": the predictors that exist for this model, or the prior if there is none (`status` shows why). A predictor
    # that is named here must exist.
    kind: str = choice("auto", "auto", "classifier", "hidden", "both", "prior")
    folder: str = path("", "a folder")  # made by tetri-cli predictor train; "": tetri's own for this model
    # When the classifier runs: parallel to the main model in its own thread, or before the prefill.
    mode: str = choice("parallel", "parallel", "sequential")


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """How often load reports and cluster views are published, and when instances change their role (the fields of
    `FlipSettings`)."""

    load_ms: int = number(100, 1, 1000)  # between two load reports of a worker, and between two views
    stale_s: float = number(1.0, 0.01, 3600)  # the transition watcher does not use an older load report
    gone_s: float = number(20.0, 0.01, 3600)  # an instance silent for so long leaves the view; longer than any step
    flip: str = choice("none", *TABLES["flip"])  # which instance changes its role, and when
    idle_s: float = number(_FLIP.idle_s, 0, 86400)  # of `idle`: seconds of idleness before a flip
    low_s: float = number(_FLIP.low_s, 0, 86400)  # of `below`: seconds of low load before a flip
    hold_s: float = number(_FLIP.hold_s, 0, 86400)  # least seconds between two flips
    floor: int = number(_FLIP.floor, 1, 1 << 20)  # instances that each role keeps; a mixed or auto one counts for both
    gain: float = number(_FLIP.gain, 1, 1e6)  # of `balance`: least ratio between the waits of the two pools
    cpus: str = _cpus()  # the CPUs that it runs on


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process: an instance."""

    # Its name.
    iid: str = text(REQUIRED, _IID, "1 to 16 of a-z and 0-9, not broker, monitor, gateway or supervisord")
    # The role in which it starts. mixed: it does both; auto: both, as far apart from others as the traffic asks.
    role: str = choice(REQUIRED, "prefill", "decode", "mixed", "auto")
    cpus: str = _cpus()  # the CPUs that it runs on
    gpu: int = number(-1, -1, 63)  # number of the GPU that runs its engine or holds its KV slab; -1: none


@dataclass(frozen=True, slots=True)
class Config:
    """One deployment. `workers` is the list of [[worker]] tables, in order."""

    cluster: ClusterConfig = ClusterConfig()
    broker: BrokerConfig = BrokerConfig()
    gateway: GatewayConfig = GatewayConfig()
    slo: SloConfig = SloConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    emulated: EmulatedConfig = EmulatedConfig()
    transfer: TransferConfig = TransferConfig()
    policy: PolicyConfig = PolicyConfig()
    predictor: PredictorConfig = PredictorConfig()
    monitor: MonitorConfig = MonitorConfig()
    workers: tuple[WorkerConfig, ...] = ()

    @property
    def run_dir(self) -> Path:
        """The absolute path of the folder for this deployment's sockets, logs and state."""
        return Path(self.cluster.run_dir).absolute() if self.cluster.run_dir else default_run_dir()

    @property
    def clients_address(self) -> str:
        """Where the broker accepts clients."""
        return self.broker.clients or f"ipc://{self.run_dir}/clients"

    @property
    def operators_address(self) -> str:
        """Where the broker accepts operators: always in the run directory, which only its user may enter."""
        return f"ipc://{self.run_dir}/operators"

    @property
    def events_address(self) -> str:
        """Where the broker receives the events of workers and monitor."""
        return f"ipc://{self.run_dir}/events"

    @property
    def loads_address(self) -> str:
        """Where the monitor receives the workers' load reports."""
        return f"ipc://{self.run_dir}/loads"

    @property
    def views_address(self) -> str:
        """Where the monitor publishes cluster views."""
        return f"ipc://{self.run_dir}/views"

    def inbox_address(self, iid: str) -> str:
        """Where worker `iid` receives messages."""
        return f"ipc://{self.run_dir}/inbox-{iid}"

    def worker(self, iid: str) -> WorkerConfig:
        """The [[worker]] table of `iid`. Raises ConfigError, which lists the known ids."""
        for worker in self.workers:
            if worker.iid == iid:
                return worker
        raise ConfigError(f"no worker {iid!r}; known: {', '.join(w.iid for w in self.workers)}")


def default_run_dir() -> Path:
    """The folder to use if cluster.run_dir is empty: $XDG_RUNTIME_DIR/tetri, or /tmp/tetri-<uid>. Raises
    ConfigError."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and not os.path.isabs(base):
        raise ConfigError(f"XDG_RUNTIME_DIR is {base!r}: set it to an absolute path, or set cluster.run_dir")
    return Path(base) / "tetri" if base else Path(f"/tmp/tetri-{os.getuid()}")


def cpu_numbers(text: str) -> frozenset[int]:
    """The numbers in a `cpus` value such as "0-1,4" or "+0-1"; empty for "". Raises ConfigError."""
    if not re.fullmatch(_CPUS, text):
        raise ConfigError(f"cpus = {text!r}: must be {_CPUS_ALLOWED}")
    found: set[int] = set()
    for part in filter(None, text.removeprefix("+").split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
