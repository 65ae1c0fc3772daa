"""What lies on disk: lists and folders of images, own images' splits, training arrays."""
