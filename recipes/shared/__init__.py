"""What the recipes for generative models share: encoding, training, methods, probes, the text world, the table."""
