"""Files on disk: lists and folders of images, the splits of own images, training arrays."""
