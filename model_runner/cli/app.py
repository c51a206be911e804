"""`model-runner`: build, calibrate, evaluate and explain a routing memory, generate with it, teach it; the demo."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from model_runner.cli.build import build
from model_runner.cli.calibrate import calibrate
from model_runner.cli.evaluate import demo, evaluate
from model_runner.cli.experiment import experiment
from model_runner.cli.explain import explain
from model_runner.cli.generate import generate
from model_runner.cli.harness import lm_eval, reference
from model_runner.cli.learn import learn
from model_runner.cli.sample_data import sample_data
from model_runner.errors import BadInput, RunnerError

_KEPT = "; what the sidecar acknowledged is kept"
_GOES_ON = f"{_KEPT}: the same command again goes on where it stopped"
_RUNNER = ("torch", "transformers", "accelerate", "faiss", "matplotlib", "packaging")
_EXTRAS = dict.fromkeys(_RUNNER, "runner") | {"lm_eval": "harness"}
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_UNAVAILABLE, EXIT_INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make a frozen Mixture-of-Experts model better on your text, without touching a weight.\n\n"
    "Start a sidecar, build a memory from reference text, then generate with it:\n\n"
    "    router-service serve --data ./memories &\n\n"
    "    model-runner build --model allenai/OLMoE-1B-7B-0924 --memory law --reference law.jsonl\n\n"
    "    model-runner evaluate --model allenai/OLMoE-1B-7B-0924 --memory law --text held-out.jsonl\n\n"
    "    model-runner generate --model allenai/OLMoE-1B-7B-0924 --memory law --prompt 'The tenant'\n\n"
    "It learns while it serves:\n\n"
    "    model-runner learn new-cases.jsonl --model allenai/OLMoE-1B-7B-0924 --memory law\n\n"
    "Exit codes: 0 done, 1 failed, 2 bad input, 3 the sidecar cannot be reached, 130 Ctrl-C.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{version('knn-moe')}\n")
        raise typer.Exit


def _variable(name: str) -> str:
    """As knnmoe.credentials, whose import --help does not wait for."""
    return f"KNNMOE_{name.upper()}"


def _credential(name: str, help_text: str) -> Any:
    return typer.Option(metavar="FILE", envvar=_variable(name), help=help_text)


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
    token_file: Annotated[
        Path | None, _credential("token_file", "File with the token that the sidecar asks for.")
    ] = None,
    ca_file: Annotated[
        Path | None,
        _credential(
            "ca_file",
            "PEM file of the authorities that may have signed the sidecar's certificate: with it HOST:PORT is "
            "spoken to in TLS.",
        ),
    ] = None,
    cert_file: Annotated[
        Path | None, _credential("cert_file", "PEM file of this client's certificate.")
    ] = None,
    key_file: Annotated[Path | None, _credential("key_file", "PEM file of its key.")] = None,
) -> None:
    """The help is the app's. What is given counts for every client of the process, as from the environment."""
    files = {
        "token_file": token_file,
        "ca_file": ca_file,
        "cert_file": cert_file,
        "key_file": key_file,
    }
    for name, path in files.items():
        if path is not None:
            os.environ[_variable(name)] = str(path)


for command in (
    *(build, calibrate, evaluate, explain, generate, learn, demo, experiment, sample_data),
    reference,
):
    app.command()(command)
# What is given goes on to the other command, options too.
_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False}
app.command(context_settings=_PASSED_ON)(lm_eval)
_COMMANDS = (
    *("build", "learn", "generate", "calibrate", "evaluate", "explain", "demo", "experiment"),
    "lm-eval",
)


def main() -> None:
    """Entry point of the console script: errors become one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Torch's idle threads would spin on the cores that the sidecar needs; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():  # the libraries' bars would fill a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        app()
    except KeyboardInterrupt:
        _fail(_interrupted(), EXIT_INTERRUPTED)
    except SystemExit as ended:
        if ended.code == EXIT_INTERRUPTED:  # Ctrl-C within a command: typer ends it without a word
            _fail(_interrupted(), EXIT_INTERRUPTED)
        raise
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        _fail(
            f"{error.name} is not installed; the {extra} needs it: pip install 'knn-moe[{extra}]'",
            EXIT_FAILED,
        )
    except (BadInput, _client().KindMismatch, _client().BadCredentials) as error:
        _fail(error, EXIT_BAD_INPUT)
    except _client().ServiceUnavailable as error:
        _fail(_unavailable(error), EXIT_UNAVAILABLE)
    except (RunnerError, _client().ServiceError, OSError) as error:
        _fail(error, EXIT_FAILED)


def _unavailable(error: Exception) -> str:
    if isinstance(error, _client().ConnectionMismatch):
        return str(error)
    return f"{error}\nIs a sidecar running there? Start one with: router-service serve --data DIR"


def _interrupted() -> str:
    """Files of the root's own options are no commands."""
    words = sys.argv[1:]
    command = next((word for word in words if word in _COMMANDS), "")
    if command in ("build", "learn"):
        return f"interrupted{_GOES_ON}"
    if command == "experiment":
        return "interrupted; results that were written are kept: the same command again goes on"
    learns = any(word.startswith(("--learn", "--interactive")) for word in words)
    return f"interrupted{_KEPT if command == 'generate' and learns else ''}"


def _client() -> ModuleType:
    """Its errors, imported when there is one: --help does not wait for gRPC."""
    from knnmoe import client

    return client


def _fail(what: object, code: int) -> None:
    sys.stderr.write(f"model-runner: {what}\n")
    sys.exit(code)
