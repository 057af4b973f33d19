from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from controller.policy import artefact
from controller.policy.base import PolicyState
from protos.errors import ConfigError
from tests.laws import assert_same_state

STATE = PolicyState(
    arrays={
        "scalar": np.array(3, np.int64),
        "bytes": np.arange(5, dtype=np.uint8),
        "none": np.zeros((0, 4), np.float32),
        "odd": np.array([[np.nan, -0.0], [np.inf, 1e-300]]),
        "turned": np.arange(6.0).reshape(2, 3).T,
    },
    values={"name": "acodm", "nested": {"list": [1, 2.5, None, True]}, "wörd": "é"},
)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "new" / "policy.safetensors"
    artefact.save(STATE, path)
    assert_same_state(artefact.load(path), STATE)


def test_it_says_where_it_comes_from_and_the_checksum_covers_that(tmp_path: Path) -> None:
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    artefact.save(STATE, one, origin={"run": "small", "steps": 7})
    artefact.save(STATE, other, origin={"run": "large", "steps": 7})
    assert artefact.read(one).origin == {"run": "small", "steps": 7}
    assert artefact.read(one).sha256 != artefact.read(other).sha256
    artefact.save(STATE, other, origin={"run": "small", "steps": 7})
    assert one.read_bytes() == other.read_bytes()


def test_any_reader_of_safetensors_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    artefact.save(STATE, path)
    read = load_file(path)
    assert read.keys() == STATE.arrays.keys()
    for name, array in read.items():
        assert np.array_equal(array, STATE.arrays[name], equal_nan=array.dtype.kind == "f")


def test_saving_again_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    artefact.save(PolicyState(), path)
    artefact.save(STATE, path)
    assert_same_state(artefact.load(path), STATE)
    assert list(tmp_path.iterdir()) == [path]


def test_a_value_that_json_does_not_have_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    artefact.save(STATE, path)
    with pytest.raises(ValueError, match="JSON"):
        artefact.save(PolicyState(values={"loss": float("nan")}), path)
    assert_same_state(artefact.load(path), STATE)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part", [0, 4, 20, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, part: float) -> None:
    path = tmp_path / "policy.safetensors"
    artefact.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole)) if part < 1 else int(part)])
    with pytest.raises(ConfigError, match=r"policy.safetensors is damaged"):
        artefact.load(path)


def test_any_flipped_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    artefact.save(STATE, path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        spoilt = bytearray(whole)
        spoilt[position] ^= 0x11
        path.write_bytes(spoilt)
        with pytest.raises(ConfigError, match=r"policy.safetensors"):
            artefact.load(path)


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ConfigError, match="is not a policy state"):
        artefact.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no policy state at .*nowhere"):
        artefact.load(tmp_path / "nowhere")
