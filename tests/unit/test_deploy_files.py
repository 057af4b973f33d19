"""Dockerfiles, scripts, units and `ray up`, held by the tools that read them."""

from __future__ import annotations

import fnmatch
import io
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from ray.autoscaler._private.util import prepare_config, validate_config

from protos.tls import Identity
from protos.tokens import token_file

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
SCRIPTS = [
    ROOT / "deploy/secrets.sh",
    ROOT / "deploy/examples/launch.sh",
    ROOT / "deploy/slurm/headrace.sbatch",
]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))


def tool(name: str) -> str:
    """Return the path of a linter that the environment brings."""
    return str(Path(sys.executable).with_name(name))


def structure(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and what they say."""
    parser = DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))
    return [(each["instruction"], each["value"]) for each in parser.structure]


def lines(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing_in_a_dockerfile(path: Path) -> None:
    done = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, lines(done)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_small_pinned_without_root_and_without_secrets(path: Path) -> None:
    done = structure(path)
    bases = [value for what, value in done if what == "FROM"]
    assert len(bases) == 2, "what builds is not what ships"
    assert all(re.match(r"python:3\.\d+\.\d+-slim-\w+", base) for base in bases)
    users = [value for what, value in done if what == "USER"]
    # By number, else Kubernetes cannot know that it is not root.
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert [value for what, value in done if what == "HEALTHCHECK"]
    for what, value in done:
        if what in ("ENV", "ARG"):
            assert not re.search(r"(?i)(secret|password|(?<!_)token(?!izers))\w*=", value)
        if what == "COPY" and "--from" not in value:
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
        if what == "RUN" and "pip" in value:
            assert "constraints.txt" in value


def test_the_context_of_a_build_has_what_is_copied_and_nothing_else() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"]
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*"
    for path in DOCKERFILES:
        for what, value in structure(path):
            if what == "COPY" and "--from" not in value:
                for source in value.split()[:-1]:
                    assert any(fnmatch.fnmatch(source, rule) for rule in kept), source
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {name.partition(".")[0] for name in packages["packages"]} <= kept
    assert not {".git", ".venv", "runs", "tests", "secrets"} & kept


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_a_script(path: Path) -> None:
    done = subprocess.run([tool("shellcheck"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, lines(done)
    assert os.access(path, os.X_OK)


def test_secrets_are_made_once_for_their_owner_alone_and_both_ends_take_them(
    tmp_path: Path,
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl on this machine, which makes the certificates")
    folder = tmp_path / "secrets"
    script = str(ROOT / "deploy/secrets.sh")
    subprocess.run([script, str(folder)], check=True, capture_output=True)
    names = {"join", "admin", "headrace.pem", "headrace.key"}
    first = {name: (folder / name).read_bytes() for name in names}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).stat().st_mode & 0o077 == 0 for name in names)
    subprocess.run([script, str(folder)], check=True, capture_output=True)
    assert {name: (folder / name).read_bytes() for name in names} == first
    Identity(folder / "headrace.pem", folder / "headrace.key")
    assert token_file(folder / "join") != token_file(folder / "admin")


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_takes_a_unit_and_finds_it_hardened(path: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze on this machine, which reads the units")
    # It looks whether the command is there: give it ones that are.
    unit = tmp_path / path.name
    text = path.read_text()
    for name in ("headrace", "python"):
        text = text.replace(f"ExecStart=/opt/headrace/bin/{name} ", f"ExecStart={sys.executable} ")
    unit.write_text(text)
    instance = str(unit).replace("@.", "@my-run.")
    shutil.copy(unit, instance)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", instance],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, lines(done)
    assert path.name.partition("@")[0] not in lines(done), "a warning is about this unit"
    # 10 is what a service without any limits gets; 2.0 and less systemd calls OK.
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", instance],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, lines(done)


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_what_the_package_has(path: Path) -> None:
    settings = dict(
        line.split("=", 1) for line in path.read_text().splitlines() if re.match(r"\w+=", line)
    )
    program, *arguments = settings["ExecStart"].split()
    started = {
        "/opt/headrace/bin/headrace": [sys.executable, "-m", "deploy.cli", arguments[0]],
        "/opt/headrace/bin/python": [sys.executable, *arguments[:2]],
    }[program]
    shown = subprocess.run([*started, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, lines(shown)
    for option in re.findall(r"--[a-z-]+", settings["ExecStart"]):
        assert option in shown.stdout
    # Exit codes that no second try mends are not tried again.
    assert settings["RestartPreventExitStatus"] == "2"


def test_ray_takes_the_cluster_file_and_its_ports_are_closed() -> None:
    config = yaml.safe_load((ROOT / "deploy/ray/cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    starts = [command for command in starts if " start " in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
        assert "RAY_USAGE_STATS_ENABLED=0" in command
    head = starts[0]
    assert "--dashboard-host=127.0.0.1" in head
    assert "--ray-client-server-port=0" in head
    # What Ray looks for when no variable names it.
    assert "~/.ray/auth_token" in config["file_mounts"]
    with pytest.raises(Exception, match="providers"):
        validate_config({**prepared, "providers": {}})


def test_ray_start_has_the_options_that_the_cluster_file_gives() -> None:
    shown = subprocess.run([tool("ray"), "start", "--help"], capture_output=True, text=True)
    text = (ROOT / "deploy/ray/cluster.yaml").read_text()
    for option in re.findall(r"(--[a-z-]+)=", text):
        assert option in shown.stdout, option
