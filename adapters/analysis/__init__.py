"""What can be learned about vectors without training: the states behind them, sums, erasure, how well they read."""
