"""Length ranges from a predictor's distributions and from the lengths of the traffic."""
