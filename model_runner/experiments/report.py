"""From stored results to Markdown and plots: `python -m model_runner.experiments.report DIR --markdown F --images I`.

A pure function of the JSON: the same results give the same text, byte for byte.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from model_runner.errors import BadInput
from model_runner.experiments import plots
from model_runner.experiments.claims import ANSWERS, CLAIMS, Verdict
from model_runner.experiments.results import Result, Row, of_experiment, read_results

_HEAD = """# Results

Generated from {json}; do not edit. `{command}` writes it anew, byte for byte.

Changes are of NLL in nats per token against the plain model on the same held-out windows; negative is better. In
brackets: 95 % interval by paired bootstrap, resampled by document; with several seeds (draws of reference and test
windows) means over them, of the ends of the intervals too. `domain` is text of the memory's domain, `general` is text
like the model's training text: what a memory costs elsewhere. Presets are as they were before these runs; where a table
has `dev` and `test`, settings were compared on dev and the best (gain less ten times the harm) was then run on test.
DIR is a directory of domain texts; names of models are directories.
"""

_BASELINES = """Baselines have the memories' reference, and the largest gain on dev; `-safe`: among the candidates that
cost general dev text at most 0.01 nats per token, one standard error added. `few-shot` is the nearest reference text
before what is scored; `c3po` is the released code's mixture (3 neighbours that the model got right, last 5 layers, one
token at a time), carried over from answers to running text (model_runner/experiments/c3po.py); `c3po-tuned` keeps a
share of the token's own pathway, as the paper's text has it. `fit, s` is that of all candidates. The oracle sees the
answers."""

# In the order of the main table, whatever arms the program has that writes it.
_ARMS = (
    *("zero-shot", "paper", "paper-v2", "recommended", "recommended-3.5", "boosted"),
    *("boosted-alone", "recommended-alone", "distilled", "learned-metric"),
    *("recommended-tuned", "recommended-tuned-safe", "c3po", "c3po-tuned", "c3po-tuned-safe"),
    *("few-shot", "few-shot-safe", "router-ft", "router-ft-safe", "last-router-ft"),
    *("last-router-ft-safe", "lora", "lora-safe", "full-ft", "full-ft-safe", "knn-lm"),
    *("knn-lm-safe", "control-random", "control-shuffled", "control-negated", "oracle"),
)

# Beside the results: what models and texts they are of, as Markdown that goes into the report.
NOTES = "notes.md"

Section = Callable[[Sequence[Result]], list[str]]


def write_report(directory: Path, markdown: Path, images: Path) -> Path:
    """Writes the Markdown, and plots into `images`. Raises BadInput when there are no results."""
    text = rendered(directory, markdown, images)
    images.mkdir(parents=True, exist_ok=True)
    markdown.parent.mkdir(parents=True, exist_ok=True)
    plots.draw_all(read_results(directory), images)
    markdown.write_text(text)
    return markdown


def rendered(directory: Path, markdown: Path, images: Path) -> str:
    """The Markdown, whose links are from where `markdown` is. Raises BadInput when there are no results."""
    results = read_results(directory)
    if not results:
        raise BadInput(f"{directory} holds no results; run an experiment first")
    notes = directory / NOTES
    about = notes.read_text().rstrip() if notes.is_file() else ""
    return _markdown_of(results, _Places(directory, markdown, images), about)


class _Places:
    """Paths as the Markdown names them."""

    def __init__(self, directory: Path, markdown: Path, images: Path) -> None:
        self._directory, self._markdown, self._images = directory, markdown, images

    def json(self, experiment: str = "") -> str:
        """Link to the results."""
        where = self._from(self._directory / experiment)
        return f"[{experiment or 'the JSON results'}]({where})"

    def image(self, name: str) -> str:
        return self._from(self._images / name)

    @property
    def command(self) -> str:
        """That writes the report: in a directory of its own, or that of the docs."""
        own = self._markdown.parent == self._directory
        return "model-runner experiment report --out DIR" if own else "make results"

    def _from(self, path: Path) -> str:
        return os.path.relpath(path, self._markdown.parent)


def _markdown_of(results: Sequence[Result], places: _Places, about: str) -> str:
    """The whole text. about: what the results' directory says of them."""
    lines = [_HEAD.format(json=places.json(), command=places.command)]
    lines += [about, ""] if about else []
    lines += _setup(results)
    lines += _verdicts(results)
    lines += _answers(results)
    names = [*SECTIONS, *(n for n in _values(results, "experiment") if n not in SECTIONS)]
    for name in names:
        found = of_experiment(results, name)
        if not found:
            continue
        title, sections = SECTIONS.get(name, (name.capitalize().replace("-", " "), [any_table]))
        lines += [f"## {title}", "", *_question(name)]
        for section in sections:
            lines += section(found)
        if name in plots.PLOTS:
            lines += [f"![{title}]({places.image(plots.file_name(name))})", ""]
        lines += [_commands(found, places, name), ""]
    return "\n".join(lines).rstrip() + "\n"


