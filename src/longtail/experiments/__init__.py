"""What is done with runs: comparison, evaluation, new classifiers, embeddings."""
