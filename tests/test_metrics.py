"""What is counted, under which names, and that labels stay few."""

import http

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from npc_runtime import protocol as wire
from npc_runtime.metrics import MAX_PERSONAS, Metrics

STATUS = {
    "active": 2,
    "queued": 5,
    "tokens_per_s": 41.5,
    "tokens": 900,
    "forwards": 300,
    "kv_used": 0.25,
    "kv_cached": 0.5,
    "preempted": 1,
    "adapters": ["a", "b"],
    "personas": 7,
    "connections": 3,
    "memory": {"base": 2.0},
    "paused": True,
    "max_tokens_per_s": None,
}


@pytest.fixture
def metrics():
    return Metrics(lambda: STATUS)


def values(metrics):
    """Every sample as `name{label=value,…}`."""
    return {
        sample.name + (str(sorted(sample.labels.items())) if sample.labels else ""): sample.value
        for family in parse(metrics.text().decode())
        for sample in family.samples
    }


def end(reason="stop", *, fallback=False, ttft_ms=120.0):
    return wire.LineEnd(
        line=1,
        reason=reason,
        text="Secret words.",
        fallback=fallback,
        usage=wire.Usage(prompt=40, cached=32, completion=12),
        timing=wire.Timing(queue_ms=3.0, ttft_ms=ttft_ms, total_ms=900.0, tokens_per_s=13.0, batch_avg=1.0),
        seed=1,
        prompt_hash="x",
    )


def test_a_line(metrics):
    metrics.sent(end(), "odo")
    metrics.sent(end("deadline", fallback=True, ttft_ms=None), "odo")
    found = values(metrics)
    assert found["npc_runtime_lines_total[('persona', 'odo'), ('reason', 'stop')]"] == 1
    assert found["npc_runtime_lines_total[('persona', 'odo'), ('reason', 'deadline')]"] == 1
    assert found["npc_runtime_fallbacks_total[('persona', 'odo')]"] == 1
    assert found["npc_runtime_first_text_seconds_count"] == 1
    assert found["npc_runtime_first_text_seconds_sum"] == pytest.approx(0.12)
    assert found["npc_runtime_line_seconds_sum"] == pytest.approx(1.8)
    assert found["npc_runtime_queue_seconds_sum"] == pytest.approx(0.006)
    assert found["npc_runtime_line_tokens_sum"] == 24
    assert found["npc_runtime_prompt_tokens_total[('cached', 'yes')]"] == 64
    assert found["npc_runtime_prompt_tokens_total[('cached', 'no')]"] == 16
    assert b"Secret" not in metrics.text()


def test_what_was_not_taken(metrics):
    items = [
        wire.AcceptedItem(line=1, status="queued"),
        wire.AcceptedItem(line=2, status="rejected", code="persona_unknown", message="no persona 'x{}'"),
    ]
    metrics.sent(wire.Accepted(batch="b", items=items))
    metrics.sent(wire.Error(code="invalid", message="'y' is wrong"))
    metrics.lines_dropped(["odo", "odo", None])
    found = values(metrics)
    assert found["npc_runtime_lines_accepted_total"] == 1
    assert found["npc_runtime_lines_rejected_total[('code', 'persona_unknown')]"] == 1
    assert found["npc_runtime_frames_refused_total[('code', 'invalid')]"] == 1
    assert found["npc_runtime_lines_total[('persona', 'odo'), ('reason', 'disconnected')]"] == 2


def test_connections_and_answers(metrics):
    metrics.connection_opened("npc.v1.json")
    metrics.connection_closed(1000)
    metrics.connection_closed(4999)  # the client's own
    metrics.connection_refused(4401)
    metrics.http_answered(http.HTTPStatus.MISDIRECTED_REQUEST)
    found = values(metrics)
    assert found["npc_runtime_connections_opened_total[('subprotocol', 'npc.v1.json')]"] == 1
    assert found["npc_runtime_connections_closed_total[('code', '1000')]"] == 1
    assert found["npc_runtime_connections_closed_total[('code', 'other')]"] == 1
    assert found["npc_runtime_connections_refused_total[('code', '4401')]"] == 1
    assert found["npc_runtime_http_answers_total[('status', '421')]"] == 1


def test_the_status_map_is_read_when_asked(metrics):
    metrics.describe(version="1", device="cpu, 2 threads", backend="torch", base="b")
    found = values(metrics)
    assert found["npc_runtime_lines_active"] == 2
    assert found["npc_runtime_lines_queued"] == 5
    assert found["npc_runtime_tokens_per_second"] == 41.5
    assert found["npc_runtime_tokens_total"] == 900
    assert found["npc_runtime_forwards_total"] == 300
    assert found["npc_runtime_kv_used_ratio"] == 0.25
    assert found["npc_runtime_adapters_resident"] == 2
    assert found["npc_runtime_memory_bytes[('kind', 'base')]"] == 2 << 20
    assert found["npc_runtime_paused"] == 1
    assert "npc_runtime_max_tokens_per_second" not in found
    labels = "('backend', 'torch'), ('base', 'b'), ('device', 'cpu, 2 threads'), ('version', '1')"
    assert found[f"npc_runtime_build_info[{labels}]"] == 1


def test_before_there_is_an_engine():
    found = values(Metrics(dict))
    assert "npc_runtime_lines_active" not in found
    assert found["npc_runtime_lines_accepted_total"] == 0


def test_labels_are_bounded(metrics):
    for number in range(2 * MAX_PERSONAS):
        metrics.sent(end(), f"persona{number}")
    metrics.sent(end(), None)
    metrics.connection_opened("chat")
    found = values(metrics)
    assert len([name for name in found if name.startswith("npc_runtime_lines_total")]) == MAX_PERSONAS + 1
    assert found["npc_runtime_lines_total[('persona', 'other'), ('reason', 'stop')]"] == MAX_PERSONAS + 1
    assert found["npc_runtime_connections_opened_total[('subprotocol', 'other')]"] == 1
    metrics.sent(end(), "persona0")
    assert values(metrics)["npc_runtime_lines_total[('persona', 'persona0'), ('reason', 'stop')]"] == 2


def test_two_daemons_in_a_process_share_nothing(metrics):
    metrics.connection_opened("npc.v1.json")
    assert "npc_runtime_connections_opened_total" not in str(values(Metrics(dict)))
