"""Servers that a recipe names, and the rules by which a run's pods reach them."""

import pytest

from cluster.egress import Server, ports_outside, rules_inside, server_of


@pytest.mark.parametrize(
    ("address", "server"),
    [
        ("https://reward.example.org/score", Server("reward.example.org", 443)),
        ("http://reward.example.org/score", Server("reward.example.org", 80)),
        ("http://reward.rlhf.svc:8000/score", Server("reward.rlhf.svc", 8000)),
        ("http://[2001:db8::1]:8000/", Server("2001:db8::1", 8000)),
        ("s3://bucket/runs", None),
        ("s3://bucket/runs?region=eu-1", None),
        ("s3://bucket/runs?scheme=http&endpoint_override=minio:9000", Server("minio", 9000)),
        ("s3://bucket/runs?endpoint_override=minio.example.org", Server("minio.example.org", 443)),
        ("gs://bucket/a.jsonl?scheme=http&endpoint_override=10.0.0.5", Server("10.0.0.5", 80)),
    ],
)
def test_an_address_names_its_server(address, server):
    assert server_of(address) == server


@pytest.mark.parametrize(
    ("host", "namespace"),
    [
        ("reward.rlhf.svc", "rlhf"),
        ("reward.rlhf.svc.cluster.local", "rlhf"),
        ("minio", ""),
        ("10.0.0.5", None),
        ("2001:db8::1", None),
        ("example.org", None),
        ("reward.rlhf.svc.example.org", None),
    ],
)
def test_a_name_tells_whether_its_server_is_in_the_cluster(host, namespace):
    assert Server(host, 1).namespace == namespace


def test_ports_open_where_their_server_is_and_nowhere_else():
    servers = [Server("a.one.svc", 8000), Server("b.one.svc", 8001), Server("minio", 9000), Server("example.org", 8443)]
    assert [each["port"] for each in ports_outside(servers)] == [443, 8443]
    assert [each["port"] for each in ports_outside([])] == [443]
    of_one, of_ours = sorted(rules_inside(servers), key=lambda rule: len(rule["ports"]), reverse=True)
    assert of_one["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "one"}}}]
    assert [each["port"] for each in of_one["ports"]] == [8000, 8001]
    assert of_ours == {"to": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": 9000}]}
    assert rules_inside([]) == []
