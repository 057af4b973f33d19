"""A trial: exact after an interruption, fair between arms, and with the run's own lag and order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from controller.prepare import prepare
from deploy.compare.compose import MEAN_FILE, POLICY_FILE, run_config, stand_in_policy
from deploy.compare.data import PreparedData, open_data, prepare_data, tokenize_all
from deploy.compare.learner import held_out_loss
from deploy.compare.record import RECORD_FILE, TrialRecord, read_record, trial_folder
from deploy.compare.spec import CompareSpec, keep_spec
from deploy.compare.trial import Trial
from deploy.dataset import read_index
from deploy.progress import Progress
from loader_workers.reference import Reference
from loader_workers.tokenize import make_tokenize
from protos.apportion import apportion, no_carry
from protos.errors import ConfigError
from protos.slots import deal
from protos.types import Lane, Mixture, Step
from tests.fakes_compare import SMALL_ACODM, small_spec
from tests.harness_runs import write_corpus

POINTS = [
    {"step": 0, "mixture": "uniform"},
    {"step": 3, "mixture": {"code": 0.62, "mail": 0.05, "prose": 0.33}},
    {"step": 8, "mixture": {"mail": 0.5, "prose": 0.5}},
]

ARMS: dict[str, Any] = {
    "natural": {"name": "natural"},
    "uniform": {"name": "uniform"},
    "acodm": SMALL_ACODM,
    "replay": {"name": "replay_mean", "from": {"mean_file_of": "acodm"}},
    "held": {"name": "static", "mixture": {"mean_of": "acodm"}},
    "schedule": {"name": "schedule", "points": POINTS},
    "skillit": {"name": "skillit", "update_steps": 3, "graph_steps": 1},
    "pike": {"name": "pike", "update_steps": 3},
    "doremi": {"name": "doremi"},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A corpus and prepared data that all tests here share."""
    folder = tmp_path_factory.mktemp("compare")
    source = write_corpus(folder / "corpus")
    spec = spec_of((source, folder / "data"))
    data = prepare_data(spec, folder / "out", Progress(Console(quiet=True)))
    config = run_config(spec, data, folder, arm="uniform", seed=0, policy=ARMS["uniform"])
    tokenize_all(data, prepare(config).spec)
    return source, folder / "data"


def spec_of(made: tuple[Path, Path], **changes: Any) -> CompareSpec:
    spec = small_spec(made[0], ARMS, **changes)
    data = spec.data.model_copy(update={"prepared": made[1]})
    return spec.model_copy(update={"data": data})


class _Interrupted(Exception):
    pass


class _BreaksOff(Trial):
    """Is interrupted before a step."""

    break_at = 0

    def _step(self, step: Step, *rest: Any) -> None:
        if step == self.break_at:
            raise _Interrupted
        super()._step(step, *rest)


def run(spec: CompareSpec, out: Path, arm: str, seed: int = 0, **options: Any) -> TrialRecord:
    keep_spec(spec, out)
    Trial(spec, out, arm, seed, **options).run()
    return read_record(trial_folder(out, arm, seed) / RECORD_FILE)


def timeless(record: TrialRecord) -> TrialRecord:
    """Return what must not depend on the machine, nor on interruptions."""
    evaluations = [dataclasses.replace(each, wall_s=0.0, cpu_s=0.0) for each in record.evaluations]
    return dataclasses.replace(
        record, evaluations=evaluations, decide_ms={}, probe_share=0.0, resumed_at=[]
    )


