"""graphopt makes a trained PyTorch network small and fast on ordinary CPUs."""
