"""Peers that are not packages: small programs of ours that stand for the published state of the art on a CPU."""
