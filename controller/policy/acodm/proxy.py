"""A policy that another run has learned: what of it a new run takes over, and what it must not.

A domain is known by its name. The learner keeps the order of domains that it was learned in, and
what goes in and comes out is put into that order and out of it.

Of the state that the actor sees, losses (in nats), their changes, tokens (as a part of what the run
will use) and progress mean the same with a model of another size, and are normalised as in the run
that it was learned in. Norms of weights and of their changes depend on the model's width and on its
learning rate: a run normalises them by its own means and variances. Rewards and remembered
transitions are left behind, since the gradients of another model are of another size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controller.observation import StepObservation
from controller.policy import artefact
from controller.policy.acodm.moments import RunningMoments
from controller.policy.acodm.state import layout
from controller.policy.base import PolicyContext, PolicyState
from controller.policy.config import AcodmConfig, ProxyConfig
from controller.policy.header import HEADER, VERSION
from protos.errors import ConfigError

logger = logging.getLogger(__name__)

LAYOUT = "layout"
PLACES = "places"
ACTING = "acting"
"""Keys of a saved state's values."""

LEARNED_UNDER = (
    "width",
    "depth",
    "critic",
    "norm_layers",
    "gamma",
    "reward",
    "own_term",
    "importance",
    "normalise",
    "reward_smoothing",
)
"""Settings without which what was learned means nothing."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Learned:
    """What a run takes over from an artefact."""

    config: AcodmConfig
    """The artefact's settings, and the run file's where it may differ."""

    order: NDArray[np.int64]
    """[domains]: the run's domain at each of the learner's places."""

    parts: Mapping[str, Mapping[str, NDArray[Any]]]
    """The artefact's arrays, by part and name."""

    identity: AcodmConfig
    """The same with the artefact's checksum for its path, by which a saved state is known."""


def take_over(config: AcodmConfig, context: PolicyContext) -> Learned:
    """Read the artefact that `config.proxy` names.

    Raises:
        ConfigError: it cannot be read, is of another policy or other domains, or still warms up, or
            the run file contradicts it.
    """
    proxy = config.proxy
    assert proxy is not None
    held = artefact.read(proxy.artefact)
    settings = _checked_settings(held.state, proxy.artefact)
    learned = [str(name) for name in held.state.values[PLACES]]
    order = learner_order(context.domains, learned, proxy)
    theirs = _in_names_of_the_run(settings, context.domains, learned, order)
    logger.info(
        "policy of %s (run %s after %s steps) goes on %s",
        proxy.artefact,
        held.origin.get("run", "unknown"),
        held.origin.get("steps", "unknown"),
        proxy.mode,
    )
    merged = _merged(config, theirs, proxy.artefact)
    known = proxy.model_copy(update={"artefact": Path(f"sha256:{held.sha256}")})
    return Learned(
        config=merged,
        order=order,
        parts=parts_of(held.state),
        identity=merged.model_copy(update={"proxy": known}),
    )


