"""The files of AdapterHub's format, read without trusting them and written without harming what is there.

What lives here: JSON and tensors from a folder and into one. What may not: what they mean. How data passes through:

    folder -> a JSON object, named tensors          objects and tensors -> temporary files -> the folder

A torch pickle may run code when it is loaded, so it is read by `torch.load(weights_only=True)` alone, which refuses
everything but tensors in plain containers. What is written is safetensors and JSON.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..errors import AdapterError
from ..writing import replacing


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        AdapterError: there is no such file, or it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise AdapterError(f"{path} is missing. Name a folder that the `adapters` library wrote.") from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no JSON ({error}). Download or save the adapter again.") from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds a JSON {type(content).__name__}, not an object. Save the adapter again.")
    return content


def read_tensors(folder: Path, safe_name: str, pickle_name: str) -> dict[str, torch.Tensor]:
    """Returns the tensors in a folder, by name, on the CPU; the safetensors file is preferred.

    Args:
        folder: The folder.
        safe_name: What a safetensors file is called there.
        pickle_name: What a torch pickle is called there.

    Raises:
        AdapterError: there is neither file, or it is damaged, or it holds anything but tensors.
    """
    safe, pickled = folder / safe_name, folder / pickle_name
    if not safe.is_file() and not pickled.is_file():
        raise AdapterError(f"{folder} has neither {safe_name} nor {pickle_name}. Save or download the adapter again.")
    path = safe if safe.is_file() else pickled
    try:
        tensors = load_file(path) if path is safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's message goes on with ways to switch the protection off
        raise AdapterError(
            f"{path} is damaged, or holds more than tensors, which could run code: {_reason(error)} "
            f"Don't load it otherwise; get it again, as safetensors if you can."
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError) as error:
        raise AdapterError(f"{path} can't be read ({_reason(error)}) Download or save it again.") from None
    if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
        raise AdapterError(f"{path} is no mapping of names to tensors. Save the adapter again.")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise AdapterError(
                f"{path}: {name!r} is no plain tensor of floating-point numbers. Save the adapter again."
            )
    return tensors


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta


def write_files(folder: Path, files: Mapping[str, Mapping[str, Any]], remove: Collection[str] = ()) -> None:
    """Writes files into a folder, each to a temporary name first: a file is there whole, or as it was.

    Args:
        folder: The folder, made if need be.
        files: By name: tensors for a name that ends in ``.safetensors``, else a JSON object.
        remove: Files of the folder that these take the place of; removed at the end, where they are not among `files`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name.endswith(".safetensors"):
            data = save({key: tensor.detach().cpu().contiguous().clone() for key, tensor in content.items()})
        else:
            data = json.dumps(content, indent=2, sort_keys=True).encode()
        with replacing(folder / name) as temporary:
            temporary.write_bytes(data)
    for name in set(remove) - set(files):
        (folder / name).unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Returns the first sentence of an error that says what was wrong."""
    text = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    return text.splitlines()[0].strip()[:200].rstrip(".") + "."
