"""Opening a checkpoint: a local folder or a hub id."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_export.checkpoint.config import ModelConfig
from qwen_export.checkpoint.hub import download_checkpoint, is_hub_id
from qwen_export.checkpoint.json_file import read_json_object
from qwen_export.checkpoint.quantized import (
    IntArray,
    QuantizedWeight,
    StoredTensors,
    resolve_tensors,
)
from qwen_export.checkpoint.safetensors_file import SafetensorsFile
from qwen_export.checkpoint.tensors import (
    EMBEDDING_NAME,
    LM_HEAD_NAME,
    TensorInfo,
    Tying,
    check_tensors,
    resolve_tying,
)
from qwen_export.checkpoint.tokenizer_files import TokenizerFiles, read_tokenizer_files
from qwen_export.errors import CheckpointError

if TYPE_CHECKING:
    # The package of the quantisers reads checkpoints.
    from qwen_export.quantization.tensor import QuantizedTensor

__all__ = ["Checkpoint", "open_checkpoint"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OTHER_WEIGHTS = re.compile(r".*\.(bin|pt|pth|gguf|h5|msgpack)")
_FINITE_CHUNK = 1 << 18  # values checked at a time, so that they stay in the processor's cache
# Exponent bits of 16-bit formats: all set means infinity or NaN.
_EXPONENT_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint whose tensors were checked against its config.

    Opening reads headers, and the zero points and group indices of quantised weights; weights are
    mapped when read.
    """

    path: Path
    """The folder."""
    revision: str | None
    """Commit of the hub that was opened; None for a local folder."""
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    """What the weights files hold, by the plain model's names."""
    harmless: tuple[str, ...]
    """Stored names that the model has no use for (rotary frequencies, scales of activations)."""
    generation_config: Mapping[str, Any]
    """generation_config.json as parsed; without one, the token ids of config.json."""
    files: Mapping[Path, SafetensorsFile] = field(repr=False)
    """The weights files, by the path that ``tensors`` names."""
    quantized: Mapping[str, QuantizedWeight] = field(default_factory=dict, repr=False)
    """The weights in ``tensors`` that are stored quantised, by the plain weight's name."""

    def exact_bits(self, *, read: bool = True) -> dict[str, int | None]:
        """How many bits symmetric codes need to hold each quantised weight exactly.

        Args:
            read: Whether to read the codes of 8 bits with zero points, which alone tell; without
                it they are taken to fit, as they nearly always do.

        Returns:
            4, 8, or None where no such codes hold it (FP8), by the plain weight's name.

        Raises:
            CheckpointError: If a part that is read is damaged.
        """
        return {name: weight.find_exact_bits(read=read) for name, weight in self.quantized.items()}

    def read(self, name: str) -> np.ndarray[Any, Any]:
        """Map a tensor without copying it, or dequantise it.

        Args:
            name: A name in ``tensors``.

        Returns:
            A read-only view of the file in the stored shape ([out, in] for linear layers) and
            type: float32, float16 or ml_dtypes.bfloat16. A quantised weight is a new float32
            array: stored integer or float, less its zero point, times its scale, all in float32.

        Raises:
            CheckpointError: If a scale of a quantised weight is not finite.
        """
        if name in self.quantized:
            return self.quantized[name].dequantize()
        return self.files[self.tensors[name].file].read(name)

    def read_rows(self, name: str, which: slice | IntArray) -> np.ndarray[Any, Any]:
        """Read some rows of a matrix, of a quantised one without unpacking the others.

        Args:
            name: A name in ``tensors``, of two axes.
            which: A slice of its rows, or their numbers, [n].

        Returns:
            What ``read`` gives for these rows, [n, in]; a view where a slice of a plain tensor is
            asked for.

        Raises:
            CheckpointError: If a scale of a quantised weight is not finite.
        """
        if name in self.quantized:
            return self.quantized[name].rows(which)
        rows: np.ndarray[Any, Any] = self.read(name)[which]
        return rows

    def read_quantized(self, name: str) -> QuantizedTensor | None:
        """Read a quantised weight as it is, without rounding anything.

        Args:
            name: A name in ``tensors``.

        Returns:
            Codes [in, out] and scales whose product is what ``read`` gives; its block is the
            format's group, all inputs where it has none. None for a tensor that is stored plain,
            or in numbers that no symmetric codes of 8 bits hold.

        Raises:
            CheckpointError: If a scale is not finite, or codes have more bits than configured.
        """
        weight = self.quantized.get(name)
        return None if weight is None else weight.quantized()

    def release(self, name: str) -> None:
        """Drop a tensor's pages from memory; views stay valid and read from the file again.

        Args:
            name: A name in ``tensors``.
        """
        if name in self.quantized:
            self.quantized[name].release()
        else:
            self.files[self.tensors[name].file].release(name)

    def check_finite(self, name: str, block: np.ndarray[Any, Any]) -> None:
        """Refuse NaN and infinity in a tensor or a block of its rows.

        Args:
            name: The tensor the block is from, for the message.
            block: Values in float32, float16 or bfloat16, any shape. Not modified.

        Raises:
            CheckpointError: If a value is not finite. It names the tensor and the file.
        """
        flat = block.reshape(-1)
        for start in range(0, flat.size, _FINITE_CHUNK):
            chunk = flat[start : start + _FINITE_CHUNK]
            if _all_finite(chunk):
                continue
            file = self.tensors[name].file
            raise CheckpointError(
                f"{name} in {file.name} must hold finite numbers, but one is "
                f"{_first_bad(chunk)}; the checkpoint is damaged",
                path=file,
            )

    def resolve_tying(self) -> Tying:
        """Decide whether embedding and output projection are one table; see ``resolve_tying``."""
        tables = {EMBEDDING_NAME, LM_HEAD_NAME}
        packed = [self.quantized[name] for name in tables if name in self.quantized]
        if packed and tables <= self.tensors.keys():
            # Compared as stored: large tables are not unpacked for it.
            same = len(packed) == 2 and packed[0].is_stored_like(packed[1])
            tied = same and self.config.tie_word_embeddings
            head = EMBEDDING_NAME if tied else LM_HEAD_NAME
            return Tying(tied=tied, embedding=EMBEDDING_NAME, lm_head=head)
        return resolve_tying(self.config, self.tensors, self.read, self.release)

    def tokenizer_files(self) -> TokenizerFiles | None:
        """Read the tokenizer, or give None for a checkpoint without one.

        Raises:
            CheckpointError: If its files are damaged or contradict each other.
            UnsupportedModelError: If it is of a kind that is not supported.
        """
        return read_tokenizer_files(self.path, self.config)


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, hollow: bool = False
) -> Checkpoint:
    """Open a checkpoint and check its tensors against its config.

    Args:
        model: A local folder, or a hub id ``owner/name`` given as a string. A folder of that name
            comes first.
        revision: A branch, tag or commit of a hub id; None is the main branch.
        hollow: Whether the weights files hold headers alone, and holes where their data would
            be. Zero points and group indices are then taken to be in order.

    Returns:
        The checkpoint. Its config may still ask for something that cannot be exported; see
        ``require_supported``.

    Raises:
        CheckpointError: If there is no such model, or a file of it is missing, damaged or
            contradicts another.
        UnsupportedModelError: If it is of a kind that is not supported.
    """
    folder, commit = _locate(model, revision)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder} is not a model folder: it has no config.json", path=config_path
        )
    config = ModelConfig.from_dict(read_json_object(config_path), config_path)
    files = _weights_files(folder)
    stored = StoredTensors({name: f for f in files.values() for name in f.tensors}, folder, hollow)
    resolved = resolve_tensors(config, stored)
    unused = check_tensors(config, resolved.tensors)
    return Checkpoint(
        path=folder,
        revision=commit,
        config=config,
        tensors=resolved.tensors,
        harmless=tuple(sorted((*unused, *resolved.harmless))),
        generation_config=_generation_config(folder, config),
        files=files,
        quantized=resolved.quantized,
    )


