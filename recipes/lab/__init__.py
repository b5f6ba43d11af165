"""What the commands share: arms, data, training, measuring, pages."""
