"""Predicting how many tokens a request will write: collect, train, evaluate, serve (docs/predictor.md)."""