@pytest.mark.parametrize(("arm", "break_at"), [("uniform", 3), ("acodm", 4), ("acodm", 10)])
def test_an_interrupted_trial_leaves_the_same_record(
    made: tuple[Path, Path], tmp_path: Path, arm: str, break_at: int
) -> None:
    spec = spec_of(made)
    whole = run(spec, tmp_path / "whole", arm)
    keep_spec(spec, tmp_path / "broken")
    broken = _BreaksOff(spec, tmp_path / "broken", arm, 0)
    broken.break_at = break_at
    with pytest.raises(_Interrupted):
        broken.run()
    resumed = run(spec, tmp_path / "broken", arm)
    # Checkpoints come with the evaluations, every 4 steps.
    assert resumed.resumed_at == ([break_at // 4 * 4] if break_at >= 4 else [])
    assert timeless(resumed) == timeless(whole)


def test_arms_of_a_seed_begin_alike_and_seeds_do_not(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = spec_of(made, seeds=[0, 1])
    first = {arm: run(spec, tmp_path, arm).evaluations[0] for arm in ("natural", "uniform")}
    assert first["natural"].test_loss == first["uniform"].test_loss
    other = run(spec, tmp_path, "uniform", seed=1).evaluations[0]
    assert other.test_loss != first["uniform"].test_loss


def test_replaying_the_mean_is_what_a_static_mixture_of_it_is(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = spec_of(made)
    acodm = run(spec, tmp_path, "acodm")
    replay, held = (run(spec, tmp_path, arm) for arm in ("replay", "held"))
    assert [each.test_loss for each in replay.evaluations] == [
        each.test_loss for each in held.evaluations
    ]
    folder = trial_folder(tmp_path, "acodm", 0)
    mean = json.loads((folder / MEAN_FILE).read_text())
    assert sum(mean.values()) == pytest.approx(1)
    assert replay.intervals[-1].planned == pytest.approx(list(mean.values()), abs=1e-4)
    assert (folder / POLICY_FILE).is_file()
    # AC-ODM is measured; what asks for no gradients is not.
    assert acodm.intervals[0].reward_spread is not None
    assert replay.intervals[0].reward_spread is None


def reference_digests(
    spec: CompareSpec, data: PreparedData, shares: list[tuple[int, list[float]]]
) -> list[dict[str, Any]]:
    """Return what a plain model of the order delivers under mixtures that hold from steps on."""
    config = run_config(spec, data, data.folder, arm="schedule", seed=0, policy=ARMS["schedule"])
    run_spec = prepare(config).spec
    reference = Reference(
        run_spec, read_index(data.index), make_tokenize(data.tokenizer.read_bytes())
    )

    def sequences(domain: str, lane: Lane) -> Any:
        epoch = 0
        while True:
            for window in range(reference.num_windows(domain, lane, epoch)):
                tokens, _ = reference.sequences(domain, lane, epoch, window)
                yield from tokens
            epoch += 1

    lanes = [
        [sequences(name, Lane(lane)) for name in run_spec.domains] for lane in range(run_spec.lanes)
    ]
    rows: list[dict[str, Any]] = []
    carry = no_carry(run_spec.num_domains)
    for step in range(spec.steps):
        held = next(mixture for first, mixture in reversed(shares) if first <= step)
        counts, carry = apportion(
            Mixture.from_shares(held), global_sequences=run_spec.global_sequences, carry=carry
        )
        labels = deal(counts, lanes=run_spec.lanes, seed=0, step=Step(step)).tolist()
        domains = [(lane, domain) for lane, row in enumerate(labels) for domain in row]
        for slot, (lane, domain) in enumerate(domains):
            digest = hashlib.sha256(next(lanes[lane][domain]).tobytes()).hexdigest()
            rows.append({"step": step, "slot": slot, "domain": domain, "sha256": digest})
    return rows


def test_a_trial_delivers_what_the_reference_of_the_order_says(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = spec_of(made, guard={"min_share": 0.0})
    record = run(spec, tmp_path, "schedule", delivery_log=tmp_path / "received")
    lines = (tmp_path / "received" / "received.rank0.jsonl").read_text().splitlines()
    received = [json.loads(line) for line in lines]
    shares = [
        (0, [1 / 3, 1 / 3, 1 / 3]),
        (3, [0.62, 0.05, 0.33]),
        (8, [0.0, 0.5, 0.5]),
    ]
    expected = reference_digests(spec, open_data(spec, tmp_path), shares)
    names = ("step", "slot", "domain", "sha256")
    assert [{name: row[name] for name in names} for row in received] == expected
    assert record.max_share_error_sequences < 2.1  # 1 + ln 3


def test_a_policy_that_asks_sees_the_policy_validation_split_and_it_is_counted(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = spec_of(made)
    seen: list[Any] = []

    class Watched(Trial):
        def _validated(self, report: Any) -> Any:
            found = super()._validated(report)
            model = self._learner.model
            validation = self._held_out.policy_validation
            expected = held_out_loss(model, validation, micro_batch=2)
            seen.append((found.step, found.validation_loss == pytest.approx(expected, rel=1e-5)))
            return found

    keep_spec(spec, tmp_path)
    trial = Watched(spec, tmp_path, "skillit", 0)
    trial.run()
    record = read_record(trial_folder(tmp_path, "skillit", 0) / RECORD_FILE)
    due = [step for step in range(spec.steps) if trial._run.validation_due(step)]
    assert due
    assert seen == [(step, True) for step in due]
    assert record.policy_validations == len(due)
    # Three domains, three sequences of 16 labels each.
    assert record.validation_tokens == len(due) * 3 * 3 * 16
    assert run(spec, tmp_path, "pike").validation_tokens == 0


def test_a_policy_that_needs_a_reference_model_is_refused(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="doremi needs a reference model"):
        Trial(spec_of(made), tmp_path, "doremi", 0)


def test_all_arms_have_the_same_run_but_for_policy_and_name(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    spec = spec_of(made)
    data = open_data(spec, tmp_path)
    configs = [
        run_config(
            spec,
            data,
            tmp_path,
            arm=arm,
            seed=5,
            policy=stand_in_policy(spec, arm, data.domains),
        ).model_dump(exclude={"run", "policy"})
        for arm in ARMS
    ]
    assert all(config == configs[0] for config in configs)
