"""The tables of a configuration file, as frozen dataclasses. Every default stands here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tetri.policy.length import ENDS
from tetri.policy.rules import TABLES, Rules
from tetri.policy.views import FlipSettings
from tetri.strict import REQUIRED, ConfigError, choice, number, text

_RULES = Rules()
_FLIP = FlipSettings()
CLUSTER_NAME = r"[a-z0-9-]{1,20}"
LINKS = ("roce-200g", "nvlink")
_CPUS = r"(\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*)?"


def _cpus() -> Any:
    return text("", _CPUS, 'CPU numbers such as "0", "0-1" or "0,2"; "" pins nothing')


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    name: str = text("tetri", CLUSTER_NAME, "1 to 20 of a-z, 0-9 and -")  # part of shared-memory names
    run_dir: str = text("", r"[^\0]*", "a folder")  # "": $XDG_RUNTIME_DIR/tetri, or /tmp/tetri-<uid>
    key: str = text("", r"[^\0]*", "a file made by tetri-cli keygen")  # the same on all hosts
    heartbeat_s: float = number(0.2, 0.01, 60, was="beat_s")
    dead_s: float = number(20.0, 0.1, 3600)  # silence that means dead; longer than the longest chunk
    patience_s: float = number(60.0, 0, 86400)  # how long a request may wait when no worker can take it
    record: bool = False  # write what every core heard and said to <run_dir>/record, for tetri-cli sim replay


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    clients: str = ""  # "": ipc://<run_dir>/clients; or tcp://127.0.0.1:PORT
    max_open: int = number(4096, 1, 1 << 20)
    client_grace_s: float = number(5.0, 0, 3600)
    cpus: str = _cpus()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    name: str = text("smollm2-135m", r"[^\0]+", "a known model's name or a folder")
    dtype: str = choice("bfloat16", "bfloat16", "float32")
    context: int = number(0, 0, 1 << 24)  # tokens; 0: the model's own


@dataclass(frozen=True, slots=True)
class EngineConfig:
    kind: str = choice("vllm", "vllm", "emulated")
    chunk_tokens: int = number(512, 1, 1 << 20)  # tokens of one step: one for each decode, the rest prefill
    max_batch: int = number(32, 1, 1 << 14)
    block_tokens: int = number(128, 1, 1 << 14)
    kv_mib: int = number(1024, 1, 1 << 24)
    # What this engine's steps cost: the timing of an emulated one, and what everybody predicts with. A file in the
    # folder `cost` beside the configuration, or a whole path; "": not measured (an emulated one takes no time).
    cost: str = ""
    stream_interval: int = number(1, 1, 1 << 20)  # output tokens of a request between two messages with some


@dataclass(frozen=True, slots=True)
class EmulatedConfig:
    blocks: int = number(4096, 1, 1 << 24)
    token_bytes: int = number(64, 1, 1 << 20)
    vocabulary: int = number(32000, 257, 1 << 24)  # more than 256: ids below that are bytes
    context: int = number(8192, 2, 1 << 24)
    time_scale: float = number(1.0, 0, 1000)


@dataclass(frozen=True, slots=True)
class TransferConfig:
    transport: str = choice("auto", "auto", "shm", "stream", "nixl", "cuda_ipc")
    address: str = ""  # where KV is served to other hosts, tcp://ADDRESS:PORT (PORT may be *); "": to this one alone
    announce: str = ""  # what other hosts connect to instead, where they see this one under another address
    buffer_mib: int = number(
        64, 8, 1 << 20, was="room_mib"
    )  # of memory for KV on its way over `stream`; two usual chunks always fit
    slab_blocks: int = number(64, 1, 1 << 20)
    reserve_share: float = number(0.5, 0.01, 1)
    digest: bool = True  # of every chunk, checked over the receiver's own copy
    offer_s: float = number(1.0, 0.01, 60)  # an unanswered offer or chunk is sent again after this
    # A slower link than there is (docs/transfer.md): each worker takes KV from others as if over this one.
    emulate: str = choice("", "", *LINKS)
    emulate_gbs: float = number(0.0, 0, 1e6)  # its GB/s; 0: those of `emulate`, and if that is "" no limit
    emulate_latency_us: float = number(0.0, 0, 1e9)
    emulate_token_bytes: int = number(0, 0, 1 << 30)  # KV of a token of the emulated model; 0: as the cost table says
    faults: str = ""  # for rehearsals: what goes wrong on purpose, such as "drop=0.01,flip=0.01,seed=1"; "": nothing


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The fields of `Rules`, under the same names and with the same defaults."""

    prefill_route: str = choice(_RULES.prefill_route, *TABLES["prefill_route"])
    decode_route: str = choice(_RULES.decode_route, *TABLES["decode_route"])
    order: str = choice(_RULES.order, *TABLES["order"])
    sched_batch: int = number(_RULES.sched_batch, 1, 1 << 20)  # prompts that are ordered together
    stretch: float = number(_RULES.stretch, 0, 1e6)  # `ageing`: waiting that outweighs one second of work
    chunk: str = choice(_RULES.chunk, *TABLES["chunk"])
    admit: str = choice(_RULES.admit, *TABLES["admit"])
    length: str = choice(_RULES.length, *TABLES["length"])
    length_granularity: int = number(_RULES.length_granularity, 1, 1 << 20)  # tokens of one range
    length_accuracy: float = number(_RULES.length_accuracy, 0, 1)  # of `noisy`
    length_cover: float = number(_RULES.length_cover, 0, 0.999)  # of `trained`: share inside; 0: the likeliest bucket
    length_wait_s: float = number(_RULES.length_wait_s, 0, 3600)  # for a prediction, once the prompt has started
    heavy_tokens: int = number(_RULES.heavy_tokens, 1, 1 << 30)  # a decode of more output tokens is heavy
    dispatch_end: str = choice(_RULES.dispatch_end, *ENDS)  # the end of the predicted range that is used
    admit_end: str = choice(_RULES.admit_end, *ENDS)


