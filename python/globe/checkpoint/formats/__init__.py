"""The number formats that checkpoints are published in: codes with scales, decoded as they are read."""