def _question(name: str) -> list[str]:
    from model_runner.experiments.registry import experiments

    known = experiments()
    return [known[name].answers, ""] if name in known else []


def _setup(results: Sequence[Result]) -> list[str]:
    rows = []
    for model in _values(results, "model"):
        of_model = [r for r in results if r.model == model]
        domains = ", ".join(_values(of_model, "domain"))
        seeds = ", ".join(str(seed) for seed in _values(of_model, "seed"))
        minutes = sum(r.elapsed_s for r in of_model) / 60
        rows.append([model, domains, seeds, str(len(of_model)), f"{minutes:.0f}"])
    return [*table(["model", "domains", "seeds", "results", "minutes"], rows), ""]


def _verdicts(results: Sequence[Result]) -> list[str]:
    """What holds, and in how many studies."""
    rows = []
    for claim in CLAIMS:
        found = claim.verdicts(results)
        if found:
            rows.append([claim.statement, _count(found), _figures(found)])
    if not rows:
        return []
    head = ["statement", "holds in", "figures"]
    return ["## What holds", "", "By study (model, domain, seed).", "", *table(head, rows), ""]


def _answers(results: Sequence[Result]) -> list[str]:
    """The questions that were open, with figures."""
    lines = list[str]()
    for answer in ANSWERS:
        if found := answer.found(results):
            body = [[name, str(n), f"{gain:+.3f}", f"{harm:+.3f}"] for name, n, gain, harm in found]
            head = ["", "studies", "domain", "general"]
            lines += [f"### {answer.question}", "", *table(head, body), ""]
    return ["## Questions that were open", "", *lines] if lines else []


def _count(found: Sequence[Verdict]) -> str:
    return f"{sum(v.holds for v in found)} of {len(found)}"