def _locate(model: str | Path, revision: str | None) -> tuple[Path, str | None]:
    """The folder of a checkpoint, and the commit it is of."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r} is for hub ids, but {path} is a local folder; leave it out",
                path=path,
            )
        return path, None
    if path.exists():
        raise CheckpointError(
            f"{path} is a file; give the folder that holds config.json", path=path
        )
    if isinstance(model, str) and is_hub_id(model):
        folder = download_checkpoint(model, revision=revision)
        return folder, folder.name
    raise CheckpointError(
        f"{model} does not exist, and is not a hub id of the form owner/name", path=path
    )


def _weights_files(folder: Path) -> dict[Path, SafetensorsFile]:
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return {single: SafetensorsFile(single)}
    if index.is_file():
        return _sharded_files(folder, index)
    others = sorted(p.name for p in folder.iterdir() if _OTHER_WEIGHTS.fullmatch(p.name))
    found = f"only {others[0]}" if others else "no weights"
    raise CheckpointError(
        f"{folder} holds {found}; a checkpoint must have {_SINGLE} or {_INDEX}", path=folder
    )


def _sharded_files(folder: Path, index: Path) -> dict[Path, SafetensorsFile]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must hold a weight_map from tensor to file", path=index)
    files: dict[Path, SafetensorsFile] = {}
    for name, shard in weight_map.items():
        # A name with a folder in it could point outside the checkpoint.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{index}: {name} must be mapped to a file of the same folder, got {shard!r}",
                path=index,
            )
        path = folder / shard
        if path not in files:
            if not path.is_file():
                raise CheckpointError(
                    f"{path} is missing; {_INDEX} names it for {name}: download it again",
                    path=path,
                )
            files[path] = SafetensorsFile(path)
        if name not in files[path].tensors:
            raise CheckpointError(
                f"{name} must be in {shard}, where {_INDEX} puts it, but is not; download both "
                "again",
                path=path,
            )
    for path, file in files.items():
        for name in file.tensors:
            if weight_map.get(name) != path.name:
                raise CheckpointError(
                    f"{name} is in {path.name}, but {_INDEX} does not put it there; download both "
                    "again",
                    path=path,
                )
    return files


def _generation_config(folder: Path, config: ModelConfig) -> Mapping[str, Any]:
    path = folder / "generation_config.json"
    if path.is_file():
        return read_json_object(path)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    # Lists, as the file would hold them, so that both sources are alike.
    return {k: list(v) if isinstance(v, tuple) else v for k, v in ids.items() if v is not None}


def _all_finite(values: np.ndarray[Any, Any]) -> bool:
    bits = _EXPONENT_BITS.get(values.dtype.name)
    if bits is None:
        return bool(np.isfinite(values).all())
    # Integer operations: NumPy asks 16-bit floats one at a time.
    exponents = values.view(np.uint16) & np.uint16(bits)
    return bool(exponents.max() < bits)


def _first_bad(values: np.ndarray[Any, Any]) -> str:
    wide = values.astype(np.float32)
    bad = wide[~np.isfinite(wide)][0]
    return "NaN" if np.isnan(bad) else "infinite"
