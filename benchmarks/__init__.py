"""What this project's speed is measured with: one short script a row of the table."""
