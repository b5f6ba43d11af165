"""What the study `default_arm` compares: behaviours with their examples, and candidates."""
