"""Images to features, features in shards on disk, and the search through them."""
