"""How a run can be watched: the page that it leaves, and the message to a webhook."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.pipeline.conftest import Project, last_run


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address and the messages that it has got."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret", got
    server.shutdown()


def test_page_and_message(project: Project, prefect_api: str, webhook: tuple[str, list[dict[str, Any]]]) -> None:
    url, got = webhook
    project.flow(GLMFLOW_WEBHOOK_URL=url)
    name = last_run(prefect_api)["name"]
    (message,) = got
    assert (message["flow"], message["run"], message["state"]) == ("rlhf-pipeline", name, "Completed")
    assert message["text"].startswith(f"rlhf-pipeline {name}: Completed.")

    page = (project.root / "reports" / f"{name}.html").read_text(encoding="utf-8")
    for text in ("Before and after", "5.000", "非常满意[bold]", "ppo.learning_rate", "models/export", "<h2>Data</h2>"):
        assert text in page
    assert page.count("src='data:image/png;base64,") == 5  # base, SFT, reward model, its judge, PPO
    assert "http" not in page.replace("http://127", "")  # nothing is loaded from elsewhere
    client = MlflowClient(f"sqlite:///{project.root}/mlruns/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("rlhf-pipeline").experiment_id])
    assert f"{name}.html" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}

    # a failure is told too, and the address may stand in params.yaml
    params = project.root / "params.yaml"
    lines = (
        params.read_text(encoding="utf-8").replace("  webhook: ", f"  webhook: {url} ").replace("seed: 42", "seed: 1")
    )
    params.write_text(lines, encoding="utf-8")
    assert project.flow(check=False, FAIL_preprocess="2").returncode == 2
    assert [message["state"] for message in got] == ["Completed", "Failed"]
    assert "preprocess fell over" in got[1]["message"]


def test_a_dead_webhook_fails_no_run(project: Project, prefect_api: str) -> None:
    done = project.flow(GLMFLOW_WEBHOOK_URL="http://127.0.0.1:9/secret")
    assert last_run(prefect_api)["state"]["type"] == "COMPLETED"
    assert "secret" not in done.stdout + done.stderr
