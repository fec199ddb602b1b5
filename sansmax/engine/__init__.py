"""Running a model over data: train, evaluate, predict, explain, stream."""
