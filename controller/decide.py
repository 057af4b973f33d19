"""From what the policy advises to the mixture of a step: who has the last word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controller.draft import Draft
from controller.guard import Guard
from controller.hands import Hands
from controller.history import LaneCursors, Steering
from controller.ledger_schema import Entry
from controller.policy_runner import Advice
from controller.state import RunState
from controller.step_row import StepRow
from protos.spec import RunSpec
from protos.types import Mixture, Step

AHEAD_S = 0.05
"""So far ahead of the trainers may be sealed where nothing remains to be learned."""

MOST_AHEAD = 512

_BEHIND = Advice(shares=None, fault="the policy is too many steps behind")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The mixture of a step, and how it came about."""

    mixture: Mixture
    reasons: tuple[str, ...] = ()
    held: bool = False
    """The policy gave nothing that could be used: the mixture in force goes on."""


def choose(
    advice: Advice,
    *,
    target: Step,
    in_force: Mixture,
    sealed_through: int,
    composed_through: int,
    steering: Steering,
    guard: Guard,
    delivered_epochs: Sequence[float] | None,
) -> Choice:
    """Decide the mixture of step `target`.

    First of all comes what has happened already: a step that is final, or that workers composed
    with the last plan because they heard nothing, keeps that plan. Then comes the operator, and
    only then the policy, within the guard's bounds.
    """
    if target <= sealed_through:
        return Choice(mixture=in_force, reasons=(f"hold: step {target} is final already",))
    if target <= composed_through:
        reason = f"hold: workers composed steps through {composed_through} without a seal"
        return Choice(mixture=in_force, reasons=(reason,))
    if steering.override is not None:
        return Choice(mixture=steering.override, reasons=("override: set by the operator",))
    if steering.frozen:
        return Choice(mixture=in_force, reasons=("hold: frozen by the operator",))
    if advice.shares is None:
        result = guard.hold(in_force, advice.fault)
    else:
        result = guard.apply(advice.shares, held=in_force, delivered_epochs=delivered_epochs)
    return Choice(mixture=result.mixture, reasons=result.reasons, held=result.held)


def steps_ahead(spec: RunSpec, guard: Guard, *, step_s: float, step: Step) -> int:
    """Return how many steps after `step` may be sealed once a policy that does not learn saw it.

    At least the lag. Where a step takes less than the way from a report to a batch, lag steps would
    not cover that way and training would wait: then it is `AHEAD_S` worth of steps, since nothing
    that ranks report can change what is planned for them. An operator waits no longer than that.
    """
    lag = spec.lag
    if step_s <= 0 or guard.counts_epochs:
        return lag
    ahead = min(round(AHEAD_S / step_s), MOST_AHEAD, spec.num_steps - 1 - step)
    return max(lag, ahead)


def delivered_epochs(cursors: LaneCursors, spec: RunSpec) -> tuple[float, ...] | None:
    """Return how often each domain has been read, by the lane that is furthest; None: not known."""
    if not cursors:
        return None
    return tuple(
        float(max(int(places[domain, 0]) for _, places in cursors.values()))
        for domain in range(spec.num_domains)
    )


async def ask(row: StepRow, target: Step, hands: Hands, note: Callable[[Entry], None]) -> None:
    """Have a policy that learns, and the shadows, observe a step and propose for `target`.

    What the shadows propose is noted once they have.
    """
    if hands.policy.learns:
        row.to_policy = not hands.policy.is_behind
        advice = await hands.policy.advise(row.observation, target) if row.to_policy else _BEHIND
        row.proposals = [(target, advice)]
    hands.shadows.observe(row.observation, target, note)


async def propose_ahead(rows: Sequence[StepRow], state: RunState, hands: Hands) -> None:
    """Have a policy that does not learn propose for all steps that may be sealed after `rows`."""
    heard = [row for row in rows if row.reports]
    if not heard:
        return
    ahead = steps_ahead(state.spec, hands.guard, step_s=hands.metrics.step_s, step=heard[-1].step)
    first, end = state.sealed_through + 1, heard[-1].step + ahead + 1
    steps = range(first, max(first, end))
    advices = await hands.policy.advise_ahead([row.observation for row in heard], steps)
    proposals = list(zip(map(Step, steps), advices, strict=True))
    for row in heard:
        row.to_policy = True
        # The later ones come with the rows whose steps are so much later.
        fitting = [each for each in proposals if each[0] <= row.step + ahead]
        row.proposals, proposals = fitting, proposals[len(fitting) :]


def _composed_through(draft: Draft, state: RunState, hands: Hands) -> int:
    """Return the last step that was composed, as workers say, or ranks where those are dead.

    What every rank has reported was composed, and what was before a step that a rank waits for.
    """
    workers, generation = hands.workers, state.generation
    needed = workers.needed_beyond(draft.sealed_through, generation)
    return max(
        workers.composed_through(generation),
        state.trained_by_all,
        -1 if needed is None else needed - 1,
    )


def choose_all(
    proposals: Sequence[tuple[Step, Advice]],
    draft: Draft,
    state: RunState,
    hands: Hands,
    steering: Steering,
) -> list[str]:
    """Decide on the steps of `proposals`, one after the other; return the reasons."""
    guard = hands.guard
    epochs = delivered_epochs(state.cursors, state.spec) if guard.counts_epochs else None
    composed_through = _composed_through(draft, state, hands)
    reasons: list[str] = []
    for target, advice in proposals:
        choice = choose(
            advice,
            target=target,
            in_force=draft.in_force,
            sealed_through=draft.sealed_through,
            composed_through=composed_through,
            steering=steering,
            guard=guard,
            delivered_epochs=epochs,
        )
        hands.metrics.totals.held_decisions += choice.held
        draft.seal(target, choice.mixture, choice.reasons)
        reasons += [reason for reason in choice.reasons if reason not in reasons]
    return reasons
