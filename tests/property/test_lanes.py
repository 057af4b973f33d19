"""Laws of who serves which lane: even, few moves, everything served."""

from __future__ import annotations

from collections import Counter
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from controller.lanes import LaneTable, Standing, assign, fill
from protos.types import Lane
from tests.fakes_controller import Clock

_LANES = 24
_NAMES = ["a", "b", "c", "d", "e"]

_standings = st.dictionaries(
    st.sampled_from(_NAMES),
    st.builds(
        Standing,
        capacity=st.sampled_from([2, 7, _LANES, _LANES, _LANES]),
        unwilling=st.booleans(),
        absent=st.booleans(),
    ),
)
_owners = st.dictionaries(st.integers(0, _LANES - 1).map(Lane), st.sampled_from(_NAMES))


@given(owners=_owners, standings=_standings, balance=st.booleans())
def test_every_lane_that_can_be_is_served_by_one_worker(
    owners: dict[Lane, str], standings: dict[str, Standing], balance: bool
) -> None:
    after = assign(owners, standings, _LANES, balance=balance)
    assert set(after.values()) <= standings.keys()
    have = Counter(after.values())
    takers = {
        name: each for name, each in standings.items() if not each.unwilling and not each.absent
    }
    unserved = _LANES - len(after)
    if unserved:
        # Then everybody who takes lanes is full.
        assert all(have[name] >= each.capacity for name, each in takers.items())
    for lane, name in after.items():
        if name not in takers:
            assert owners[lane] == name, "nobody is given a lane that does not take any"


@given(owners=_owners, names=st.sets(st.sampled_from(_NAMES), min_size=1))
def test_balanced_lanes_are_even_within_one_with_as_few_moves_as_that_takes(
    owners: dict[Lane, str], names: set[str]
) -> None:
    standings = {name: Standing(capacity=_LANES) for name in names}
    after = assign(owners, standings, _LANES, balance=True)
    have = Counter(after.values())
    assert sum(have.values()) == _LANES
    assert max(have[name] for name in names) - min(have[name] for name in names) <= 1
    held = Counter(name for name in owners.values() if name in names)
    moved = sum(owners[lane] in names and owners[lane] != after[lane] for lane in owners)
    low, num_high = divmod(_LANES, len(names))
    fewest = min(
        sum(
            max(held[name] - low - bonus, 0)
            for name, bonus in zip(sorted(names), more, strict=True)
        )
        for more in product((0, 1), repeat=len(names))
        if sum(more) == num_high
    )
    assert moved == fewest


@given(owners=_owners, standings=_standings)
def test_without_balancing_only_lanes_without_a_worker_move(
    owners: dict[Lane, str], standings: dict[str, Standing]
) -> None:
    after = assign(owners, standings, _LANES, balance=False)
    for lane, name in owners.items():
        if name in standings and not standings[name].unwilling:
            assert after[lane] == name


@given(
    shares=st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 5)),
    capacities=st.dictionaries(st.sampled_from(_NAMES), st.integers(0, 9)),
    num_lanes=st.integers(0, 30),
)
def test_filling_gives_to_whoever_has_least(
    shares: dict[str, int], capacities: dict[str, int], num_lanes: int
) -> None:
    filled = fill(shares, capacities, num_lanes, held={})
    before = {name: shares.get(name, 0) for name in capacities}
    room = sum(max(capacities[name] - before[name], 0) for name in capacities)
    assert sum(filled.values()) - sum(before.values()) == min(num_lanes, room)
    for gave, got in product(filled, repeat=2):
        if filled[got] > before[got] and filled[gave] < capacities[gave]:
            assert filled[got] <= filled[gave] + 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "go", "leave", "blink", "wait"]), st.sampled_from(_NAMES)
        )
    )
)
def test_a_table_that_was_told_settles_even_whatever_workers_do(
    events: list[tuple[str, str]],
) -> None:
    clock = Clock()
    table = LaneTable(_LANES, now=clock)
    members: dict[str, Standing] = {"z": Standing(capacity=_LANES)}
    table.update(members)
    table.told()
    for what, name in events:
        if what == "join":
            members[name] = Standing(capacity=_LANES)
        elif what == "go":
            members.pop(name, None)
        elif name in members and what in ("leave", "blink"):
            members[name] = Standing(
                capacity=_LANES, unwilling=what == "leave", absent=what == "blink"
            )
        elif what == "wait":
            clock.now_s += 0.6
        version, before = table.version, dict(table.owners)
        table.update(members)
        assert table.is_complete
        assert (table.version > version) == (before != table.owners)
    members = {name: Standing(capacity=_LANES) for name in members}
    table.update(members)
    clock.now_s += 1.0
    table.update(members)
    have = Counter(table.owners.values())
    assert max(have.values()) - min(have[name] for name in members) <= 1
    settled = dict(table.owners)
    clock.now_s += 100.0
    assert table.update(members) is None
    assert table.owners == settled
