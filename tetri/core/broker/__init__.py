"""The broker's core: requests, clients and the membership of the cluster."""
