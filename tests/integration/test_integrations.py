"""Tiny jobs of the real frameworks on a real controller and a real worker process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

import trainer_client
from deploy.history import Delivery
from protos.errors import ConfigError
from tests.fakes_consumer import ConsumedRun, consumed_run, write_corpus, write_run
from tests.harness_runs import wait_until
from trainer_client import Session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(200),
    # The frameworks' own.
    pytest.mark.filterwarnings("ignore"),
]

NUM_STEPS = 6
MICRO_BATCH = 5
MICRO_BATCHES = 4
"""20 sequences in a step."""

VOCABULARY = 4096


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsumedRun]:
    folder = tmp_path_factory.mktemp("run")
    run_file = write_run(
        folder / "out",
        write_corpus(folder / "data"),
        steps=NUM_STEPS,
        data={"vocab_size": VOCABULARY},
        policy={"name": "acodm"},
    )
    with consumed_run(run_file) as started:
        yield started


@pytest.fixture
def session(run: ConsumedRun) -> Iterator[Session]:
    with connect(run) as joined:
        yield joined


def connect(run: ConsumedRun, **options: Any) -> Session:
    return trainer_client.connect(
        run.address,
        rank=0,
        world_size=1,
        delivery_log=run.out / "received",
        timeout_s=60,
        **options,
    )


class Blocks(nn.Module):
    """A few linear layers in a list of blocks, with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        return self.head(hidden)  # type: ignore[no-any-return]


def received(run: ConsumedRun, session: Session) -> list[Delivery]:
    return [one for one in run.deliveries() if one.generation == session.generation]


def check_steps(run: ConsumedRun, session: Session, steps: range) -> None:
    """Every slot of the steps came once, and every step's report reached the controller."""
    assert session._reporter.flush(timeout_s=30)
    assert (session.reports_sent, session.reports_dropped) == (len(steps), 0)
    assert session.state_dict()["step"] == steps.stop
    slots = sorted((one.step, one.slot) for one in received(run, session))
    trained = [one for one in slots if one[0] < steps.stop]
    assert trained == [(step, slot) for step in steps for slot in range(20)]


