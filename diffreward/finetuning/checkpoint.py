"""Checkpoints: whole or not there, limited in number, and free of pickle.

A run's folder has

    checkpoints/checkpoint-N/model.safetensors, optimizer.safetensors, ..., state.json

where ``state.json`` lists the files beside whatever the run itself wants to know.
A checkpoint is written under a hidden name, brought to the disk, and then renamed; one that goes is
renamed first and then removed. So a folder named ``checkpoint-N`` is whole at any moment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffreward.finetuning.sharding import part
from diffreward.preferences import Preferences

STATE = "state.json"
UNFINISHED = ".unfinished-"  #: begins the name of what is being written or removed
REPLACED = ".replaced-"  #: begins the name of a checkpoint while its successor takes its place

MAY_DIFFER = (
    "training.iterations", "training.max_batch", "training.decode_batch",
    "training.activation_checkpointing", "training.compile", "training.shard",
    "training.checkpoint_every",
    "training.keep_checkpoints", "training.evaluate_every", "training.loggers", "training.guard",
)  # fmt: skip
"""Settings that a resumed run may change: what it does stays the same, but for rounding."""


def save_checkpoint(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint; then remove all but the newest ``keep``.

    Checkpoints of later steps, which a run leaves behind that was resumed from an earlier one, are
    renamed to ``abandoned-checkpoint-N``: they are neither found nor removed any more.

    Args:
        folder: of the run.
        step: N.
        tensors: name of a file, without its ending -> name -> tensor.
        state: anything JSON can hold; the keys of dicts must be strings.
        keep: at least 1.

    Returns:
        The checkpoint.

    Raises:
        ValueError: ``keep`` or ``step`` out of range.
        TypeError: ``state`` has something that JSON cannot hold.
        OSError: it cannot be written, on a full disk say; what was saved before is as it was.
    """
    if keep < 1 or step < 0:
        raise ValueError(f"keep must be at least 1 and step at least 0, but {keep}, {step} came")
    root = Path(folder) / "checkpoints"
    final = root / f"checkpoint-{step}"
    unfinished = root / f"{UNFINISHED}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean(root)
        unfinished.mkdir()
        _write(unfinished, tensors, state)
        _put(unfinished, final)
    except (OSError, SafetensorError) as err:
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = ", ".join(path.name for path in _checkpoints(root).values()) or "none"
        raise OSError(
            f"checkpoint {step} could not be written to {str(root)!r}: {err}. Checkpoints saved "
            f"before are as they were ({kept}). Make room, or have a look at the disk; then go on "
            "with --resume latest"
        ) from err
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for old in list(_checkpoints(root).values())[:-keep]:
        _remove(old)
    return final


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step in a run's folder, if there is one."""
    found = _checkpoints(Path(folder) / "checkpoints")
    return list(found.values())[-1] if found else None


