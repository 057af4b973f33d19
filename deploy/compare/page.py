"""One HTML page with everything in it: it opens anywhere, with no network and no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.compare.curves import MACRO, METRIC_NAMES, NATURAL
from deploy.compare.verdict import signed
from deploy.whole_file import write_whole

PAGE_FILE = "report.html"

Json = dict[str, Any]

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5rem 0 1.5rem }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; background: white; border-radius: 4px }
.scroll { overflow-x: auto }
.sure { font-weight: 600 }
small, caption { color: #777 }
"""


def write_page(results: Json, figures: Mapping[str, Path], path: Path) -> None:
    """Write the page; the pictures go into it."""
    write_whole(path, "".join(_page(results, figures)))


def _page(results: Json, figures: Mapping[str, Path]) -> Iterator[str]:
    yield "<!doctype html><html lang='en'><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width'>"
    yield f"<title>Headrace: comparison of policies</title><style>{_STYLE}</style>"
    yield "<h1>Comparison of mixing policies</h1>"
    yield f"<p>{html.escape(_setting(results))}</p><h2>What can be said</h2><ul>"
    yield from (f"<li>{html.escape(sentence)}</li>" for sentence in results["verdict"])
    yield "</ul>"
    if not results["arms"]:
        return
    yield "<h2>Final test loss</h2>"
    yield _table(["arm", "seeds", *METRIC_NAMES], _final_rows(results))
    for metric in (MACRO, NATURAL):
        yield f"<h2>Paired differences, {html.escape(METRIC_NAMES[metric])}</h2>"
        yield "<small>row less column; bold: the interval excludes 0; below 0 the row is better"
        yield "</small>"
        yield _table(["", *results["arms"]], _paired_rows(results, metric))
    yield "<h2>Steps, tokens and time to a control's final value</h2>"
    yield "<small>means over the seeds that reach it; a proxy run is included in the share</small>"
    yield _table(
        ["arm", "target", "reached", "share of steps", "steps", "M tokens", "cpu s", "wall s"],
        _reached_rows(results),
    )
    yield "<h2>Conduct and cost</h2>"
    yield _table(
        [
            *("arm", "entropy", "most epochs", "share error, sequences", "reward SNR"),
            *("foresight", "critic explained variance", "decide ms", "probe", "cpu s", "wall s"),
        ],
        _conduct_rows(results),
    )
    for title, picture in figures.items():
        data = base64.b64encode(picture.read_bytes()).decode()
        yield f"<h2>{html.escape(title)}</h2>"
        yield f"<img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"
    yield "<h2>Mean mixture and epochs</h2>"
    yield _table(["arm", *results["domains"]], _mixture_rows(results))
    yield "</html>"


def _setting(results: Json) -> str:
    settings = results["settings"]
    batch, training = settings["batch"], settings["training"]
    return (
        f"Model {training['model']}, {settings['steps']} steps of {batch['global_sequences']} x "
        f"{batch['sequence_length']} tokens ({results['tokens'] / 1e6:.2f} M in all), "
        f"{len(results['domains'])} domains, learning rate {training['lr']:g} (constant after "
        f"{training['warmup_steps']} steps), seeds wanted {len(results['seeds_wanted'])}. Losses "
        f"are trailing means of {settings['evaluation']['smoothing']} evaluations, every "
        f"{settings['evaluation']['every']} steps, on {settings['data']['test_sequences']} "
        "held-out sequences of each domain."
    )


def _table(head: Sequence[str], rows: Iterator[list[str]]) -> str:
    """Return a table; cells are HTML already."""
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{cells}</tr>{body}</table></div>"


def _final_rows(results: Json) -> Iterator[list[str]]:
    for arm, values in results["arms"].items():
        cells = []
        for metric in METRIC_NAMES:
            found = values["final"][metric]
            text = "-" if found is None else f"{found['mean']:.4f}"
            if found is not None and found["sd"] is not None:
                text += f" <small>± {found['sd']:.4f}</small>"
            cells.append(text)
        yield [html.escape(arm), str(len(values["seeds"])), *cells]


def _paired_rows(results: Json, metric: str) -> Iterator[list[str]]:
    for arm in results["arms"]:
        cells = []
        for other in results["arms"]:
            found = None if arm == other else results["paired"][metric][arm].get(other)
            if found is None:
                cells.append("")
                continue
            sure = " class='sure'" if found["excludes_zero"] else ""
            cells.append(f"<span{sure}>{signed(found)}</span>")
        yield [html.escape(arm), *cells]


def _reached_rows(results: Json) -> Iterator[list[str]]:
    for arm, values in results["arms"].items():
        for target, reached in values["reached"].items():
            there = [each for each in reached["by_seed"].values() if each is not None]
            row = [html.escape(arm), html.escape(target), f"{len(there)}/{len(reached['by_seed'])}"]
            if there:
                share = reached["share_of_steps"]
                interval = (
                    ""
                    if share["low"] is None
                    else f" <small>[{share['low']:.0%}, {share['high']:.0%}]</small>"
                )
                row += [
                    f"{share['mean']:.0%}{interval}",
                    f"{_mean(each['steps'] for each in there):.0f}",
                    f"{_mean(each['tokens'] for each in there) / 1e6:.3f}",
                    f"{_mean(each['time']['cpu_s'] for each in there):.0f}",
                    f"{_mean(each['time']['wall_s'] for each in there):.0f}",
                ]
            yield row


def _conduct_rows(results: Json) -> Iterator[list[str]]:
    for arm, values in results["arms"].items():
        time = values["time"]
        yield [
            html.escape(arm),
            f"{values['mixture']['entropy']:.3f}",
            f"{max(values['epochs']):.2f}",
            f"{values['mixture']['max_share_error_sequences']:.2f}",
            _plain(values["reward"]["signal_to_noise"]),
            _plain(values["reward"]["foresight"]),
            _plain(values["diagnostics"].get("critic_explained_variance")),
            f"{time['decide_ms_p50']:.1f}",
            f"{time['probe_share']:.1%}",
            f"{time['cpu_s']:.0f}",
            f"{time['wall_s']:.0f}",
        ]


def _mixture_rows(results: Json) -> Iterator[list[str]]:
    for arm, values in results["arms"].items():
        yield [
            html.escape(arm),
            *(
                f"{share:.1%} <small>{epochs:.2f}</small>"
                for share, epochs in zip(values["mixture"]["mean"], values["epochs"], strict=True)
            ),
        ]


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _mean(values: Iterator[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
