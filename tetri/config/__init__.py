"""The configuration of a deployment: its tables as frozen dataclasses (tables), the strict TOML loader (reading), and
checks across tables (checks)."""

from tetri.config.reading import default_path, dump, load
from tetri.config.tables import (
    CLUSTER_NAME,
    Config,
    GatewayConfig,
    ModelConfig,
    MonitorConfig,
    PolicyConfig,
    WorkerConfig,
    cpu_numbers,
    default_run_dir,
)
from tetri.strict import ConfigError

__all__ = [
    "CLUSTER_NAME",
    "Config",
    "ConfigError",
    "GatewayConfig",
    "ModelConfig",
    "MonitorConfig",
    "PolicyConfig",
    "WorkerConfig",
    "cpu_numbers",
    "default_path",
    "default_run_dir",
    "dump",
    "load",
]
