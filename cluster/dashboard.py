"""The Grafana dashboard of runs, as the JSON that Grafana imports. Pure.

`python docs/make.py` writes it to cluster/observability/dashboard.json, which is packaged.
"""

from dataclasses import dataclass
from typing import Any

from actors.exported_metrics import declared

SCHEMA_VERSION = 39
"""Of Grafana 10.2 and later, which migrate older ones by themselves."""

WIDTH, HEIGHT = 8, 7
"""Of a panel, on Grafana's grid of 24 columns."""

NOT_SHOWN = {
    "amenable_learner_step_timestamp_seconds": "alerts read it; the dashboard shows steps",
    "amenable_learner_kl_budget_nats": "most recipes have none, and PPO stops there by itself",
    "amenable_publication_begun_timestamp_seconds": "alerts read it; the dashboard shows how long publications took",
    "amenable_stream_attempt": "a number that means something beside audit only",
}
"""Metrics that no panel shows, and why."""


@dataclass(frozen=True)
class Panel:
    """One graph: `queries` are PromQL with the legend of each; RUN stands for the chosen runs. `unit` is Grafana's."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""


def _one(title: str, unit: str, query: str, legend: str, description: str = "") -> Panel:
    return Panel(title, unit, ((query, legend),), description)


ROWS: dict[str, tuple[Panel, ...]] = {
    "Learning": (
        Panel(
            "KL to the reference",
            "none",
            (
                ("max by (run) (ray_amenable_learner_kl_nats{RUN})", "{{run}}"),
                ("max by (run) (ray_amenable_learner_kl_target_nats{RUN})", "{{run}} target"),
            ),
            "Nats a sequence, mean over the batch.",
        ),
        _one(
            "Reward",
            "none",
            "max by (run, part) (ray_amenable_learner_reward{RUN})",
            "{{run}} {{part}}",
            "The reward model's score, the KL penalty, and both together.",
        ),
        _one("KL coefficient", "none", "max by (run) (ray_amenable_learner_kl_coefficient{RUN})", "{{run}}"),
        _one(
            "Losses", "none", "max by (run, stage, part) (ray_amenable_learner_loss{RUN})", "{{run}} {{stage}} {{part}}"
        ),
        _one(
            "Gradient norms",
            "none",
            "max by (run, stage, network) (ray_amenable_learner_gradient_norm{RUN})",
            "{{run}} {{stage}} {{network}}",
        ),
        _one(
            "Learning rates",
            "sci",
            "max by (run, stage, network) (ray_amenable_learner_learning_rate{RUN})",
            "{{run}} {{stage}} {{network}}",
        ),
        Panel(
            "New policy against old",
            "none",
            (
                ("max by (run) (ray_amenable_learner_approx_kl_nats{RUN})", "{{run}} KL, nats a token"),
                ("max by (run, network) (ray_amenable_learner_clip_fraction{RUN})", "{{run}} clipped, {{network}}"),
            ),
        ),
        _one("Entropy of a token", "none", "max by (run) (ray_amenable_learner_entropy_nats{RUN})", "{{run}}", "Nats."),
        _one(
            "Explained variance of the critic",
            "none",
            "max by (run) (ray_amenable_learner_explained_variance{RUN})",
            "{{run}}",
            "1 is perfect, 0 no better than the mean return.",
        ),
        _one(
            "Length of responses",
            "none",
            "max by (run) (ray_amenable_learner_response_tokens{RUN})",
            "{{run}}",
            "Tokens.",
        ),
        _one(
            "Responses cut before end-of-text",
            "percentunit",
            "max by (run) (ray_amenable_learner_truncated_fraction{RUN})",
            "{{run}}",
        ),
        _one(
            "Engine against learner",
            "none",
            "max by (run, of) (ray_amenable_learner_mismatch_nats{RUN})",
            "{{run}} {{of}}",
            "Largest difference on one token, nats.",
        ),
    ),
    "Progress": (
        _one("Stage under way", "none", "max by (run, stage) (ray_amenable_run_stage{RUN})", "{{run}} {{stage}}"),
        Panel(
            "Steps of the stage",
            "none",
            (
                ("max by (run, stage) (ray_amenable_learner_step{RUN})", "{{run}} {{stage}}"),
                ("max by (run, stage) (ray_amenable_learner_steps_wanted{RUN})", "{{run}} {{stage}} in all"),
            ),
        ),
        _one(
            "Tokens trained",
            "none",
            "max by (run, stage) (ray_amenable_learner_tokens_per_second{RUN})",
            "{{run}} {{stage}}",
            "A second.",
        ),
        _one(
            "An update's time",
            "s",
            "max by (run, phase) (ray_amenable_learner_phase_seconds{RUN})",
            "{{run}} {{phase}}",
            "By what the learner does.",
        ),
        Panel(
            "Time of updates",
            "s",
            (
                (
                    "sum by (run) (rate(ray_amenable_learner_update_seconds_sum{RUN}[1h]))"
                    " / sum by (run) (rate(ray_amenable_learner_update_seconds_count{RUN}[1h]))",
                    "{{run}} mean of an hour",
                ),
                (
                    "histogram_quantile(0.95, sum by (run, le)"
                    " (rate(ray_amenable_learner_update_seconds_bucket{RUN}[1h])))",
                    "{{run}} 95 %",
                ),
            ),
        ),
        _one(
            "Figures that were not finite",
            "none",
            "sum by (run, stage) (ray_amenable_learner_non_finite_figures_total{RUN})",
            "{{run}} {{stage}}",
        ),
    ),
    "Stream": (
        _one(
            "Slots a second",
            "none",
            "sum by (run, outcome) (rate(ray_amenable_stream_slots_total{RUN}[$__rate_interval]))",
            "{{run}} {{outcome}}",
            "Counted once an update.",
        ),
        Panel(
            "Episodes that wait, slots admitted",
            "none",
            (
                ("max by (run) (ray_amenable_stream_waiting_episodes{RUN})", "{{run}} accepted, not trained"),
                ("max by (run) (ray_amenable_stream_admitted_slots{RUN})", "{{run}} admitted"),
            ),
        ),
        Panel(
            "Waiting for episodes, and since the last batch",
            "s",
            (
                (
                    "(time() - max by (run) (ray_amenable_stream_awaited_timestamp_seconds{RUN}))"
                    " and max by (run) (ray_amenable_stream_awaited_timestamp_seconds{RUN}) > 0",
                    "{{run}} learners wait",
                ),
                ("time() - max by (run) (ray_amenable_stream_trained_timestamp_seconds{RUN})", "{{run}} last batch"),
            ),
        ),
        _one(
            "Age of the weights that wrote tokens",
            "none",
            "max by (run) (ray_amenable_learner_version_lag_updates{RUN})",
            "{{run}}",
            "Updates, the most in a batch.",
        ),
    ),
    "Generators": (
        _one(
            "Tokens generated",
            "none",
            'sum by (run, worker) (rate(ray_amenable_worker_tokens_total{RUN,role="generator"}[$__rate_interval]))',
            "{{run}} {{worker}}",
            "Of finished responses, a second.",
        ),
        _one(
            "Share of time at work",
            "percentunit",
            "sum by (run, worker)"
            ' (rate(ray_amenable_worker_busy_seconds_total{RUN,role="generator"}[$__rate_interval]))',
            "{{run}} {{worker}}",
        ),
        _one(
            "Standing still under way",
            "s",
            'max by (run, worker) (ray_amenable_worker_stalled_seconds{RUN,role="generator"})',
            "{{run}} {{worker}}",
        ),
    ),
    "Publication": (
        _one(
            "Time of a publication",
            "s",
            "sum by (run) (rate(ray_amenable_publication_seconds_sum{RUN}[30m]))"
            " / sum by (run) (rate(ray_amenable_publication_seconds_count{RUN}[30m]))",
            "{{run}}",
            "From weights packed to slots admitted, mean of half an hour.",
        ),
        _one(
            "Generation stands still for weights",
            "s",
            "histogram_quantile(0.95, sum by (run, le) (rate(ray_amenable_generator_pause_seconds_bucket{RUN}[30m])))",
            "{{run}} 95 %",
        ),
        Panel(
            "Publications, and what went wrong",
            "none",
            (
                ("sum by (run) (ray_amenable_publications_total{RUN})", "{{run}} done"),
                ("sum by (run) (ray_amenable_publication_failures_total{RUN})", "{{run}} failed"),
                ("sum by (run, reason) (ray_amenable_publication_losses_total{RUN})", "{{run}} generators {{reason}}"),
            ),
        ),
        Panel(
            "Update that is out",
            "none",
            (
                ("max by (run) (ray_amenable_publication_update{RUN})", "{{run}} published"),
                ("max by (run) (ray_amenable_weight_store_update{RUN})", "{{run}} in the weight store"),
            ),
        ),
    ),
    "Scoring": (
        _one(
            "Tokens scored",
            "none",
            'sum by (run, worker) (rate(ray_amenable_worker_tokens_total{RUN,role="scoring"}[$__rate_interval]))',
            "{{run}} {{worker}}",
            "Prompts included, a second.",
        ),
        _one(
            "Share of time at work",
            "percentunit",
            'sum by (run, worker) (rate(ray_amenable_worker_busy_seconds_total{RUN,role="scoring"}[$__rate_interval]))',
            "{{run}} {{worker}}",
        ),
        _one(
            "Rewards that were not finite",
            "none",
            "sum by (run, worker) (ray_amenable_scoring_non_finite_rewards_total{RUN})",
            "{{run}} {{worker}}",
        ),
    ),
    "Fleet": (
        _one(
            "Workers by state",
            "none",
            "max by (run, role, state) (ray_amenable_fleet_workers{RUN}) > 0",
            "{{run}} {{role}} {{state}}",
        ),
        _one(
            "Workers wanted", "none", "max by (run, role) (ray_amenable_fleet_wanted_workers{RUN})", "{{run}} {{role}}"
        ),
        _one("Workers lost", "none", "sum by (run, role) (ray_amenable_fleet_losses_total{RUN})", "{{run}} {{role}}"),
    ),
    "Memory": (
        _one(
            "Learner",
            "bytes",
            "max by (run, stage) (ray_amenable_learner_memory_bytes{RUN})",
            "{{run}} {{stage}}",
            "The most so far, on its GPU where it has one.",
        ),
        _one(
            "Generators and scoring",
            "bytes",
            "max by (run, role, worker) (ray_amenable_worker_memory_bytes{RUN})",
            "{{run}} {{worker}}",
        ),
        _one(
            "Driver, conductor, stream, weight store",
            "bytes",
            "max by (run, role) (ray_amenable_process_memory_bytes{RUN})",
            "{{run}} {{role}}",
        ),
        Panel(
            "Weight store",
            "bytes",
            (
                ("max by (run) (ray_amenable_weight_store_snapshot_bytes{RUN})", "{{run}} newest snapshot"),
                (
                    "sum by (run, place) (ray_amenable_weight_store_write_failures_total{RUN})",
                    "{{run}} not written, {{place}}",
                ),
            ),
        ),
    ),
    "Serving": (
        _one(
            "Requests",
            "reqps",
            "sum by (run, route, status) (rate(ray_amenable_requests_total{RUN}[$__rate_interval]))",
            "{{run}} {{route}} {{status}}",
        ),
        _one(
            "Time of a request",
            "s",
            "histogram_quantile(0.95, sum by (run, route, le)"
            " (rate(ray_amenable_request_seconds_bucket{RUN}[$__rate_interval])))",
            "{{run}} {{route}} 95 %",
        ),
        _one("Under way", "none", "sum by (run, worker) (ray_amenable_requests_in_flight{RUN})", "{{run}} {{worker}}"),
        _one("Queued", "none", "sum by (run, worker) (ray_amenable_responses_queued{RUN})", "{{run}} {{worker}}"),
        _one(
            "Tokens generated",
            "none",
            "sum by (run, model) (rate(ray_amenable_generated_tokens_total{RUN}[$__rate_interval]))",
            "{{run}} {{model}}",
            "A second.",
        ),
        _one(
            "What engines hold",
            "none",
            "max by (run, worker, slot, model, version) (ray_amenable_slot{RUN})",
            "{{run}} {{worker}} {{slot}} {{model}} {{version}}",
        ),
        Panel(
            "Changes of weights",
            "none",
            (
                ("sum by (run) (ray_amenable_weight_changes_total{RUN})", "{{run}} changes"),
                ("sum by (run) (ray_amenable_stood_still_seconds_total{RUN})", "{{run}} seconds at a standstill"),
            ),
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard: a row of panels for each of ROWS, with variables for the data source and the runs."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        panels.append(
            _placed({"type": "row", "title": title, "collapsed": False, "panels": []}, len(panels), top, 0, 24, 1)
        )
        top += 1
        for number, panel in enumerate(row):
            column = number % (24 // WIDTH)
            if number and column == 0:
                top += HEIGHT
            panels.append(_placed(_graph(panel), len(panels), top, column * WIDTH, WIDTH, HEIGHT))
        top += HEIGHT
    return {
        "title": "amenable",
        "uid": "amenable",
        "description": "Runs of amenable. Metrics are explained in docs/observability.md.",
        "tags": ["amenable"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_source_variable(), _run_variable()]},
        "annotations": {"list": []},
        "panels": panels,
    }


def queries() -> list[str]:
    """All PromQL of the panels, with Grafana's variables in it."""
    return [_filled(query) for row in ROWS.values() for panel in row for query, _ in panel.queries]


def not_shown() -> set[str]:
    """Declared metrics that no panel shows."""
    text = "\n".join(queries())
    return {name for name, metric in declared().items() if not any(f"{each}{{" in text for each in metric.series)}


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def _filled(query: str) -> str:
    return query.replace("{RUN", '{run=~"$run"')


def _graph(panel: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "custom": {"lineWidth": 1, "fillOpacity": 0, "spanNulls": False}},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": _SOURCE, "expr": _filled(query), "legendFormat": legend}
            for number, (query, legend) in enumerate(panel.queries)
        ],
    }


def _placed(panel: dict[str, Any], number: int, top: int, left: int, width: int, height: int) -> dict[str, Any]:
    return {"id": number + 1, **panel, "gridPos": {"x": left, "y": top, "w": width, "h": height}}


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}


def _run_variable() -> dict[str, Any]:
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(ray_amenable_run_stage, run)", "refId": "run"},
        "definition": "label_values(ray_amenable_run_stage, run)",
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "hide": 0,
    }