def find_checkpoint(folder: str | Path, which: str | int | Path) -> Path:
    """The checkpoint that the user means.

    Args:
        folder: of the run.
        which: "latest", a step, or a checkpoint's path or name.

    Raises:
        FileNotFoundError: there is none such; those that there are are named.
    """
    found = _checkpoints(Path(folder) / "checkpoints")
    names = ", ".join(path.name for path in found.values())
    there = f"there are {names}" if found else "there is none yet, so start without --resume"
    if str(which) == "latest":
        if found:
            return list(found.values())[-1]
    elif re.fullmatch(r"\d+", str(which)):
        if int(which) in found:
            return found[int(which)]
    else:
        for path in (Path(which).expanduser(), Path(folder) / "checkpoints" / which):
            if (path / STATE).is_file():
                return path
    raise FileNotFoundError(f"no checkpoint {str(which)!r} in {str(folder)!r}: {there}")


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors, on the CPU, and the state, as they were given to `save_checkpoint`.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a file of it is missing or damaged.
    """
    path = Path(path)
    if not (path / STATE).is_file():
        raise FileNotFoundError(f"{str(path)!r} is no checkpoint: there is no {STATE} in it")
    file = path / STATE
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        tensors = {}
        for name in saved["files"]:
            file = path / name
            tensors[file.stem] = load_file(file)
        return tensors, saved["state"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as err:
        others = [p.name for p in _checkpoints(path.parent).values() if p.name != path.name]
        raise ValueError(
            f"the checkpoint's file {str(file)!r} is damaged ({err}). Copy it again if this is a "
            f"copy; or resume from another checkpoint: {', '.join(others) or 'there is none'}"
        ) from err


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The state of an optimiser (AdamW, say) as tensors.

    Its hyper-parameters are the configuration's; only the learning rates, which change, are here.

    Args:
        optimizer: its state must be tensors.
        names: of its parameters, in their order.

    Returns:
        ``<parameter>/<quantity>`` -> tensor, and the learning rates ``lr`` of the groups, float64.

    Raises:
        ValueError: not as many names as parameters, or a state that is no tensor.
    """
    flat = {}
    for name, p in zip(names, _parameters(optimizer, names), strict=True):
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} as {type(value).__name__}, but only "
                    "tensors can be saved; use AdamW"
                )
            flat[f"{name}/{key}"] = value.detach()
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return {**flat, "lr": torch.tensor(rates, dtype=torch.float64)}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Bring a new optimiser into the state of `optimizer_tensors`.

    Raises:
        ValueError: the tensors are of other parameters.
    """
    parameters = _parameters(optimizer, names)
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key == "lr":
            continue
        name, _, quantity = key.rpartition("/")
        shape = parameters[index[name]].shape if name in index else None
        if shape is None or value.shape not in (shape, torch.Size([])):
            here = "there is no such parameter" if shape is None else f"it is {tuple(shape)} here"
            raise ValueError(
                f"the optimiser's state is of another model: {key} is {tuple(value.shape)}, but "
                + here
            )
        # load_state_dict keeps tensors that need no conversion, and steps change them in place
        value = value.clone()
        if value.shape == shape:
            value = part(value, parameters[index[name]])
        state.setdefault(index[name], {})[quantity] = value
    groups = optimizer.state_dict()["param_groups"]
    rates = tensors["lr"].tolist() if "lr" in tensors else []
    if len(rates) != len(groups):
        raise ValueError(f"the optimiser had {len(rates)} groups of parameters, now {len(groups)}")
    groups = [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_same(
    state: Mapping[str, Any],
    expected: Mapping[str, Any],
    may_differ: Collection[str] = MAY_DIFFER,
) -> None:
    """Refuse to resume a run under other settings.

    Args:
        state: the settings in the checkpoint, nested.
        expected: those of the present run.
        may_differ: dotted names of settings, or of groups of them, that may.

    Raises:
        ValueError: others differ; they are named.
    """
    then, now = _dotted(state), _dotted(json.loads(json.dumps(expected)))
    differences = []
    for name in sorted(then.keys() | now.keys()):
        free = any(name == other or name.startswith(f"{other}.") for other in may_differ)
        if free or (name in then and name in now and then[name] == now[name]):
            continue
        there = repr(then[name]) if name in then else "not set"
        here = repr(now[name]) if name in now else "not set"
        differences.append(f"{name}: {there} in the checkpoint, {here} now")
    if differences:
        raise ValueError(
            "the checkpoint is of a run with other settings; go back to them, or start a new run "
            "without --resume:\n  " + "\n  ".join(differences)
        )


def _dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _dotted(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _parameters(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) != len(names):
        raise ValueError(f"{len(names)} names came for an optimiser of {len(parameters)} tensors")
    return parameters


def _checkpoints(root: Path) -> dict[int, Path]:
    """Step -> checkpoint, by step; one whose successor has not come yet still counts."""
    found: dict[int, Path] = {}
    for prefix in (REPLACED, ""):
        for path in root.glob(f"{prefix}checkpoint-*"):
            if match := re.fullmatch(r"checkpoint-(\d+)", path.name.removeprefix(prefix)):
                found[int(match[1])] = path
    return dict(sorted(found.items()))


def _write(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Any) -> None:
    files = []
    for name, group in tensors.items():
        file = folder / f"{name}.safetensors"
        save_file({k: t.detach().cpu().contiguous() for k, t in group.items()}, file)
        _sync(file)
        files.append(file.name)
    text = json.dumps({"files": files, "state": state}, indent=1)
    (folder / STATE).write_text(text, encoding="utf-8")
    _sync(folder / STATE)
    _sync(folder)


def _put(unfinished: Path, final: Path) -> None:
    """Give a finished checkpoint its name, in the place of what had it."""
    root, step = final.parent, int(final.name.rpartition("-")[2])
    for later in [path for n, path in _checkpoints(root).items() if n > step]:
        name = f"abandoned-{later.name.removeprefix(REPLACED)}"
        taken = len(list(root.glob(f"{name}*")))
        later.rename(root / (f"{name}-{taken + 1}" if taken else name))
    if final.exists():
        final.rename(root / f"{REPLACED}{final.name}")
    unfinished.rename(final)
    _sync(root)
    _clean(root)


def _clean(root: Path) -> None:
    """Remove what killed saves have left."""
    for path in root.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)
    for path in root.glob(f"{REPLACED}*"):
        if path not in _checkpoints(root).values():
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint, of which a kill leaves nothing that looks like one."""
    hidden = path.with_name(f"{UNFINISHED}{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(policy, reward, algorithm, training, prompts, eval_prompts) -> dict[str, Any]:
    """What a checkpoint must agree in with the run that goes on from it."""
    kernel = getattr(policy, "kernel", None)
    return {
        "policy": {
            "type": type(policy).__name__,
            "num_steps": policy.num_steps,
            "kernel": type(kernel).__name__,
            "guidance_scale": getattr(policy, "guidance_scale", None),
        },
        "reward_name": reward.info.name,
        "algorithm": {"name": type(algorithm).__name__, **asdict(algorithm)},
        "training": asdict(training),
        "prompts": digest(prompts),
        "eval_prompts": digest(eval_prompts),
    }


def digest(prompts: Sequence[str] | Preferences) -> str:
    """How many there are, and a hash of them."""
    if isinstance(prompts, Preferences):
        data = [v if isinstance(v, str) else v.hex() for v in prompts.data]
        prompts = [*prompts.prompts, *data, str(prompts.label.tolist())]
    return f"{len(prompts)}: {blake2b(chr(0).join(prompts).encode(), digest_size=8).hexdigest()}"
