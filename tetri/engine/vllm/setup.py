"""Starts vLLM in this process: builds its configuration, checks that it is supported, and computes the fingerprint."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetri import control_groups, models
from tetri.engine.base import EngineError, check_budget
from tetri.instance import Fingerprint
from tetri.kv.cuda.runtime import Device
from tetri.request import blocks_for

if TYPE_CHECKING:  # they need numpy, which a worker without vLLM does not
    from tetri.engine.vllm.gpu_memory import GpuMemory
    from tetri.engine.vllm.memory import HostMemory

DTYPES = ("bfloat16", "float32")
#: vLLM refuses to start unless this share of the GPU is free. Small, because the KV space is set in bytes.
GPU_SHARE = 0.01


def prepare_environment() -> int:
    """Set vLLM's environment variables. Call it before vLLM is imported. Returns the number of threads: one per core
    that this process may use, as far as its control groups allow. Raises ModelError for a user without a home."""
    threads = control_groups.threads()
    models.lend_home()
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine runs in this process
        VLLM_USE_V2_MODEL_RUNNER="0",  # V2 has another interface for logits processors and for preemption
        VLLM_CPU_ATTN_SPLIT_KV="0",  # splitting KV over threads changes bits with their number
        VLLM_CPU_OMP_THREADS_BIND="nobind",  # the parent process has pinned this process
        OMP_NUM_THREADS=str(threads),
        GLOO_SOCKET_IFNAME="lo",  # else gloo looks up the name of the host, which may be a number or unknown
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # vLLM's older setting for kv_cache_memory_bytes would override ours.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return threads


@dataclass(frozen=True)
class VllmSettings:
    """Settings of the vLLM engine. `dtype`: of weights and KV, one of DTYPES. `kv_bytes`: size of the KV space.
    `context`: most tokens of a request, prompt and output together; None: the model's own limit. `weights`: a hash of
    the checkpoint, for the fingerprint. `gpu`: run on GPU 0 of this process, else on the CPU."""

    model: Path
    dtype: str
    chunk_tokens: int
    max_batch: int
    kv_bytes: int
    context: int | None
    weights: str
    block_tokens: int = 128
    gpu: bool = False

    def check(self) -> None:
        """Raises EngineError for settings that are invalid regardless of the model."""
        if not (self.model / "config.json").is_file():
            raise EngineError(f"unknown model {str(self.model)!r}: not a folder with a config.json")
        if self.dtype not in DTYPES:
            raise EngineError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.block_tokens < 32 or self.block_tokens % 32:
            raise EngineError(f"block_tokens must be a multiple of 32, got {self.block_tokens}")
        if self.context is not None and self.context < 2:
            raise EngineError(f"context must be at least 2 tokens, got {self.context}")
        if self.max_batch < 1:
            raise EngineError(f"max_batch must be at least 1, got {self.max_batch}")
        check_budget(self.chunk_tokens, self.max_batch)

    @property
    def max_requests(self) -> int:
        """vLLM's max_num_seqs. vLLM gives no blocks to parked requests when this many run, so it is well above the
        core's batch; vLLM does not allow more than the token budget."""
        return min(2 * self.max_batch + 16, self.chunk_tokens)


def engine_config(settings: VllmSettings, *, serving: bool = True) -> Any:
    """vLLM's configuration. Without `serving`, vLLM's own scheduler writes whole texts. Raises EngineError when vLLM
    cannot run here, cannot serve the checkpoint, or the KV space is too small."""
    _check_loopback()
    from vllm.engine.arg_utils import EngineArgs

    _check_build(settings.gpu)
    arguments = EngineArgs(
        model=str(settings.model),
        skip_tokenizer_init=True,  # the broker does all text
        dtype=settings.dtype,
        max_model_len=settings.context,
        enforce_eager=True,
        distributed_executor_backend="uni",
        enable_prefix_caching=False,  # else the cached part of a prompt would be missing from exported blocks
        enable_chunked_prefill=True,
        async_scheduling=False,
        disable_hybrid_kv_cache_manager=True,
        max_num_batched_tokens=settings.chunk_tokens,
        max_num_seqs=settings.max_requests,
        block_size=settings.block_tokens,
        kv_cache_memory_bytes=settings.kv_bytes,
        **({"gpu_memory_utilization": GPU_SHARE} if settings.gpu else {}),
        generation_config="vllm",  # no sampling defaults from the checkpoint
        disable_log_stats=True,
        logits_processors=["tetri.engine.vllm.connector:SamplerPlugin"],
        **(_requests() if serving else {}),
    )
    try:
        config = arguments.create_engine_config()
    except ValueError as error:  # pydantic's ValidationError is one
        raise EngineError(f"vLLM cannot serve {settings.model}: {_gist(error)}") from error
    _check_space(settings, config)
    return config


