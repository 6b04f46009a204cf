"""A discrete-event simulation of labelmint on Kubernetes: Tritons, gateways, training jobs, nodes and autoscalers."""
