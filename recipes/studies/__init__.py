"""Studies of the project itself: planted problems, benchmarks, gradients, rates, scale."""
