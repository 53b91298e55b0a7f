"""Who reaches what, by the NetworkPolicies alone."""

from k8s_manifests import Document


def reached(policies: list[Document], pod: dict[str, str], source: Document, port: int) -> bool:
    """Returns whether the NetworkPolicies of a namespace let a TCP port of a pod be reached.

    Args:
        policies: All of one namespace, that of the pod.
        pod: The labels of the pod.
        source: Who asks: `namespace` (its name; none for who is no pod) and `labels`.
        port: The port.
    """
    own = {policy["metadata"]["namespace"] for policy in policies}
    assert len(own) == 1
    mine = [
        policy["spec"]
        for policy in policies
        if "Ingress" in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod)
    ]
    return not mine or any(
        (not rule.get("ports") or any(one["port"] == port for one in rule["ports"]))
        and ("from" not in rule or any(is_peer(peer, source, *own) for peer in rule["from"]))
        for spec in mine
        for rule in spec.get("ingress", [])
    )


def is_peer(peer: Document, source: Document, own_namespace: str) -> bool:
    if "ipBlock" in peer or "namespace" not in source:
        return False
    names = {"kubernetes.io/metadata.name": source["namespace"]}
    at_home = source["namespace"] == own_namespace
    if not (matches(peer["namespaceSelector"], names) if "namespaceSelector" in peer else at_home):
        return False
    return matches(peer.get("podSelector", {}), source["labels"])


def matches(selector: Document, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        entry["operator"] == "In" and labels.get(entry["key"]) in entry["values"]
        for entry in selector.get("matchExpressions", [])
    )


def ports_of(policies: list[Document]) -> set[int]:
    """Returns every port that a policy names; all others are alike."""
    rules = [rule for policy in policies for rule in policy["spec"].get("ingress", ())]
    return {one["port"] for rule in rules for one in rule.get("ports", ())}
