"""The workflows of GitHub Actions: pinned, with few rights and a time limit, running files that are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.images.compose import SETUPS, load_yaml
from tests.images.dockerfile import DOCKER, ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
KEYS = {"name", "on", "permissions", "concurrency", "jobs"}
JOB_KEYS = {"runs-on", "timeout-minutes", "env", "steps", "strategy"}
STEP_KEYS = {"uses", "with", "run", "env"}
JOBS = [
    pytest.param(job, id=f"{path.stem}-{name}")
    for path in WORKFLOWS
    for name, job in load_yaml(path)["jobs"].items()
]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_only_reads_the_repository(path: Path) -> None:
    workflow = load_yaml(path)
    # YAML 1.1 takes `on` for true.
    assert {"on" if key is True else key for key in workflow} == KEYS
    assert set(workflow[True]) == {"push", "pull_request"}
    assert workflow["permissions"] == {"contents": "read"}


@pytest.mark.parametrize("job", JOBS)
def test_a_job_has_a_machine_and_a_time_limit(job: dict[str, Any]) -> None:
    assert set(job) <= JOB_KEYS
    assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"])
    assert 1 <= job["timeout-minutes"] <= 90
    assert all(set(step) <= STEP_KEYS for step in job["steps"])


@pytest.mark.parametrize("job", JOBS)
def test_actions_are_pinned_to_a_commit_and_leave_no_credentials(job: dict[str, Any]) -> None:
    used = [step for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]) for step in used)
    assert used[0]["uses"].startswith("actions/checkout@")
    assert used[0]["with"]["persist-credentials"] is False


@pytest.mark.parametrize("job", JOBS)
def test_what_a_job_runs_is_there(job: dict[str, Any]) -> None:
    scripts = [step["run"] for step in job["steps"] if "run" in step]
    for script in scripts:
        subprocess.run(["bash", "-n", "-c", script], check=True)
        assert "${{" not in script  # what a pull request says would run as a command
        for file in re.findall(r"(?:docker|\.ci)/[\w.-]+", script):
            assert (ROOT / file).is_file()


def test_every_dockerfile_and_every_set_up_is_tried() -> None:
    jobs = load_yaml(ROOT / ".github/workflows/docker.yml")["jobs"]
    scripts = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    assert all(f"docker/{path.name}" in scripts for path in DOCKER.glob("*.Dockerfile"))
    tried = set(jobs["smoke"]["strategy"]["matrix"]["setup"])
    assert tried == {name for name in SETUPS if not name.endswith("-cuda")}


def test_the_tests_that_need_docker_cannot_be_skipped() -> None:
    job = load_yaml(ROOT / ".github/workflows/docker.yml")["jobs"]["tests"]
    assert job["env"]["REQUIRE_DOCKER"] == "1"
    assert job["steps"][-1]["run"].endswith("pytest -m docker")
