"""What a deployment is: frozen dataclasses (tables), one strict TOML loader (reading), what they must not say
together (checks)."""

from tetri.config.reading import default_path, dump, load
from tetri.config.tables import (
    CLUSTER_NAME,
    Cluster,
    Config,
    Model,
    Monitor,
    Policy,
    Predictor,
    Worker,
    cpu_numbers,
    default_run_dir,
)
from tetri.strict import ConfigError

__all__ = [
    "CLUSTER_NAME",
    "Cluster",
    "Config",
    "ConfigError",
    "Model",
    "Monitor",
    "Policy",
    "Predictor",
    "Worker",
    "cpu_numbers",
    "default_path",
    "default_run_dir",
    "dump",
    "load",
]
