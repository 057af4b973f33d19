"""deploy/kubernetes against KubeRay's and Kubernetes' own schemas, and against our promises."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from controller.config import RunConfig, parse_run
from deploy.commands import app
from protos.security import is_loopback

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
KUBERNETES = "1.33"
CRDS = json.loads((ROOT / "tests/data/kuberay/crds-v1.7.0.json").read_text())
SECRETS = {"join", "admin", "headrace.pem", "headrace.key"}
"""What deploy/secrets.sh makes."""


def documents() -> list[dict[str, Any]]:
    """Return every object of every file."""
    texts = [path.read_text() for path in sorted(FOLDER.glob("*.yaml"))]
    return [each for text in texts for each in yaml.safe_load_all(text)]


def of(kind: str, name: str) -> dict[str, Any]:
    """Return the one object of a kind and name."""
    (found,) = [d for d in documents() if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


def strict(schema: Any) -> Any:
    """Return a schema that refuses unknown keys, which a cluster would silently drop."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def check_ray(document: dict[str, Any]) -> None:
    """Hold a Ray object against its CRD; raise ValidationError."""
    definitions = strict(CRDS["$defs"])
    own = definitions[document["kind"]]
    own["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft202012Validator({"$defs": definitions, **own}).validate(document)


def pod_templates(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the pods that an object makes."""
    spec = document.get("spec", {})
    if document["kind"] == "RayCluster":
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            yield group["template"]
    elif document["kind"] == "RayJob":
        yield spec["submitterPodTemplate"]
    elif document["kind"] == "Job":
        yield spec["template"]


TEMPLATES = [
    pytest.param(template, id=f"{document['kind']}-{index}")
    for document in documents()
    for index, template in enumerate(pod_templates(document))
]
OBJECTS = [pytest.param(d, id=f"{d['kind']}-{d['metadata']['name']}") for d in documents()]


@pytest.mark.parametrize("document", OBJECTS)
def test_every_object_is_what_its_schema_says(document: dict[str, Any]) -> None:
    if document["apiVersion"].startswith("ray.io/"):
        check_ray(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    assert document["metadata"]["namespace"] == "headrace"


def test_a_key_that_the_crd_does_not_have_is_found() -> None:
    for path in (("authOption",), ("headGroupSpec", "serviceAccount")):
        document = copy.deepcopy(of("RayCluster", "headrace"))
        target = document["spec"]
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = {}
        with pytest.raises(jsonschema.ValidationError, match=path[-1]):
            check_ray(document)
    document = copy.deepcopy(of("RayCluster", "headrace"))
    document["spec"]["authOptions"]["mode"] = "tokens"
    with pytest.raises(jsonschema.ValidationError, match="tokens"):
        check_ray(document)


@pytest.mark.parametrize("template", TEMPLATES)
def test_pods_are_what_kubernetes_says_and_hold_no_more_rights_than_they_need(
    template: dict[str, Any],
) -> None:
    whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}}
    kubernetes_validate.validate({**whole, "template": template}, KUBERNETES, strict=True)
    spec = template["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    mounted = {volume["name"] for volume in spec["volumes"]}
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert ":" in container["image"]
        assert not container["image"].endswith(":latest")
        assert {mount["name"] for mount in container["volumeMounts"]} == mounted
        # Ray and torchrun write there, and the rest is read-only.
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("template", TEMPLATES)
def test_secrets_are_files_that_our_readers_accept(template: dict[str, Any]) -> None:
    for volume in template["spec"]["volumes"]:
        if "secret" in volume:
            # A file that every user may read is refused by protos.watched_file.
            assert volume["secret"]["defaultMode"] & 0o007 == 0
            assert template["spec"]["securityContext"]["fsGroup"] > 0
    for container in template["spec"]["containers"]:
        for variable in container.get("env", []):
            assert "secretKeyRef" not in variable.get("valueFrom", {}), "secrets are in files"


def run_config() -> RunConfig:
    """Return the run file as the controller reads it."""
    text = of("ConfigMap", "headrace-run")["data"]["run.yaml"]
    return parse_run(yaml.safe_load(text), source="run-file.yaml")


def mounts(template: dict[str, Any]) -> dict[str, str]:
    """Return mount path -> volume of the first container."""
    container = template["spec"]["containers"][0]
    return {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}


def test_the_run_file_fits_the_cluster_that_it_is_mounted_in() -> None:
    config = run_config()
    spec = of("RayCluster", "headrace")["spec"]
    head, worker = spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]
    security = config.wire_security
    assert not is_loopback(config.address)
    assert security.serves_tls
    assert security.join_token_file is not None
    for file in (security.cert, security.key, security.join_token_file, security.admin_token_file):
        assert file is not None
        assert file.name in SECRETS
        assert str(file.parent) in mounts(head)
        assert str(file.parent) in mounts(worker)
    port = int(config.address.rpartition(":")[2])
    assert port in {each["containerPort"] for each in head["spec"]["containers"][0]["ports"]}
    for path in (config.out, config.data.index, config.data.tokenizer):
        assert path is not None
        assert path.is_relative_to("/runs")
    assert {"/runs", "/etc/headrace"} <= mounts(head).keys()
    assert {"/runs", str(config.workers.cache_dir)} <= mounts(worker).keys()
    assert config.workers.count <= spec["workerGroupSpecs"][0]["minReplicas"]


def test_the_job_gives_a_command_that_the_command_line_has() -> None:
    job = of("RayJob", "headrace-my-run")["spec"]
    name, *arguments = shlex.split(job["entrypoint"])
    assert name == "headrace"
    shown = CliRunner().invoke(app, [arguments[0], "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    for option in (each for each in arguments if each.startswith("--")):
        assert option in shown.stdout
    cluster = of("RayCluster", "headrace")
    assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    head = cluster["spec"]["headGroupSpec"]["template"]
    assert str(Path(arguments[1]).parent) in mounts(head)


def test_trainers_find_controller_and_files_and_hold_no_key() -> None:
    job = of("Job", "headrace-trainer")["spec"]
    container = job["template"]["spec"]["containers"][0]
    port = run_config().address.rpartition(":")[2]
    assert f"--controller=headrace-head-svc:{port}" in container["args"]
    files = {each["name"]: each["value"] for each in container["env"]}
    folder = next(path for path, name in mounts(job["template"]).items() if name == "join")
    assert files["HEADRACE_JOIN_TOKEN_FILE"] == f"{folder}/join"
    assert files["HEADRACE_CA"] == f"{folder}/headrace.pem"
    assert files["HEADRACE_SERVER_NAME"] == run_config().wire_security.server_name
    assert not any("admin" in value or ".key" in value for value in files.values())


def test_nobody_from_elsewhere_reaches_the_pods() -> None:
    policies = {d["metadata"]["name"]: d["spec"] for d in documents() if "Policy" in d["kind"]}
    port = int(run_config().address.rpartition(":")[2])
    for document in documents():
        for template in pod_templates(document):
            labels = {**template["metadata"]["labels"]}
            if document["kind"] == "RayCluster":
                labels["ray.io/cluster"] = document["metadata"]["name"]
            if labels["app.kubernetes.io/name"] == "headrace-submitter":
                continue  # it serves nothing
            matching = [
                spec
                for spec in policies.values()
                if spec["podSelector"]["matchLabels"].items() & labels.items()
            ]
            assert matching, labels
    for spec in policies.values():
        assert spec["policyTypes"] == ["Ingress"]
        assert all(rule.get("from") for rule in spec["ingress"]), "a rule without `from` is for all"
    to_head = policies["headrace-head"]["ingress"]
    trainers = [rule for rule in to_head if "trainer" in json.dumps(rule["from"])]
    assert [rule["ports"] for rule in trainers] == [[{"protocol": "TCP", "port": port}]]
