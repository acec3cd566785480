"""Max, average and adaptive average pooling in float32, of sequences and images."""
