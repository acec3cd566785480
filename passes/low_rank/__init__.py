"""Low-rank decomposition of convolutions, linear layers and embeddings."""
