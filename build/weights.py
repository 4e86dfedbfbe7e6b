"""Weights of a pyramid: read from .npz, .pth or .safetensors, from torchvision, or the one in this package."""

import io
import pickle
import zipfile
import zlib
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from stpm.build.pyramid import Pyramid
from stpm.build.torchvision_cpu import models
from stpm.edge.errors import InputError
from stpm.edge.storage import write_file

BUILTIN_TEACHER = Path(__file__).with_name("builtin_teacher.npz")

State = dict[str, torch.Tensor]

# what the readers raise about a file that is cut short, or another one
DAMAGED = (
    ValueError,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
    RuntimeError,
    EOFError,
    AttributeError,
    TypeError,
    zlib.error,
)


def load_teacher(source: str, taps: tuple[str, ...], backbone: str = "resnet18") -> Pyramid:
    """`imagenet` (torchvision's download), `builtin`, or the path of a weights file; frozen and in eval mode."""
    teacher = Pyramid(taps, backbone)
    if source == "imagenet":
        state = _download_imagenet(backbone)
    else:
        path = BUILTIN_TEACHER if source == "builtin" else Path(source)
        state = read_weights(path)
    advice = f"give a {backbone} file with torchvision's names that has {', '.join(taps)}, or other --taps"
    load_into(teacher, state, source, advice)
    return teacher.eval().requires_grad_(False)


def load_into(
    network: nn.Module,
    state: State,
    source: str,
    advice: str = "give weights that were trained with the same --method and the same settings of it",
) -> None:
    """Copy the tensors of the network. Layers that it has not (layer4, fc) are left; a tensor too few or too many in
    one that it has is an InputError.
    """
    wanted = {name: value for name, value in network.state_dict().items() if "num_batches_tracked" not in name}
    parts = {name.split(".")[0] for name in wanted}
    more = [name for name in state if name.split(".")[0] in parts and name not in network.state_dict()]
    if more:
        raise InputError(f"wanted weights without a tensor {more[0]}, but {source} has one: {advice}")
    for name, value in wanted.items():
        found = state.get(name)
        if found is None or found.shape != value.shape:
            what = "it is missing" if found is None else f"found {tuple(found.shape)}"
            raise InputError(
                f"wanted weights with a tensor {name} of shape {tuple(value.shape)}, but {what} in {source}: {advice}"
            )
        if not torch.isfinite(found).all():
            raise InputError(f"the tensor {name} in {source} has values that are not finite: the file is damaged")
    network.load_state_dict({name: state[name].to(torch.float32) for name in wanted}, strict=False)


def read_weights(path: Path) -> State:
    """The tensors of a weights file by name. InputError when it is missing, damaged or of another kind."""
    if not path.is_file():
        raise InputError(f"wanted a weights file, found no file {path}: check the path, or use `builtin`")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix in (".pth", ".pt"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    except DAMAGED as error:
        raise InputError(f"cannot read the weights in {path}: {_reason(error)}; get the file again") from error
    raise InputError(f"wanted a .npz, .pth or .safetensors file of weights, found {path}: convert it first")


def write_weights(path: Path, state: State, dtype: type = np.float32) -> None:
    """The tensors as an .npz file, without the batch counters that only training needs; whole or not at all."""
    arrays: dict[str, Any] = {
        name: value.detach().numpy().astype(dtype)
        for name, value in state.items()
        if "num_batches_tracked" not in name
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_file(path, buffer.getvalue())


def _download_imagenet(backbone: str) -> State:
    otherwise = (
        "use `--teacher builtin`, which needs no network, or `--teacher PATH` with a .npz, .pth or .safetensors file "
        f"of {backbone}"
    )
    try:
        return models.get_model(backbone, weights="IMAGENET1K_V1").state_dict()
    except (OSError, HTTPException) as error:
        raise InputError(f"torchvision's ImageNet weights could not be downloaded ({error}): {otherwise}") from error
    except DAMAGED as error:
        url = PurePosixPath(models.get_model_weights(backbone).IMAGENET1K_V1.url)
        kept = Path(torch.hub.get_dir()) / "checkpoints" / url.name
        raise InputError(
            f"what was downloaded as torchvision's ImageNet weights is damaged ({_reason(error)}): delete {kept}, if "
            f"it is there, and try again, or {otherwise}"
        ) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