def _requests() -> dict[str, Any]:
    """The settings for serving a request as two engine requests: our scheduler and our KV connector."""
    from vllm.config import KVTransferConfig

    return {
        "scheduler_cls": "tetri.engine.vllm.scheduler.PlanScheduler",
        "kv_transfer_config": KVTransferConfig(
            kv_connector="BlockConnector", kv_connector_module_path="tetri.engine.vllm.connector", kv_role="kv_both"
        ),
    }


def _check_loopback() -> None:
    """Raises EngineError without a loopback interface: even for one process, gloo binds a socket to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("127.0.0.1", 9))  # sends nothing
        except OSError as error:
            why = f"127.0.0.1 cannot be reached ({error.strerror})"
            raise EngineError(f"vLLM needs the loopback interface, and {why}: run ip link set lo up") from None


def _check_build(gpu: bool) -> None:
    """Raises EngineError when this build of vLLM is for the other kind of device."""
    from vllm.platforms import current_platform

    if gpu and not current_platform.is_cuda():
        raise EngineError(f"gpu is set, but this vLLM is built for {current_platform.device_type}: install tetri[vllm]")
    if not gpu and not current_platform.is_cpu():
        raise EngineError(f"this vLLM is built for {current_platform.device_type}: set gpu in each [[worker]]")


def start_core(settings: VllmSettings, config: Any) -> Any:
    """Create vLLM's EngineCore, which loads the weights and allocates the KV space; on the CPU with quicker layers.
    Raises EngineError when that fails."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor import Executor

    try:
        core = EngineCore(config, Executor.get_class(config), log_stats=False)
    except (ValueError, RuntimeError) as error:  # no weights, not enough memory
        raise EngineError(f"vLLM cannot start on {settings.model}: {_gist(error)}") from error
    if not settings.gpu:
        from tetri.engine.vllm.quick_layers import quicken

        quicken(core.model_executor.driver_worker.worker.model_runner.get_model(), config.model_config.dtype)
    return core


def _gist(error: Exception) -> str:
    """The first sentence of vLLM's error, without the lines that pydantic adds."""
    lines = [line.strip() for line in str(error).splitlines()]
    details = [line for line in lines if line and not line.startswith("For further information")]
    text = details[-1] if details else type(error).__name__
    return text.removeprefix("Value error, ").partition(" [type=")[0].partition(". ")[0]


def block_bytes_of(settings: VllmSettings, config: Any) -> int:
    """Bytes of one KV block over all layers, from the configuration alone."""
    model, parallel = config.model_config, config.parallel_config
    item = {"bfloat16": 2, "float32": 4}[settings.dtype]
    token_bytes = model.get_num_layers(parallel) * model.get_num_kv_heads(parallel) * 2 * model.get_head_size() * item
    return int(token_bytes * settings.block_tokens)


def _check_space(settings: VllmSettings, config: Any) -> None:
    """Raises EngineError when the KV space is too small for one context. vLLM would check only after loading."""
    context, block_bytes = config.model_config.max_model_len, block_bytes_of(settings, config)
    wanted = blocks_for(context, settings.block_tokens) + 1  # vLLM keeps one block, the null block
    if settings.kv_bytes // block_bytes < wanted:
        raise EngineError(
            f"kv_bytes ({settings.kv_bytes}) is too small for one context of {context} tokens: "
            f"it must be at least {wanted * block_bytes}"
        )