@dataclass(frozen=True, slots=True)
class PredictorConfig:
    """Of output lengths, while policy.length is "trained"."""

    # "auto": what there is for this model, or else the prior, and `status` says why; any other one must be there.
    kind: str = choice("auto", "auto", "classifier", "hidden", "both", "prior")
    folder: str = text("", r"[^\0]*", "a folder")  # of tetri-cli predictor train; "": tetri's own for this model
    # Of the classifier: beside the main model in a thread of its own, or in front of it.
    mode: str = choice("parallel", "parallel", "sequential")


@dataclass(frozen=True, slots=True)
class MonitorConfig:
    """How often loads and views are published, and who takes which role (the fields of `FlipSettings`)."""

    load_ms: int = number(100, 1, 1000)
    stale_s: float = number(1.0, 0.01, 3600)  # a load that is older says less than nothing: the watcher waits
    gone_s: float = number(20.0, 0.01, 3600)  # silent for so long it leaves the view; as dead_s, longer than any step
    flip: str = choice("none", *TABLES["flip"])
    idle_s: float = number(_FLIP.idle_s, 0, 86400)
    low_s: float = number(_FLIP.low_s, 0, 86400)
    hold_s: float = number(_FLIP.hold_s, 0, 86400)
    floor: int = number(_FLIP.floor, 1, 1 << 20)
    gain: float = number(_FLIP.gain, 1, 1e6)
    cpus: str = _cpus()


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    iid: str = text(  # logs and programs bear its name beside those three
        REQUIRED,
        r"(?!(broker|monitor|supervisord)$)[a-z0-9]{1,16}",
        "1 to 16 of a-z and 0-9, not broker, monitor or supervisord",
    )
    role: str = choice(REQUIRED, "prefill", "decode", "mixed")
    cpus: str = _cpus()
    gpu: int = number(-1, -1, 63)  # the GPU that it computes on, or that holds its KV slab; -1: none


@dataclass(frozen=True, slots=True)
class Config:
    """One deployment. `workers` is the list of [[worker]] tables, in order."""

    cluster: ClusterConfig = ClusterConfig()
    broker: BrokerConfig = BrokerConfig()
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
        """The folder of this deployment's sockets, logs and state, absolute."""
        return Path(self.cluster.run_dir).absolute() if self.cluster.run_dir else default_run_dir()

    @property
    def clients_address(self) -> str:
        return self.broker.clients or f"ipc://{self.run_dir}/clients"

    @property
    def events_address(self) -> str:
        return f"ipc://{self.run_dir}/events"

    @property
    def loads_address(self) -> str:
        """Where the monitor hears the workers' loads."""
        return f"ipc://{self.run_dir}/loads"

    @property
    def views_address(self) -> str:
        """Where the monitor publishes the cluster's view."""
        return f"ipc://{self.run_dir}/views"

    def inbox_address(self, iid: str) -> str:
        return f"ipc://{self.run_dir}/inbox-{iid}"

    def worker(self, iid: str) -> WorkerConfig:
        """The [[worker]] table of `iid`; a ConfigError that lists the known ones otherwise."""
        for worker in self.workers:
            if worker.iid == iid:
                return worker
        raise ConfigError(f"no worker {iid!r}; known: {', '.join(w.iid for w in self.workers)}")


def default_run_dir() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "tetri" if base else Path(f"/tmp/tetri-{os.getuid()}")


def cpu_numbers(text: str) -> frozenset[int]:
    """The CPUs that a `cpus` value such as "0-1,4" names; empty for ""."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
