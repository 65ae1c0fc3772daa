"""What lies on disk: the datasets' lists and folders, images of one's own, training arrays."""
