"""Headrace in Hugging Face's Trainer, and in loops on Accelerate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from protos.errors import ConfigError
from trainer_client.batches import Batch
from trainer_client.checkpoint import merge_states
from trainer_client.session import Session
from trainer_client.taken import num_micro_batches

_BATCH = "headrace"


class HeadraceTrainer(Trainer):
    """A Trainer whose training data, losses and reports are a session's; evaluation is its own."""

    def __init__(self, *args: Any, session: Session, **options: Any) -> None:
        self.session = session
        super().__init__(*args, **options)
        # The session's loss of a step's micro-batches adds up as it is.
        self.loss_is_scaled_for_ga = True
        # The session resumes by itself; to skip batches would lose them.
        self.args.ignore_data_skip = True
        self.add_callback(HeadraceCallback(session))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the session's micro-batches, which Accelerate must neither shard nor dispatch."""
        loader = self.session.loader(self.args.per_device_train_batch_size, self.args.device)
        loader.collate_fn = lambda batch: {"input_ids": batch.tokens, _BATCH: batch}
        return loader

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Return the session's loss of a training batch, the Trainer's of any other."""
        batch = inputs.get(_BATCH)
        if batch is None:
            return super().compute_loss(model, inputs, *args, **options)
        self.session.use(batch)
        outputs = model(input_ids=batch.tokens)
        loss = self.session.loss(outputs.logits, batch)
        return (loss, outputs) if options.get("return_outputs") else loss


class HeadraceCallback(TrainerCallback):
    """Watches the model, ends steps, and keeps the data's state in checkpoints."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Watch the model, which is wrapped by now.

        Raises:
            ConfigError: the Trainer's steps are not the run's.
        """
        needed = num_micro_batches(
            global_sequences=self._session.spec.global_sequences,
            world_size=self._session.world_size,
            micro_batch=args.per_device_train_batch_size,
        )
        if args.gradient_accumulation_steps != needed:
            raise ConfigError(
                f"a step of the run has {needed} micro-batches of "
                f"{args.per_device_train_batch_size} on each of {self._session.world_size} ranks: "
                f"set gradient_accumulation_steps={needed}, got {args.gradient_accumulation_steps}"
            )
        self._session.probe(options["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Send the step's report."""
        self._session.end_step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Write this rank's state beside the Trainer's."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        path = folder / f"headrace.rank{self._session.rank}.json"
        path.write_text(json.dumps(self._session.state_dict()))


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """Return what `connect(resume=...)` takes, from a checkpoint folder of the Trainer.

    Raises:
        ConfigError: it holds no state of the data.
    """
    paths = sorted(checkpoint.glob("headrace.rank*.json"))
    return merge_states([json.loads(path.read_text()) for path in paths])


def accelerated_batches(session: Session, accelerator: Any, micro_batch: int) -> Iterator[Batch]:
    """Yield batches for a loop on Accelerate, whose optimizer then steps at a step's end only.

    Do not pass them to `accelerator.prepare`, which would split them among ranks once more, and
    leave `gradient_accumulation_steps` at 1: the session's loss adds up as it is.
    """
    for batch in session.batches(micro_batch, accelerator.device):
        accelerator.sync_gradients = batch.last_of_step
        yield batch
