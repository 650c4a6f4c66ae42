"""The demonstration: a pretrained model, compressed and compared."""
