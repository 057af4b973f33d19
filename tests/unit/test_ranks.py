import pytest

from protos.errors import ConfigError
from trainer_client.ranks import resolve_rank


def test_arguments_win_over_the_environment() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8"}
    assert resolve_rank(rank=1, world_size=2, environment=environment) == (1, 2)
    assert resolve_rank(rank=None, world_size=None, environment=environment) == (5, 8)


def test_a_rank_without_a_world_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="together, got rank 1 of None"):
        resolve_rank(rank=1, world_size=None, environment={})


@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "one", "WORLD_SIZE": "2"}]
)
def test_half_an_environment_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must both be integers"):
        resolve_rank(rank=None, world_size=None, environment=environment)


def test_a_rank_beyond_the_world_size_is_refused_with_its_source() -> None:
    with pytest.raises(ConfigError, match=r"rank 2 of 2 from the environment"):
        resolve_rank(rank=None, world_size=None, environment={"RANK": "2", "WORLD_SIZE": "2"})


def test_no_rank_at_all_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="start the trainer with torchrun"):
        resolve_rank(rank=None, world_size=None, environment={})
