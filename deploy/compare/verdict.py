"""What the figures allow one to say: claims need intervals that exclude 0, all else is a tie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

MIN_SEEDS = 3

_OWN_METRIC = {"uniform": "macro", "natural": "natural"}
"""What each static control is good at, and so what it is to be beaten in."""

_IN_WORDS = {
    "macro": "the mean over domains",
    "natural": "the naturally weighted mean",
}
_CONTROLS_OF_LEARNING = ("random_actor", "shuffled_reward", "align_eg", "replay_mean")
"""Arms that a learning policy must be ahead of, or its learning is worth nothing."""

_LEARNING = "acodm"
_TARGET_SHARE = 0.7
"""Of the control's steps: what AC-ODM should need at most."""


def verdict(results: Json) -> list[str]:
    """Return what can be said, in sentences; the first ones say how far to trust the others."""
    arms: Json = results["arms"]
    if not arms:
        return ["No trial is finished yet."]
    return [
        *_how_complete(results),
        *(
            sentence
            for control, metric in _OWN_METRIC.items()
            if control in arms
            for sentence in _against(results, control, metric)
        ),
        *_learning(results),
        *_speed(results),
        *_faults(arms),
    ]


def _how_complete(results: Json) -> Iterator[str]:
    arms, wanted = results["arms"], results["seeds_wanted"]
    if results["missing"]:
        yield f"Not finished for any seed: {', '.join(results['missing'])}."
    short = [
        f"{arm} ({len(values['seeds'])})"
        for arm, values in arms.items()
        if len(values["seeds"]) < len(wanted)
    ]
    if short:
        yield (
            f"Fewer seeds than the {len(wanted)} that are wanted: {', '.join(short)}. Arms' means "
            "over different seeds say nothing of one another; the paired differences do."
        )
    if any(len(values["seeds"]) < MIN_SEEDS for values in arms.values()):
        yield (
            f"Figures from fewer than {MIN_SEEDS} seeds are a first look; one seed has no interval "
            "at all and decides nothing."
        )
    confidence = results["settings"]["evaluation"]["confidence"]
    yield (
        f"Intervals are {confidence:.0%} t intervals of the differences between trials of the same "
        f"seed, each by itself: of twenty comparisons between equals one would exclude 0."
    )


def _against(results: Json, control: str, metric: str) -> Iterator[str]:
    """Sort the arms into better, worse and not told apart from a control."""
    better, worse, tied, undecided = [], [], [], []
    for arm in results["arms"]:
        found = None if arm == control else results["paired"][metric][arm].get(control)
        if found is None:
            continue
        text = f"{arm} ({signed(found)})"
        if found["low"] is None:
            undecided.append(text)
        elif not found["excludes_zero"]:
            tied.append(text)
        elif found["mean"] < 0:
            better.append(text)
        else:
            worse.append(text)
    where = f"{control} in {_IN_WORDS[metric]}"
    for names, relation in (
        (better, "Better than"),
        (worse, "Worse than"),
        (tied, "Not told apart from"),
        (undecided, "With a single seed, and so undecided, against"),
    ):
        if names:
            yield f"{relation} {where}: {', '.join(names)}."


def signed(found: Json) -> str:
    """Return a difference in nats with its interval."""
    if found["low"] is None:
        return f"{found['mean']:+.4f}"
    return f"{found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def _learning(results: Json) -> Iterator[str]:
    """Say whether learning was worth anything, arm by arm of AC-ODM."""
    arms = results["arms"]
    controls = [arm for arm, values in arms.items() if values["policy"] in _CONTROLS_OF_LEARNING]
    for arm, values in arms.items():
        if values["policy"] != _LEARNING:
            continue
        for metric, words in _IN_WORDS.items():
            parts = [
                f"{_relation(found)} {control} ({signed(found)})"
                for control in controls
                if (found := results["paired"][metric][arm].get(control)) is not None
            ]
            if parts:
                yield f"{arm} in {words}: {', '.join(parts)}."


def _relation(found: Json) -> str:
    if found["low"] is None:
        return "undecided against"
    if not found["excludes_zero"]:
        return "tied with"
    return "ahead of" if found["mean"] < 0 else "behind"


def _speed(results: Json) -> Iterator[str]:
    for arm, values in results["arms"].items():
        if values["policy"] != _LEARNING:
            continue
        for control, metric in _OWN_METRIC.items():
            reached = values["reached"].get(f"{control} {metric}")
            if reached and reached["by_seed"]:
                yield _speed_sentence(arm, values, control, metric, reached)


def _speed_sentence(arm: str, values: Json, control: str, metric: str, reached: Json) -> str:
    num, never = len(reached["by_seed"]), reached["never"]
    goal = f"{control}'s final value in {_IN_WORDS[metric]}"
    if never == num:
        return f"{arm} never reaches {goal} ({num} seeds)."
    share = reached["share_of_steps"]
    text = f"{arm} reaches {goal} after {share['mean']:.0%} of its steps"
    if share["low"] is not None:
        text += f" [{share['low']:.0%}, {share['high']:.0%}]"
    if values["charged"]["steps"]:
        text += ", the steps of its proxy run included"
    if never:
        text += f" in {num - never} of {num} seeds, and never in the others"
    # The whole interval must lie below, and every seed must get there.
    if never == 0 and share["high"] is not None and share["high"] <= _TARGET_SHARE:
        return f"{text}: within the aim of {_TARGET_SHARE:.0%}."
    return f"{text}: the aim of at most {_TARGET_SHARE:.0%} is not shown."


def _faults(arms: Json) -> Iterator[str]:
    held = [
        f"{arm} ({values['held_decisions']})"
        for arm, values in arms.items()
        if values["held_decisions"]
    ]
    if held:
        yield f"Policies that failed at some steps, where the mixture was held: {', '.join(held)}."
