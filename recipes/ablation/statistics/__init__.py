"""What the numbers of a grid allow to say. One idea a file; all of it works on arrays and frames, not on runs."""