def check_layout(kv_cache_config: Any) -> Any:
    """The KV cache spec of a supported model. Raises EngineError that names what is unsupported."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
        raise EngineError(f"unsupported KV layout: {len(groups)} KV cache groups ({kinds}); only one can be moved")
    spec = groups[0].kv_cache_spec
    if type(spec) is not FullAttentionSpec:
        raise EngineError(f"unsupported KV layout: {type(spec).__name__}; only full attention can be moved")
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise EngineError("unsupported KV layout: a sliding window or chunks; only full attention can be moved")
    if spec.head_size != spec.head_size_v or spec.kv_quant_mode.name != "NONE":
        raise EngineError("unsupported KV layout: quantised KV or different head sizes of K and V")
    return spec


def memory_of(gpu: Device | None, kv_cache_config: Any, block_bytes: int) -> HostMemory | GpuMemory:
    """Access to the KV tensors of the engine in this process. Raises EngineError for an unsupported layout."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from tetri.engine.vllm.memory import HostMemory

    caches = list(get_kv_transfer_group().kv_caches.values())
    memory = HostMemory(caches) if gpu is None else _on_gpu(gpu, caches, kv_cache_config.num_blocks)
    if memory.block_bytes != block_bytes:
        raise EngineError(f"unsupported KV layout: blocks of {memory.block_bytes} bytes, {block_bytes} were expected")
    return memory


def _on_gpu(gpu: Device, caches: Sequence[Any], blocks: int) -> GpuMemory:
    from vllm.utils.torch_utils import current_stream  # the first call creates the stream that vLLM keeps using

    from tetri.engine.vllm.gpu_memory import GpuMemory

    return GpuMemory(caches, blocks, gpu, lambda: int(current_stream().cuda_stream))


def make_fingerprint(settings: VllmSettings, config: Any, spec: Any, layers: int, block_bytes: int) -> Fingerprint:
    """The fingerprint of this engine: all that must be equal for KV blocks to be exchanged."""
    from vllm.version import __version__

    return Fingerprint(
        engine="vllm",
        version=__version__,
        isa=_gpu_attention(config) if settings.gpu else _instruction_set(config),
        model=config.model_config.architecture,  # not the folder's name, which may differ between hosts
        weights=settings.weights,
        dtype=settings.dtype,
        kv_dtype=str(spec.dtype).removeprefix("torch."),
        block_tokens=spec.block_size,
        block_bytes=block_bytes,
        layers=layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_size,
    )


def _instruction_set(config: Any) -> str:
    """The instruction set of the CPU attention backend, which determines the layout of K and V inside a block."""
    import torch

    isa = _same_for_all(config, "isa", "instruction sets")
    return f"{isa}/{torch.backends.cpu.get_cpu_capability()}"


def _gpu_attention(config: Any) -> str:
    """The attention backend, which determines the KV layout, and the GPU's compute capability."""
    import torch

    backend = _same_for_all(config, "attn_backend", "backends")
    major, minor = torch.cuda.get_device_capability()
    return f"{backend}/sm{major}{minor}"


def _same_for_all(config: Any, attribute: str, what: str) -> str:
    """This attribute of the attention layers. Raises EngineError unless all have the same."""
    layers = config.compilation_config.static_forward_context.values()
    found = [getattr(layer, attribute) for layer in layers if hasattr(layer, attribute)]
    chosen = {each.get_name() if hasattr(each, "get_name") else each for each in found}
    if len(chosen) != 1:
        raise EngineError(f"unsupported KV layout: attention layers with {what} {sorted(chosen)}")
    return chosen.pop()


def stop_ids(config: Any) -> tuple[int, ...]:
    """The ids that end a text, ascending: those of generation_config.json and of config.json."""
    model = config.model_config
    ids: set[int] = set()
    for source in (model.try_get_generation_config(), model.hf_config.to_dict()):
        found = source.get("eos_token_id")
        ids.update([found] if isinstance(found, int) else found or [])
    return tuple(sorted(ids))
