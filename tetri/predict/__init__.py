"""The length predictor: collects data, trains, evaluates and serves it (docs/predictor.md)."""
