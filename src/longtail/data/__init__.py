"""From images to batches: sources, long-tailed subsampling, augmentation and loading."""
