"""What the harness tells its trainer; kept in the run's folder, so that a resume repeats it."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from controller.config import RunConfig
from deploy.examples.models import SHAPES
from deploy.local_ray import python_path
from deploy.runfile import DEFAULT_MODEL, RunOptions
from deploy.whole_file import write_whole
from protos.errors import ConfigError

TRAINING = "training.json"
CHECKPOINTS = "checkpoints"
TRAINER_SAYS = "train.py: "
"""How the line begins in which a rank of the example trainer says what it ended of."""

RECEIVED = "received"
"""Folder of the delivery logs."""

_TINY_LR = 3e-3
"""A tiny model learns little in a few hundred steps at a rate that suits larger ones."""

_LR = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a run's trainer does all along, from the first start to the last resume."""

    model: str
    lr: float


def choose_training(options: RunOptions) -> Training:
    """Return the model and so on: those of the run if it is resumed, else those asked for.

    Raises:
        ConfigError: there is no such model, or the run began with another.
    """
    model = options.model or DEFAULT_MODEL
    if model not in SHAPES:
        raise ConfigError(f"there is no model {model!r}: choose one of {', '.join(SHAPES)}")
    asked = Training(model=model, lr=options.lr or (_TINY_LR if model == "tiny" else _LR))
    path = options.out / TRAINING
    if not options.resume or not path.is_file():
        return asked
    began = _read(path)
    for name in ("model", "lr"):
        given, held = getattr(options, name), getattr(began, name)
        if given is not None and given != held:
            raise ConfigError(
                f"the run in {options.out} began with --{name} {held}, got {given}; leave it out"
            )
    return began


def _read(path: Path) -> Training:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Training(model=str(values["model"]), lr=float(values["lr"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); it holds the run's model") from error


def keep_training(training: Training, out: Path) -> None:
    """Write it into the run's folder."""
    write_whole(out / TRAINING, json.dumps(asdict(training)) + "\n")


def trainer_command(
    options: RunOptions, training: Training, config: RunConfig, address: str
) -> list[str]:
    """Return the command line of the training script under torchrun."""
    out = options.out.resolve()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={options.ranks}", "-m", "deploy.examples.train"]
    command += ["--controller", address, "--model", training.model, "--lr", str(training.lr)]
    command += ["--seed", str(config.seed)]
    command += ["--checkpoint-dir", str(out / CHECKPOINTS)]
    command += ["--checkpoint-every", str(options.checkpoint_every)]
    command += ["--delivery-log", str(out / RECEIVED)]
    if options.until is not None:
        command += ["--until", str(options.until)]
    if options.resume:
        command.append("--resume")
    return command


def trainer_environment(config: RunConfig) -> dict[str, str]:
    """Return the environment of the training script."""
    security = replace(config.wire_security, admin_token_file=None)
    ours = {
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
        # Ranks share this machine's cores.
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    return {**os.environ, **ours, **security.to_environment()}