def parts_of(state: PolicyState) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the arrays `part.name` by part and name."""
    parts: dict[str, dict[str, NDArray[Any]]] = {}
    for name, array in state.arrays.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = array
    return parts


def opening_state(moments: RunningMoments) -> NDArray[np.float32]:
    """Return the normalised state before the first step: at its beginning, all else as usual."""
    usual = moments.mean
    usual[-1] = 0.0
    return moments.normalised(usual)


def learner_order(
    domains: Sequence[str], learned: Sequence[str], proxy: ProxyConfig
) -> NDArray[np.int64]:
    """Return [domains] which of the run's `domains` stands at each place of the `learned` ones.

    Raises:
        ConfigError: they are not the same, also by the names that the run file gives.
    """
    renamed = proxy.domains or {}
    for new, old in renamed.items():
        if new not in domains:
            raise ConfigError(
                f"policy.proxy.domains names {new!r}, but the run has {', '.join(domains)}; give "
                "this run's name first, then the artefact's"
            )
        if old not in learned:
            raise ConfigError(
                f"policy.proxy.domains calls {new!r} {old!r} in the artefact, but that was learned "
                f"on {', '.join(learned)}"
            )
    named = [renamed.get(domain, domain) for domain in domains]
    there = [name for name in learned if name not in named]
    here = [domain for domain, name in zip(domains, named, strict=True) if name not in learned]
    twice = sorted({name for name in named if named.count(name) > 1})
    if there or here or twice:
        differences = [
            f"only {place}: {', '.join(names)}"
            for place, names in (("in the artefact", there), ("in this run", here))
            if names
        ]
        differences += [f"more than one domain of this run is its {name}" for name in twice]
        raise ConfigError(
            f"the policy of {proxy.artefact} was learned on other domains ({'; '.join(differences)}"
            "); train the proxy on this run's domains, or say in policy.proxy.domains which domain "
            "of the artefact each of this run is"
        )
    return np.array([named.index(name) for name in learned], np.int64)


def in_order(observation: StepObservation, order: NDArray[np.int64]) -> StepObservation:
    """Return the observation with its domains in the learner's order."""
    alignment = observation.alignment
    return replace(
        observation,
        planned=observation.planned[order],
        sequences=observation.sequences[order],
        tokens=observation.tokens[order],
        loss_sum=observation.loss_sum[order],
        alignment=None if alignment is None else alignment[np.ix_(order, order)],
    )


def out_of_order(shares: NDArray[np.float64], order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the learner's shares in the order of the run's domains."""
    ours = np.empty_like(shares)
    ours[order] = shares
    return ours


def _checked_settings(state: PolicyState, path: Path) -> dict[str, Any]:
    header = state.values.get(HEADER)
    name = header["settings"].get("name") if isinstance(header, dict) else None
    if not isinstance(header, dict) or name != AcodmConfig().name or LAYOUT not in state.values:
        raise ConfigError(
            f"{path} holds the state of a policy {name or 'unknown'!r} that learns nothing for "
            "others; give a snapshot of a run whose policy is acodm and learns"
        )
    if header["version"] != VERSION:
        raise ConfigError(
            f"{path} was saved in version {header['version']} of the policies' states, this code "
            f"reads {VERSION}; run the proxy again with this release"
        )
    settings: dict[str, Any] = header["settings"]
    wanted = layout(len(header["domains"]), settings["norm_layers"])
    if state.values[LAYOUT] != wanted:
        raise ConfigError(
            f"the policy of {path} sees {state.values[LAYOUT]}, this release's {wanted}; run the "
            "proxy again with this release"
        )
    if not state.values[ACTING]:
        raise ConfigError(
            f"the policy of {path} is still in its warm-up and has learned nothing yet; take a "
            "later snapshot of that run"
        )
    return settings


def _in_names_of_the_run(
    settings: Mapping[str, Any],
    domains: Sequence[str],
    learned: Sequence[str],
    order: NDArray[np.int64],
) -> dict[str, Any]:
    """Return settings that are not the default, a mixture by this run's names."""
    plain = AcodmConfig().model_dump(mode="json")
    theirs = {key: value for key, value in settings.items() if value != plain.get(key)}
    theirs.pop("proxy", None)
    if isinstance(initial := theirs.get("initial"), dict):
        ours = {name: domains[place] for name, place in zip(learned, order, strict=True)}
        theirs["initial"] = {ours[name]: share for name, share in initial.items()}
    return theirs


def _merged(config: AcodmConfig, theirs: Mapping[str, Any], path: Path) -> AcodmConfig:
    given = {key: getattr(config, key) for key in config.model_fields_set}
    plain = AcodmConfig().model_dump(mode="json")
    for key in LEARNED_UNDER:
        learned = theirs.get(key, plain[key])
        if given.get(key, learned) != learned:
            raise ConfigError(
                f"policy.{key} is {given[key]!r}, but the policy of {path} was learned with "
                f"{learned!r}; leave policy.{key} out"
            )
    return type(config).model_validate({**theirs, **given})
