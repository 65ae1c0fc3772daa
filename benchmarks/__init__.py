"""What this project's speed is measured with: a short script for each kind of work."""
