"""Images in, batches out: sources, the tail, views and loaders."""