def _figures(found: Sequence[Verdict]) -> str:
    """All when they are few, else the ends and the middle."""
    ordered = sorted(found, key=lambda v: v.figure)
    if len(ordered) <= 3:
        return ", ".join(f"{v.text} ({v.study})" for v in ordered)
    low, middle, high = ordered[0], ordered[len(ordered) // 2], ordered[-1]
    return f"{low.text} ({low.study}) to {high.text} ({high.study}), median {middle.text}"


def _commands(results: Sequence[Result], places: _Places, name: str) -> str:
    """Each once, the seeds of one command together."""
    by_command: dict[str, list[str]] = {}
    for result in results:
        before, _, after = result.command.partition(" --seeds ")
        seed, _, rest = after.partition(" ")
        seeds = by_command.setdefault(f"{before} --seeds %s {rest}".rstrip(), [])
        if seed not in seeds:
            seeds.append(seed)
    commands = [f"`{command % ','.join(seeds)}`" for command, seeds in by_command.items()]
    return f"Commands: {', '.join(commands)}. JSON: {places.json(name)}."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def cell(changes: Sequence[Row]) -> str:
    """The mean change over seeds, with its interval."""
    known = [c for c in changes if c]
    if not known:
        return ""
    delta = fmean(c["delta"] for c in known)
    ends = [[c[end] for c in known if c.get(end) is not None] for end in ("low", "high")]
    if not all(ends):
        return f"{delta:+.3f}"
    low, high = (fmean(each) for each in ends)
    return f"{delta:+.3f} ({low:+.3f} to {high:+.3f})"


def number(values: Sequence[Any], form: str = ".3g") -> str:
    """The mean of what is known."""
    known = [v for v in values if v is not None]
    return format(fmean(known), form) if known else ""


def _values(results: Sequence[Result], field: str) -> list[Any]:
    return sorted({getattr(r, field) for r in results})


def main_tables(results: Sequence[Result]) -> list[str]:
    """Per model: gains and harms by arm and domain, then costs."""
    lines = []
    for model in _values(results, "model"):
        of_model = [r for r in results if r.model == model]
        domains = _values(of_model, "domain")
        rows = _by(of_model, lambda result, row: (row["arm"], result.domain))
        arms = _in_order(dict.fromkeys(arm for arm, _ in rows))
        for text, title in (
            ("domain", "Change on the domain"),
            ("general", "Change on general text"),
        ):
            lines += [f"### {model}: {title}", ""]
            body = [
                [arm, *(cell([r[text] for r in rows.get((arm, d), [])]) for d in domains)]
                for arm in arms
            ]
            lines += [*table(["arm", *domains], body), ""]
        lines += _settings(model, arms, domains, rows)
        lines += [f"### {model}: cost", "", *_costs(arms, rows), ""]
    return lines


def _in_order(arms: Iterable[str]) -> list[str]:
    """Ours, then the baselines, then controls; what is not named here comes last, by the alphabet."""
    order = {arm: at for at, arm in enumerate(_ARMS)}
    return sorted(arms, key=lambda arm: (order.get(arm, len(order)), arm))


def _settings(
    model: str,
    arms: Sequence[str],
    domains: Sequence[str],
    rows: Mapping[tuple[str, str], list[Row]],
) -> list[str]:
    """What arms that choose a setting on the dev texts chose, by domain; of several seeds each."""
    body = []
    for arm in arms:
        of_arm = [rows.get((arm, domain), []) for domain in domains]
        if any("chosen" in row for found in of_arm for row in found):
            shown = [[_setting(row["chosen"]["setting"]) for row in found] for found in of_arm]
            body.append([arm, *("; ".join(dict.fromkeys(each)) for each in shown)])
    if not body:
        return []
    title = f"### {model}: settings chosen on dev"
    return [title, "", *table(["arm", *domains], body), "", _BASELINES, ""]


def _setting(setting: Mapping[str, Any] | None) -> str:
    """`the model as it is` where no candidate was within the bound on harm."""
    if setting is None:
        return "the model as it is"
    values = {name: format(v, "g") if isinstance(v, float) else v for name, v in setting.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _costs(arms: Sequence[str], rows: Mapping[tuple[str, str], list[Row]]) -> list[str]:
    body = []
    for arm in arms:
        budgets = [r["budget"] for (name, _), found in rows.items() if name == arm for r in found]
        body.append(
            [
                arm,
                number([b["fit_s"] for b in budgets], ".1f"),
                number([b["trained_parameters"] for b in budgets], ",.0f"),
                number([b["peak_bytes"] / 2**20 for b in budgets], ".1f"),
                number([1e6 * b["s_per_token"] for b in budgets if b["s_per_token"]], ".0f"),
            ]
        )
    head = ["arm", "fit, s", "trained parameters", "MiB beside the model", "us per scored token"]
    note = "Memories are searched exactly in the process, on cores that were shared: compare orders of magnitude."
    return [*table(head, body), "", note]


def _by(
    results: Sequence[Result], key: Callable[[Result, Row], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for result in results:
        for row in result.rows:
            found.setdefault(key(result, row), []).append(row)
    return found


def change_table(*columns: str, numbers: Mapping[str, str] | None = None) -> Section:
    """Rows named by `columns`, with both changes; numbers: further columns and their formats."""

    def section(results: Sequence[Result]) -> list[str]:
        lines = []
        for (model, domain), of_study in _studies(results).items():
            names = [c for c in columns if any(c in row for r in of_study for row in r.rows)]
            rows = _by(
                of_study,
                lambda _result, row, names=names: tuple(  # type: ignore[misc]
                    _name(row.get(n)) for n in names
                ),
            )
            body = [
                [
                    *key,
                    *(
                        number([r.get(n) for r in found], form)
                        for n, form in (numbers or {}).items()
                    ),
                    *(cell([r[t] for r in found if t in r]) for t in ("domain", "general")),
                ]
                for key, found in rows.items()
            ]
            head = [
                *(n.replace("_", " ") for n in names),
                *(n.replace("_", " ") for n in numbers or {}),
            ]
            lines += [f"### {model}, {domain}", "", *table([*head, "domain", "general"], body), ""]
        return lines

    return section


def _name(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def _studies(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        found.setdefault((result.model, result.domain), []).append(result)
    return found


def number_table(columns: Sequence[str], numbers: Mapping[str, str]) -> Section:
    """Rows named by `columns`, with means over seeds of numbers, by their formats."""

    def section(results: Sequence[Result]) -> list[str]:
        lines = []
        for (model, domain), of_study in _studies(results).items():
            rows = _by(of_study, lambda _result, row: tuple(_name(row.get(c)) for c in columns))
            body = [
                [*key, *(number([r.get(n) for r in found], form) for n, form in numbers.items())]
                for key, found in rows.items()
            ]
            head = [name.replace("_", " ") for name in (*columns, *numbers)]
            lines += [f"### {model}, {domain}", "", *table(head, body), ""]
        return lines

    return section


def any_table(results: Sequence[Result]) -> list[str]:
    """Of rows that nothing here knows: what names them, and their changes."""
    changes = ("domain", "general")
    named = [n for result in results for row in result.rows for n in row if n not in changes]
    return change_table(*dict.fromkeys(named))(results)


def transfer_table(results: Sequence[Result]) -> list[str]:
    """Memory by text, per model and method."""
    lines = []
    for model in _values(results, "model"):
        of_model = [r for r in results if r.model == model]
        rows = _by(of_model, lambda _result, row: (row["method"], row["memory"], row["text"]))
        texts = list(dict.fromkeys(text for _, _, text in rows))
        memories = list(dict.fromkeys(memory for _, memory, _ in rows))
        for method in dict.fromkeys(method for method, _, _ in rows):
            body = [
                [m, *(cell([r["domain"] for r in rows.get((method, m, t), [])]) for t in texts)]
                for m in memories
            ]
            lines += [f"### {model}, {method}", "", *table(["memory of \\ text", *texts], body), ""]
    return lines


def choice_table(results: Sequence[Result]) -> list[str]:
    """A row per seed: McNemar's test is of one draw."""
    body = [
        [
            *(result.model, result.domain, str(result.seed), row["arm"], str(row["questions"])),
            f"{row['plain']:.1%}",
            f"{100 * row['change']:+.2f} ± {100 * row['se']:.2f}",
            *(str(row["gained"]), str(row["lost"]), f"{row['p']:.2g}"),
        ]
        for result in results
        for row in result.rows
    ]
    head = ["model", "domain", "seed", "arm", "questions", "plain right"]
    head += ["change, points ± one s.e.", "only with it", "only without", "McNemar p"]
    return [*table(head, body), ""]


SECTIONS: dict[str, tuple[str, Sequence[Section]]] = {
    "main": ("Every method on the same text", [main_tables]),
    "choice": ("Multiple choice", [choice_table]),
    "size": ("Size of the reference", [change_table("method", "reference")]),
    "neighbours": (
        "Neighbours and similarity",
        [change_table("method", "similarity", "neighbours", "split")],
    ),
    "steps": ("Gradient steps", [change_table("method", "steps", "eta", "split")]),
    "step-size": ("Length of the step", [change_table("method", "norm", "eta", "split")]),
    "layers": ("Layers", [change_table("method", "subset", "layers", "split")]),
    "lambda0": (
        "Gain against harm",
        [change_table("method", "lambda0", "null_weight", "split")],
    ),
    "null-entries": (
        "General text in the memory",
        [change_table("share", "values", "entries", "split")],
    ),
    "source": ("Where the gain comes from", [change_table("changed")]),
    "rounds": (
        "Boosting rounds",
        [change_table("rounds", "null_weight", "kept", "split", numbers={"left_out_nll": ".3f"})],
    ),
    "boosted-layers": ("Layers of a boosted memory", [change_table("layers")]),
    "together": (
        "With a kNN-LM in one pass",
        [change_table("method", "weight", "sharpness", "weighed_by", "split")],
    ),
    "token-classes": (
        "Classes of tokens",
        [
            number_table(
                ("method", "text", "class"),
                {
                    "share_of_tokens": ".1%",
                    "nll_plain": ".3f",
                    "change": "+.3f",
                    "share_of_change": ".1%",
                },
            )
        ],
    ),
    "perplexity": (
        "Easy and hard sequences",
        [change_table("method", "by", "bucket", numbers={"plain": ".2f"})],
    ),
    "selective": (
        "Selective retrieval",
        [
            change_table(
                *("signal", "rate"),
                numbers={
                    "domain_looked_up": ".0%",
                    "domain_us_per_token": ".0f",
                    "general_looked_up": ".0%",
                },
            )
        ],
    ),
    "compression": (
        "Compressed keys and values",
        [
            change_table(
                *("method", "keys", "values"),
                numbers={"bytes_per_key": ".0f", "us_per_lookup": ".0f"},
            )
        ],
    ),
    "pseudo-labels": (
        "Without ground truth",
        [change_table("method", "labels", numbers={"entries": ".0f"})],
    ),
    "transfer": ("Across domains", [transfer_table]),
    "composition": ("Composition of the reference", [change_table("reference", "composition")]),
    "drift": (
        "A stream that drifts",
        [
            number_table(
                ("stream", "phase", "text"), {"entries": ".0f", "delta": "+.3f", "se": ".3f"}
            )
        ],
    ),
    "calibration": (
        "Calibration, repetition and bias",
        [
            number_table(
                ("method", "text"),
                {
                    "ece": ".4f",
                    "accuracy": ".3f",
                    "confidence": ".3f",
                    "entropy": ".3f",
                    "bias": ".4f",
                    "repeated": ".3f",
                    "copied": ".4f",
                },
            )
        ],
    ),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--markdown", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    given = parser.parse_args()
    write_report(given.directory, given.markdown, given.images)


if __name__ == "__main__":
    main()
