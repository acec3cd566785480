"""The passes that come with graphopt, one per file."""