def plain_losses(session: Session, model: nn.Module, optimizer: Any) -> list[float]:
    """Train in an ordinary loop; return each step's mean loss."""
    session.probe(model)
    losses, total = [], 0.0
    for batch in session.batches(MICRO_BATCH):
        loss = session.loss(model(batch.tokens), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        if batch.last_of_step:
            optimizer.step()
            optimizer.zero_grad()
            session.end_step()
            losses.append(total)
            total = 0.0
    return losses


def fresh_model() -> tuple[Blocks, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Blocks()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def expected(run: ConsumedRun) -> list[float]:
    """Return what a plain loop's losses are on the run's data, which is the same for all."""
    with connect(run) as session:
        losses = plain_losses(session, *fresh_model())
        check_steps(run, session, range(NUM_STEPS))
    return losses


def test_hugging_face_trainer_trains_saves_and_resumes(
    run: ConsumedRun, session: Session, expected: list[float], tmp_path: Path
) -> None:
    from transformers import TrainingArguments
    from transformers.modeling_outputs import CausalLMOutput

    from trainer_client.integrations.huggingface import HeadraceTrainer, saved_state

    class WithOutput(Blocks):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return CausalLMOutput(logits=super().forward(input_ids))

    def arguments(**changes: Any) -> TrainingArguments:
        return TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=MICRO_BATCH,
            max_steps=NUM_STEPS,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
            logging_steps=1,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            **{"gradient_accumulation_steps": MICRO_BATCHES, **changes},
        )

    def trainer(session: Session, **changes: Any) -> HeadraceTrainer:
        torch.manual_seed(0)
        return HeadraceTrainer(session=session, model=WithOutput(), args=arguments(**changes))

    with pytest.raises(ConfigError, match="set gradient_accumulation_steps=4, got 2"):
        trainer(session, gradient_accumulation_steps=2).train()
    whole = trainer(session)
    whole.train()
    check_steps(run, session, range(NUM_STEPS))
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    np.testing.assert_allclose(losses, expected, rtol=1e-3)
    checkpoint = tmp_path / "checkpoint-4"
    with connect(run, resume=saved_state(checkpoint)) as resumed:
        assert resumed.first_step == 4
        again = trainer(resumed)
        again.train(resume_from_checkpoint=str(checkpoint))
        check_steps(run, resumed, range(4, NUM_STEPS))
    late = [entry["loss"] for entry in again.state.log_history if "loss" in entry][-2:]
    np.testing.assert_allclose(late, expected[4:], rtol=1e-3)


def test_a_loop_on_accelerate_steps_where_the_steps_end(
    run: ConsumedRun, session: Session, expected: list[float]
) -> None:
    from accelerate import Accelerator

    from trainer_client.integrations.huggingface import accelerated_batches

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*fresh_model())
    session.probe(model)
    losses = [0.0] * NUM_STEPS
    for batch in accelerated_batches(session, accelerator, MICRO_BATCH):
        loss = session.loss(model(batch.tokens), batch)
        accelerator.backward(loss)
        losses[batch.step] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if batch.last_of_step:
            session.end_step()
    check_steps(run, session, range(NUM_STEPS))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_lightning_trains_saves_and_resumes(
    run: ConsumedRun, session: Session, expected: list[float], tmp_path: Path
) -> None:
    import lightning.pytorch as pl

    from trainer_client.integrations.lightning import HeadraceCallback, HeadraceData

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = Blocks()
            self.losses = [0.0] * NUM_STEPS

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.trainer.datamodule.loss(self.model(batch.tokens), batch)  # type: ignore[attr-defined]
            self.losses[batch.step] += loss.item() / MICRO_BATCHES
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(data: HeadraceData, max_steps: int) -> pl.Trainer:
        return pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=max_steps,
            accumulate_grad_batches=data.micro_batches,
            callbacks=[HeadraceCallback(data)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    data, module = HeadraceData(session, MICRO_BATCH), Module()
    first = trainer(data, 4)
    first.fit(module, datamodule=data)
    check_steps(run, session, range(4))
    first.save_checkpoint(tmp_path / "last.ckpt")
    with connect(run) as resumed:
        data = HeadraceData(resumed, MICRO_BATCH)
        trainer(data, NUM_STEPS).fit(module, datamodule=data, ckpt_path=tmp_path / "last.ckpt")
        check_steps(run, resumed, range(4, NUM_STEPS))
    np.testing.assert_allclose(module.losses, expected, rtol=1e-4)


def test_torchtitans_loader_follows_a_model_that_runs_behind(
    run: ConsumedRun, session: Session, expected: list[float]
) -> None:
    pytest.importorskip(
        "torchtitan",
        reason="NOT RUN: torchtitan is not installed; tests/integration/torchtitan.txt says how",
    )
    from trainer_client.integrations import torchtitan

    loader = torchtitan.HeadraceDataLoader(session, micro_batch=MICRO_BATCH)
    assert isinstance(loader, torchtitan.base_module().BaseDataLoader)
    model, optimizer = fresh_model()
    loader.attach(model)
    losses, batches = [], iter(loader)
    for _ in range(NUM_STEPS):
        # As torchtitan does: all micro-batches of a step, then their passes.
        step = [next(batches) for _ in range(MICRO_BATCHES)]
        total = 0.0
        for inputs, labels in step:
            loss = nn.functional.cross_entropy(
                model(inputs["input"]).flatten(0, 1), labels.flatten(), reduction="sum"
            )
            (loss / 320).backward()  # type: ignore[no-untyped-call]
            total += loss.item() / 320
        optimizer.step()
        optimizer.zero_grad()
        loader.end_step()
        losses.append(total)
    with pytest.raises(torchtitan.DataloaderExhaustedError, match="has 6 steps"):
        next(batches)
    check_steps(run, session, range(NUM_STEPS))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    state = loader.state_dict()
    assert list(state) == ["dp_rank_0"]
    with connect(run) as other:
        again = torchtitan.HeadraceDataLoader(other, micro_batch=MICRO_BATCH)
        again.load_state_dict({"dp_rank_7": {**state["dp_rank_0"], "step": 3, "cursors": {}}})
        assert other.first_step == 3


def test_a_megatron_style_loop_reads_an_external_iterator(
    run: ConsumedRun, session: Session, expected: list[float]
) -> None:
    from trainer_client.integrations.follower import Follower
    from trainer_client.integrations.megatron import external_iterator, losses_of_output

    class GptModel(Blocks):
        """Gives per-token losses for labels, as Megatron's does."""

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            logits = super().forward(tokens)
            return nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    torch.manual_seed(0)
    model = GptModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    follower = Follower(session, micro_batch=MICRO_BATCH, losses_of=losses_of_output)
    follower.attach(model)
    iterator = external_iterator(follower)
    losses = []
    for _ in range(NUM_STEPS):
        total = torch.zeros(())
        for _ in range(MICRO_BATCHES):
            data = next(iterator)
            assert data["position_ids"].tolist() == [list(range(16))] * MICRO_BATCH
            output = model(data["tokens"], data["labels"])
            loss = (output * data["loss_mask"]).sum() / 320
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        session.end_step()
        losses.append(total.item())
    check_steps(run, session, range(NUM_STEPS))
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def test_distributed_checkpoint_keeps_the_sessions_state(
    run: ConsumedRun, session: Session, tmp_path: Path
) -> None:
    batches = session.batches(20)
    for _ in range(3):
        batch = next(batches)
        session.record_losses(torch.rand(20, 16) * batch.loss_mask, batch)
        session.end_step()
    wait_until(lambda: "ledger_head" in session.state_dict(), timeout_s=30, what="its first answer")
    saved = session.state_dict()
    dcp: Any = torch.distributed.checkpoint
    dcp.save({"data": session}, checkpoint_id=tmp_path)
    with connect(run) as other:
        assert other.first_step == 0
        dcp.load({"data": other}, checkpoint_id=tmp_path)
        assert other.first_step == 3
        # A fresh session asks for no head of the ledger; the checkpoint holds it all the same.
        del saved["ledger_head"]
        assert {**other.state_dict(), "cursors": {}} == {**saved, "cursors": {}}
    metadata = dcp.FileSystemReader(tmp_path).read_metadata().state_dict_metadata
    assert "data.ledger_head" in metadata


def test_importing_the_client_imports_no_framework() -> None:
    code = (
        "import sys, trainer_client; names = {'transformers', 'accelerate', 'lightning', "
        "'torchtitan', 'torch.distributed.tensor'}; print(sorted(names & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(trainer_client.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "[]\n"
