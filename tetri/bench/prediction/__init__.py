"""bench_prediction: whether predicting output lengths pays, simulated."""
