"""The dashboard, the alert rules and the page about them, against what the server really exports.

A server does one of each thing, its page is read, and every query of the dashboard and of the rules
must find its metrics, its labels and the values that it asks them for. Where `promtool` is there
(Debian's package `prometheus`, or the variable PROMTOOL), the rules are run over made-up series.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from promql import Selector, grouped_labels, selectors

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "serving"))  # where the servers of tests are

from live import PNG, running, until  # noqa: E402
from tiny_bundle import MEMORY, picture, write_tiny_bundle  # noqa: E402

from exports.registry import Registry  # noqa: E402
from exports.shadow_plan import ShadowPlan  # noqa: E402
from serving import logs  # noqa: E402
from serving.edge import _ROUTES  # noqa: E402
from serving.keys import make_key  # noqa: E402
from serving.metrics import MAX_BYTES, MAX_SERIES  # noqa: E402

MONITORING = HERE.parent / "k8s" / "monitoring"
GUIDE = (HERE.parent / "docs" / "observability.md").read_text("utf-8")
# What Prometheus adds: a bare server of its, or the operator's PodMonitor.
OF_TARGETS = {"instance", "job", "namespace", "pod"}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """What a server exports that did one of each thing."""
    root = tmp_path_factory.mktemp("monitored")
    registry = Registry(root / "models")
    written = [
        write_tiny_bundle(root / "good", version="1", reference=MEMORY[0], matcher=True),
        write_tiny_bundle(root / "bad", version="2", broken_golden=True),
        write_tiny_bundle(root / "candidate", version="3", seed=1),
    ]
    for bundle in written:
        registry.publish(bundle)
    registry.promote("tiny", "1")
    registry.set_shadow("tiny", ShadowPlan(version="3", share=1.0, min_requests=1000))
    keys = root / "keys.json"
    key = make_key(keys, "ours", rate=1e6)
    with running(
        registry.root, max_queue=1, reproof_s=0.1, keys_file=keys, open_pages=("metrics",)
    ) as live:
        for wrong in ({}, {"X-API-Key": "guessed"}):
            assert live.client.get("/v1/models", headers=wrong).status_code == 401
        live.client.headers["X-API-Key"] = key
        assert live.client.get("/v1/admin/x").status_code == 403
        until(lambda: live.manager.shadow.version == "3")
        seeds = count(100)
        while not live.metrics()["cutline_shadow_seconds_count",]:
            captioned(live, next(seeds))
        registry.stop_shadow("tiny")
        until(lambda: live.manager.shadow.version is None)
        captioned(live, 1, params={"rerank": "itm"})
        assert live.client.post("/v1/captions", content=b"x", headers=PNG).status_code == 415
        for path in (*_ROUTES, "/nowhere"):
            live.client.get(path)
        registry.promote("tiny", "2")
        while not live.metrics()["cutline_swaps_total", "refused"]:
            pass
        many = [("image", (f"{seed}.png", picture(seed))) for seed in range(16)]
        while live.client.post("/v1/captions", files=many, headers={}).status_code != 429:
            pass
        while not live.metrics()["cutline_proofs_total", "passed"]:
            pass
        done = live.metrics()
        page = live.client.get("/metrics").text
    for name, *labels in (
        ("cutline_bundles_refused_total", "golden"),
        ("cutline_refused_requests_total", "no_key"),
        ("cutline_refused_requests_total", "wrong_key"),
        ("cutline_refused_requests_total", "not_admin"),
        ("cutline_shadow_live_seconds_count",),
    ):
        assert done[name, *labels] >= 1, (name, *labels)
    return list(text_string_to_metric_families(page))


def captioned(live, seed, **options):
    """Has an image captioned; a proof may stand in the one place of the queue."""
    while (code := live.caption(picture(seed), **options).status_code) == 429:
        pass
    assert code == 200


@pytest.fixture(scope="module")
def exported(families):
    """Returns {sample name: {label: values}}."""
    found = {}
    for family in families:
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def rules():
    with (MONITORING / "alerts.yaml").open() as file:
        spec = yaml.safe_load(file)["spec"]
    return [rule for group in spec["groups"] for rule in group["rules"]]


def dashboard():
    return json.loads((MONITORING / "dashboard.json").read_text())


def dashboard_queries():
    shown = dashboard()
    targets = (target for panel in shown["panels"] for target in panel.get("targets", ()))
    yield from (target["expr"] for target in targets)
    yield from (annotation["expr"] for annotation in shown["annotations"]["list"])


REQUESTS = "cutline_requests_total"
# Values that stand for a whole, so a query for another can only be a mistake. A code may be any.
FINITE = {"le", "outcome", "fault", "route", "reason", "verdict"}


def faults_of(query, exported):
    """Returns what a query asks for that nobody exports."""
    found = []
    asked = selectors(query)
    for one in asked:
        if one.name not in exported:
            found.append(f"no metric {one.name}")
            continue
        labels = exported[one.name]
        for label, operator, value in one.matchers:
            if label in OF_TARGETS:
                continue
            if label not in labels:
                found.append(f"{one.name} has no label {label}")
            elif label in FINITE and not any(
                value == known if operator in ("=", "!=") else re.fullmatch(value, known)
                for known in labels[label]
            ):
                found.append(f"no {label} of {one.name} is {value}")
            elif label == "code" and not re.fullmatch(r"[1-5](\.\.|\d\d)", value):
                found.append(f"{value} is no code")
    known = OF_TARGETS.union(*(exported.get(one.name, ()) for one in asked))
    return found + [f"nothing has a label {name}" for name in grouped_labels(query) - known]


def test_every_query_of_the_rules_finds_what_it_asks_for(exported):
    for rule in rules():
        assert faults_of(rule["expr"], exported) == [], rule["alert"]


def test_every_query_of_the_dashboard_finds_what_it_asks_for(exported):
    queries = list(dashboard_queries())
    assert len(queries) > 30
    for query in queries:
        assert selectors(query), query
        assert faults_of(query, exported) == [], query


def test_every_metric_is_watched_by_somebody(exported):
    asked = {one.name for query in dashboard_queries() for one in selectors(query)}
    asked |= {one.name for rule in rules() for one in selectors(rule["expr"])}
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in exported if "cutline" in name}
    assert ours == {re.sub("_(bucket|sum|count)$", "", name) for name in asked if "cutline" in name}


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("cutline_redy", "no metric cutline_redy"),
        ('sum(rate(cutline_swaps{outcome="refused"}[5m]))', "no metric cutline_swaps"),
        ('cutline_swaps_total{result="refused"}', "has no label result"),
        (
            'cutline_swaps_total{outcome="rejected"}',
            "no outcome of cutline_swaps_total is rejected",
        ),
        ('cutline_request_seconds_bucket{le="2"}', "no le of"),
        ('cutline_requests_total{route=~"caption|chart"}', "no route of"),
        ('cutline_requests_total{code=~"50x"}', "50x is no code"),
        ("sum by (route) (cutline_ready)", "nothing has a label route"),
        ("cutline_ready and on (worker) cutline_queue_depth", "nothing has a label worker"),
        ("1e3 * cutline_ready offset 1h > 2.5e-1 or vector(0)", None),
    ],
)
def test_a_query_for_what_is_not_there_is_found(exported, query, fault):
    found = faults_of(query, exported)
    assert found == [] if fault is None else fault in found[0]


def test_a_query_is_read_whole():
    query = 'a{x="1",y=~"b|c"} / on (z) group_left () sum by (x) (rate(d_total[5m] offset 1h)) > 2'
    assert selectors(query) == [
        Selector("a", (("x", "=", "1"), ("y", "=~", "b|c"))),
        Selector("d_total", ()),
    ]
    assert grouped_labels(query) == {"x", "z"}


def test_the_rules_are_an_object_of_the_operator_and_complete():
    with (MONITORING / "alerts.yaml").open() as file:
        rule_object = yaml.safe_load(file)
    assert rule_object["kind"] == "PrometheusRule"
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"]["summary"].endswith(".")


def test_panels_do_not_lie_on_one_another():
    taken = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in dashboard()["panels"]]
    assert len(set(ids)) == len(ids)


# The page for operators.


def table(heading):
    """Returns the rows of the first table after a heading, without its head."""
    section = GUIDE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows, heading
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_the_page_has_every_metric_as_it_is_exported(families):
    told = {}
    for name, kind, labels, meaning in table("Metrics"):
        assert len(meaning) > 10
        told[name.strip("`")] = (kind, set(re.findall(r"`(\w+)`", labels)))
    found = {}
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels}
        found[name] = (family.type, labels - {"replica", "le"})
    assert told == found


def test_the_page_tells_how_large_a_page_gets():
    assert f"at most {MAX_SERIES} series and {MAX_BYTES:,} bytes" in " ".join(GUIDE.split())


def test_the_page_has_every_route():
    [cell] = [meaning for name, _, _, meaning in table("Metrics") if name[1:-1] == REQUESTS]
    told = cell.partition("`route` one of ")[2].replace(" and ", ", ").split(", ")
    assert sorted(told) == sorted({*_ROUTES.values(), "infer", "other"})


def test_the_page_has_every_field_of_a_request_s_line():
    told = {row[0].strip("`") for row in table("Logs")}
    assert told == {
        "time",
        "level",
        "logger",
        "message",
        "exception",
        "route",
        "code",
        "seconds",
    } | {*logs._NOTED}


def test_the_page_has_every_alert_and_no_other():
    told = re.findall(r"^### (Cutline\w+)$", GUIDE, re.MULTILINE)
    assert told == [rule["alert"] for rule in rules()]


# With promtool.

FULL = {"instance": "a", "replica": "0"}


def series(name, values, **labels):
    text = ", ".join(f'{key}="{value}"' for key, value in {**FULL, **labels}.items())
    return {"series": f"{name}{{{text}}}", "values": values}


def captions(values, **labels):
    return series("cutline_requests_total", values, route="captions", **labels)


# One minute a value. For each alert: series that raise it by the last minute, and when that is.
RAISED = {
    "CutlineDown": ([series("other", "1x10")], 5),
    "CutlineNoneReady": ([series("cutline_ready", "1 0x10")], 5),
    "CutlineNotReady": (
        [series("cutline_ready", "0x20"), series("cutline_ready", "1x20", replica="1")],
        10,
    ),
    "CutlineReplicaMissing": ([series("cutline_ready", "1x20")], 10),
    "CutlineRestarts": (
        [series("process_start_time_seconds", "1 1 2 3 4x20"), series("cutline_ready", "1x30")],
        10,
    ),
    "CutlineErrors": ([captions("0+98x30", code="200"), captions("0+2x30", code="500")], 20),
    "CutlineSlow": (
        [
            series("cutline_request_seconds_bucket", "0+90x30", le="2.5"),
            series("cutline_request_seconds_count", "0+100x30"),
        ],
        25,
    ),
    "CutlineRefusing": ([captions("0+90x30", code="200"), captions("0+10x30", code="429")], 20),
    "CutlineQueueFull": (
        [series("cutline_queue_depth", "160x30"), series("cutline_queue_limit", "256x30")],
        20,
    ),
    "CutlineMemory": (
        [
            series("process_resident_memory_bytes", "50x30"),
            series("process_resident_memory_bytes", "45x30", replica="1"),
            series("process_resident_memory_bytes", "99x30", instance="database"),
            series("cutline_memory_limit_bytes", "100x30"),
            series("cutline_memory_limit_bytes", "100x30", replica="1"),
            series("cutline_ready", "1x30"),
            series("cutline_ready", "1x30", replica="1"),
        ],
        20,
    ),
    "CutlineIdle": ([captions("7x90", code="200"), series("cutline_ready", "1x90")], 80),
    "CutlineWrongKeys": (
        [series("cutline_refused_requests_total", "0+15x30", reason="wrong_key")],
        20,
    ),
    "CutlineBundleRefused": (
        [series("cutline_bundles_refused_total", "0 0 1x20", reason="golden")],
        5,
    ),
    "CutlineVersionsDiffer": (
        [
            series("cutline_model_info", "1x30", model="m", version="1"),
            series("cutline_model_info", "1x30", model="m", version="2", replica="1"),
        ],
        20,
    ),
    "CutlineProofFailed": ([series("cutline_proofs_total", "0 0 1x20", outcome="failed")], 5),
    "CutlineConfidenceDropped": (
        [
            series("cutline_caption_confidence_sum", "0+6x180 1080+4x90"),
            series("cutline_caption_confidence_count", "0+10x271"),
        ],
        265,
    ),
    "CutlineRepetition": (
        [
            series("cutline_caption_faults_total", "0+1x120", fault="repetition"),
            series("cutline_caption_words_count", "0+10x120"),
        ],
        100,
    ),
    "CutlineBadEndings": (
        [
            series("cutline_caption_faults_total", "0+1x120", fault="bad_ending"),
            series("cutline_caption_words_count", "0+10x120"),
        ],
        100,
    ),
    "CutlineStrangeImages": (
        [
            series("cutline_images_strange_total", "0+2x120"),
            series("cutline_image_distance_count", "0+10x120"),
        ],
        100,
    ),
}

# Two hours in which nothing is wrong: no alert at all, whatever stands in `RAISED` beside.
HEALTHY = [
    *(series("cutline_ready", "1x130", replica=replica) for replica in "01"),
    *(series("process_start_time_seconds", "1x130", replica=replica) for replica in "01"),
    *(series("process_resident_memory_bytes", "40x130", replica=replica) for replica in "01"),
    *(series("cutline_memory_limit_bytes", "100x130", replica=replica) for replica in "01"),
    *(
        series("cutline_model_info", "1x130", replica=replica, model="m", version="1")
        for replica in "01"
    ),
    captions("0+999x130", code="200"),
    captions("0+5x130", code="500"),
    captions("0+9x130", code="429"),
    series("cutline_requests_total", "0+9x130", route="health", code="503"),
    series("cutline_request_seconds_bucket", "0+97x130", le="2.5"),
    series("cutline_request_seconds_count", "0+100x130"),
    series("cutline_queue_depth", "100x130"),
    series("cutline_queue_limit", "256x130"),
    series("cutline_refused_requests_total", "0+2x130", reason="wrong_key"),
    series("cutline_refused_requests_total", "0+99x130", reason="no_key"),
    series("cutline_refused_requests_total", "0+99x130", reason="rate"),
    series("cutline_bundles_refused_total", "0x130", reason="golden"),
    series("cutline_swaps_total", "0x130", outcome="refused"),
    series("cutline_swaps_total", "0+1x130", outcome="loaded"),
    series("cutline_proofs_total", "0x130", outcome="failed"),
    series("cutline_caption_confidence_sum", "0+6x130"),
    series("cutline_caption_confidence_count", "0+10x130"),
    series("cutline_caption_faults_total", "0+1x130", fault="repetition"),
    series("cutline_caption_faults_total", "0+1x130", fault="bad_ending"),
    series("cutline_caption_words_count", "0+100x130"),
    series("cutline_images_strange_total", "0+1x130"),
    series("cutline_image_distance_count", "0+100x130"),
]


def test_every_alert_has_a_case_and_its_series_are_exported(exported):
    assert set(RAISED) == {rule["alert"] for rule in rules()}
    for one in [*HEALTHY, *(one for case, _ in RAISED.values() for one in case)]:
        [selector] = selectors(one["series"])
        if selector.name != "other":
            assert faults_of(one["series"], exported) == []


def promtool():
    found = os.environ.get("PROMTOOL") or shutil.which("promtool")
    return found or pytest.skip("no promtool: apt-get install prometheus, or set PROMTOOL")


def test_alerts_fire_when_they_should_and_only_then(tmp_path):
    tool = promtool()
    with (MONITORING / "alerts.yaml").open() as file:
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(yaml.safe_load(file)["spec"]))
    # What fires is not compared in full, labels and words: the product of all is 1 or absent.
    raised = [
        {
            "interval": "1m",
            "input_series": given,
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}}) > 0',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
            ],
        }
        for alert, (given, minute) in RAISED.items()
    ]
    calm = {
        "interval": "1m",
        "input_series": HEALTHY,
        "promql_expr_test": [
            {"expr": "count(ALERTS)", "eval_time": f"{minute}m", "exp_samples": []}
            for minute in (15, 45, 100, 125)
        ],
    }
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [*raised, calm]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(tests))
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "tests.yaml"]):
        done = subprocess.run([tool, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_is_sound_for_promtool(families):
    tool = promtool()
    from serving.metrics import Metrics

    page = Metrics().page("0")
    done = subprocess.run([tool, "check", "metrics"], input=page, capture_output=True)
    assert done.stderr == b""
