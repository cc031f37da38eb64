"""Training methods: one file each, with its settings. They are listed in :data:`longtail.registry.METHODS`."""
